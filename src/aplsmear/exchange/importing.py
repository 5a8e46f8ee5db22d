"""Turns annotations and pictures of other programs into a data set of this layout."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from aplsmear.compute.engine import HERE, Engine
from aplsmear.data.schema import CELLS_FILE, IMAGE_FOLDER, SMEARS_FILE
from aplsmear.errors import brief
from aplsmear.exchange.classes import Meaning, diagnosis_literal, literal, meaning_of
from aplsmear.exchange.found import Cell, ExchangeError, Found, named
from aplsmear.exchange.readers import columns_of, read_all
from aplsmear.images.reading import ImageError, image_bytes, read_picture
from aplsmear.progress import progress
from aplsmear.tables import write_table

CELL_FOLDER = "cells"
_LARGEST = 10**9  # px; no picture is as large
_FACTS = ("patient", "diagnosis", "site")


@dataclass
class Plan:
    """What will be written.

    Attributes:
        what: what the source is.
        root: folder of the pictures.
        folder: ``wsi`` or ``cells``, the folder of the layout that will hold them.
        pictures: name in that folder -> path below `root`.
        smears: the table wsi.csv; empty for pictures of single cells.
        cells: the table labeled_cells.csv.
        classes: class of the source -> its meaning (None: unknown) and the number of its cells.
        left_out: what was left out and why -> names.
    """

    what: str
    root: Path
    folder: str
    pictures: dict[str, str]
    smears: pd.DataFrame
    cells: pd.DataFrame
    classes: dict[str, tuple[Meaning | None, int]]
    left_out: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """Where patient, diagnosis and site of a picture are from.

    Attributes:
        pattern: a regular expression; its group in the path of a picture is the patient.
        table: CSV file with a row for each picture or each patient.
        columns: what a column of `table` holds -> its title.
        diagnosis: of all pictures.
    """

    pattern: str | None = None
    table: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    diagnosis: str | None = None


def planned(
    found: Found,
    root: Path,
    known: Mapping[str, Meaning],
    facts: Facts,
    *,
    keep_unknown: bool,
    engine: Engine = HERE,
) -> Plan:
    """The data set that annotations become.

    Pictures of single cells are decoded: one that cannot be read, and one that is there twice, is left out.

    Args:
        found: the annotations.
        root: folder of their pictures.
        known: plain name of a class -> its labels.
        facts: where patients and diagnoses are from.
        keep_unknown: an unknown class becomes a type of cell of the same name.
        engine: decodes the pictures; does not change the result.

    Raises:
        ExchangeError: patients or diagnoses are not found or unknown, or nothing is left.
    """
    left_out = defaultdict(list, found.left_out)
    cells = found.cells
    single = bool(cells) and all(cell.box is None for cell in cells)
    of = _facts(found, facts)
    if single:
        cells = _usable(cells, {cell.picture: of[cell.picture][0] for cell in cells}, root, left_out, engine)
    if not (cells if single else found.pictures):
        raise ExchangeError(f"{found.what}: nothing is left to import.")
    if far := [cell.picture for cell in cells if cell.box and max(map(abs, cell.box)) >= _LARGEST]:
        raise ExchangeError(f"Boxes with numbers above {_LARGEST:,} px are no boxes: in {named(far)}.")
    counts = Counter(cell.label for cell in cells)
    classes = {label: (meaning_of(label, known), count) for label, count in sorted(counts.items())}
    if keep_unknown:
        classes = {label: (meaning or Meaning(label), count) for label, (meaning, count) in classes.items()}
    used = sorted({cell.picture for cell in cells} if single else set(found.pictures))
    names = _names(used)
    smears = _smears(used, names, of) if not single else pd.DataFrame()
    table = _cells(cells, classes, names, of if single else None)
    pictures = {name: picture for picture, name in names.items()}
    folder = CELL_FOLDER if single else IMAGE_FOLDER
    kept = {why: listed for why, listed in left_out.items() if listed}
    return Plan(found.what, root, folder, pictures, smears, table, classes, kept)


# --- patients and diagnoses -----------------------------------------------------------------------


def _facts(found: Found, facts: Facts) -> dict[str, tuple[str, str, str]]:
    """Picture -> patient, diagnosis as a set literal, site."""
    of: dict[str, list[str]] = {picture: ["", "", ""] for picture in found.pictures}
    for cell in found.cells:
        of[cell.picture][0] = cell.patient or of[cell.picture][0]
        of[cell.picture][1] = cell.diagnosis or of[cell.picture][1]
    if facts.pattern is not None:
        for picture, patient in _matched(facts.pattern, of).items():
            of[picture][0] = patient
    if facts.table is not None:
        _from_table(of, facts.table, facts.columns)
    if facts.diagnosis:
        for values in of.values():
            values[1] = facts.diagnosis
    literals = {text: diagnosis_literal(text) for text in {values[1] for values in of.values()}}
    if unknown := sorted(text for text, one in literals.items() if one is None):
        raise ExchangeError(
            f"Unknown diagnoses: {named(unknown)}. Write healthy, aml or apl, or as in {{'aml', 'm2'}}."
        )
    return {picture: (values[0], literals[values[1]] or "", values[2]) for picture, values in of.items()}


def _matched(pattern: str, pictures: Iterable[str]) -> dict[str, str]:
    """Picture -> the first group of a pattern in its path."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ExchangeError(f"--patient {pattern!r} is no regular expression: {brief(error)}.") from error
    if not compiled.groups:
        raise ExchangeError(f"--patient {pattern!r} needs a group in brackets, such as '([^/]+)/[^/]+$'.")
    found = {picture: compiled.search(picture) for picture in pictures}
    if wrong := [picture for picture, match in found.items() if match is None or not match[1]]:
        raise ExchangeError(
            f"--patient {pattern!r} finds no patient in {len(wrong):,} paths: {named(wrong)}."
        )
    return {picture: match[1] for picture, match in found.items() if match}


def _from_table(of: dict[str, list[str]], path: Path, given: Mapping[str, str]) -> None:
    """Fill in what a table says of each picture, or of each patient if it names no pictures."""
    table = read_all(path)
    columns = columns_of(list(table.columns), given, path)
    titles = [columns[what] for what in _FACTS if what in columns]
    if "diagnosis" not in columns and "label" in columns and IMAGE_FOLDER in path.name:
        columns["diagnosis"] = columns["label"]  # the table of smears of this layout
    by_picture = "picture" in columns
    if not by_picture and "patient" not in columns:
        raise ExchangeError(
            f"{path} has no column of pictures or patients; it has {', '.join(table.columns)}. Name it: "
            "--column picture=TITLE or --column patient=TITLE."
        )
    if not titles and "diagnosis" not in columns:
        raise ExchangeError(
            f"{path} has no column of patients or diagnoses. Name one: --column diagnosis=TITLE."
        )
    rows = {row[columns["picture" if by_picture else "patient"]]: row for row in table.to_dict("records")}
    missing = []
    for picture, values in of.items():
        keys = (
            [picture, PurePosixPath(picture).name, PurePosixPath(picture).stem] if by_picture else [values[0]]
        )
        row = next((rows[key] for key in keys if key in rows), None)
        if row is None:
            missing.append(picture if by_picture else values[0] or picture)
            continue
        for place, what in enumerate(_FACTS):
            values[place] = (row[columns[what]] if what in columns else "") or values[place]
    if missing:
        what = "pictures" if by_picture else "patients (--patient says where their names are)"
        raise ExchangeError(f"{path} has no row for some {what}: {named(missing)}.")


# --- pictures of single cells ---------------------------------------------------------------------


def _content(path: Path) -> str:
    """A hash of the pixels of a picture; '' if it cannot be read."""
    try:
        rgb = read_picture(image_bytes(path)).rgb
    except ImageError:
        return ""
    return hashlib.sha256(f"{rgb.shape}".encode() + np.ascontiguousarray(rgb).tobytes()).hexdigest()


def _usable(
    cells: list[Cell], patients: Mapping[str, str], root: Path, left_out: dict[str, list[str]], engine: Engine
) -> list[Cell]:
    """Cells whose picture can be read and is there once, or the first of equal ones."""
    paths = [root / cell.picture for cell in cells]
    contents = list(progress(engine.map(_content, paths), "pictures", len(paths)))
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell, content in zip(cells, contents, strict=True):
        groups[content].append(cell)
    left_out["pictures that cannot be read"] += [cell.picture for cell in groups.pop("", [])]
    kept = set()
    for equal in groups.values():
        if len({patients[cell.picture] for cell in equal}) > 1:
            left_out["equal pictures of two patients"] += [cell.picture for cell in equal]
        elif len({cell.label for cell in equal}) > 1:
            left_out["equal pictures under two classes"] += [cell.picture for cell in equal]
        else:
            kept.add(equal[0])
            left_out["copies of another picture"] += [cell.picture for cell in equal[1:]]
    return [cell for cell in cells if cell in kept]


# --- tables ---------------------------------------------------------------------------------------


def _names(pictures: list[str]) -> dict[str, str]:
    """Picture -> its name in the data set: its path without the folders that all have in common."""
    common = os.path.commonpath([PurePosixPath(each).parent for each in pictures]) if pictures else ""
    return {each: PurePosixPath(each).relative_to(common).as_posix() for each in pictures}


def _filled(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns of patients, diagnoses and sites that are empty."""
    return table.drop(columns=[one for one in _FACTS if one in table and not (table[one] != "").any()])


def _smears(
    pictures: list[str], names: Mapping[str, str], of: Mapping[str, tuple[str, str, str]]
) -> pd.DataFrame:
    patient, label, site = zip(*(of[picture] for picture in pictures), strict=True)
    image = [names[picture] for picture in pictures]
    ids = [str(PurePosixPath(name).with_suffix("")) for name in image]
    ids = ids if len(set(ids)) == len(ids) else image
    facts = {"patient": patient, "site": site}
    return _filled(pd.DataFrame({"id": ids, "imgName": image, "label": label} | facts, dtype=object))


def _cells(
    cells: list[Cell],
    classes: Mapping[str, tuple[Meaning | None, int]],
    names: Mapping[str, str],
    of: Mapping[str, tuple[str, str, str]] | None,
) -> pd.DataFrame:
    """The table of cells; `of` is given for pictures of single cells."""
    given = [cell.name for cell in cells]
    ids = given if all(given) and len(set(given)) == len(given) else [str(n + 1) for n in range(len(cells))]
    meanings = [classes[cell.label][0] or Meaning("") for cell in cells]
    image = [names[cell.picture] for cell in cells]
    columns: dict[str, list[str]] = {"id": ids}
    if of is None:
        stems = [str(PurePosixPath(name).with_suffix("")) for name in names.values()]
        plain = len(set(stems)) == len(stems)
        columns["wsi"] = [str(PurePosixPath(name).with_suffix("")) if plain else name for name in image]
        columns["bbox"] = [str(np.rint(cell.box or (0, 0, 0, 0)).astype(int).tolist()) for cell in cells]
    else:
        columns["imgName"] = image
        facts = [of[cell.picture] for cell in cells]
        columns |= {what: [one[place] for one in facts] for place, what in enumerate(_FACTS)}
    columns["cellType"] = [literal(meaning.cell_type) for meaning in meanings]
    columns["specialCharacteristics"] = [
        literal(cell.characteristics or meaning.characteristics)
        for cell, meaning in zip(cells, meanings, strict=True)
    ]
    columns["objectType"] = [literal(meaning.object_type) for meaning in meanings]
    return _filled(pd.DataFrame(columns, dtype=object))


# --- writing --------------------------------------------------------------------------------------


def write(plan: Plan, folder: Path, *, copy: bool) -> None:
    """Write a data set: whole, or not at all.

    Args:
        plan: what is written.
        folder: new, or empty.
        copy: copy the pictures; False: make relative links to them.

    Raises:
        ExchangeError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ExchangeError(f"{folder} is not empty, and nothing is overwritten. Choose another folder.")
    part = folder.with_name(folder.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    place: Callable[[Path, Path], object] = shutil.copyfile if copy else _link
    for name, picture in progress(plan.pictures.items(), "pictures", len(plan.pictures)):
        target = part / plan.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        place((plan.root / picture).resolve(), target)
    if not plan.smears.empty:
        write_table(part / SMEARS_FILE, plan.smears)
    if not plan.cells.empty:
        write_table(part / CELLS_FILE, plan.cells)
    if folder.exists():
        folder.rmdir()
    part.rename(folder)


def _link(source: Path, target: Path) -> None:
    """A relative link at `target` to `source`."""
    target.symlink_to(os.path.relpath(source, target.parent.resolve()))
