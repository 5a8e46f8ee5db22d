"""Turns annotations and pictures of other programs into a data set of this layout."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from aplsmear.compute.engine import HERE
from aplsmear.data.boxes import numbers_of, overlaps
from aplsmear.data.copies import pixel_hash
from aplsmear.data.csvfile import read_all
from aplsmear.data.labels import parse_labels
from aplsmear.data.schema import CELL_FOLDER, CELLS_FILE, IMAGE_FOLDER, SMEARS_FILE, Facts
from aplsmear.errors import brief
from aplsmear.exchange.classes import Meaning, diagnosis_literal, literal, meaning_of
from aplsmear.exchange.found import CELL_LABELS, Cell, ExchangeError, Found, exported_class
from aplsmear.exchange.readers import columns_of
from aplsmear.files import whole_folder
from aplsmear.images.reading import ImageError, read_image
from aplsmear.progress import progress
from aplsmear.tables import SEPARATOR, write_table
from aplsmear.words import named

_LARGEST = 10**9  # px; no picture is as large
_FACTS = ("patient", "diagnosis", "site")
_OPTIONAL = (*_FACTS, *CELL_LABELS)  # columns


@dataclass
class Plan:
    """What will be written."""

    what: str  # what the source is
    root: Path  # folder of the pictures
    folder: str  # `wsi` or `cells`, the folder of the layout that will hold them
    pictures: dict[str, str]  # name in that folder -> path below `root`
    smears: pd.DataFrame  # the table wsi.csv; empty for pictures of single cells
    cells: pd.DataFrame  # the table labeled_cells.csv
    classes: dict[str, tuple[Meaning | None, int]]  # -> meaning (None: unknown), number of cells
    left_out: dict[str, list[str]]  # what was left out and why -> names


@dataclass(frozen=True)
class FactSources:
    """Where patient, diagnosis and site of a picture are from."""

    pattern: str | None = None  # a regular expression; its group in the path of a picture is the patient
    table: Path | None = None  # CSV file with a row for each picture or each patient
    columns: Mapping[str, str] = field(default_factory=dict)  # what a column of `table` holds -> its title
    diagnosis: str | None = None  # of all, or a regular expression: its group in the path is the diagnosis


def planned(
    found: Found, root: Path, known: Mapping[str, Meaning], facts: FactSources, *, keep_unknown: bool
) -> Plan:
    """The data set that annotations become.

    Pictures of single cells are decoded: one that cannot be read, and one that is there twice, is left out.

    Args:
        found: the annotations.
        root: folder of their pictures.
        known: plain name of a class -> its labels.
        facts: where patients and diagnoses are from.
        keep_unknown: an unknown class becomes a type of cell of the same name.

    Raises:
        ExchangeError: patients or diagnoses are not found or unknown, or nothing is left.
    """
    left_out = defaultdict(list, found.left_out)
    cells = found.cells
    single = bool(cells) and all(cell.box is None for cell in cells)
    of = facts_of(found, facts)
    if single:
        cells = _usable(cells, of, root, left_out)
    if not (cells if single else found.pictures):
        why = "; ".join(f"{len(listed):,} {what}" for what, listed in left_out.items() if listed)
        raise ExchangeError(f"{found.what}: nothing is left to import. {why}")
    if far := [cell.picture for cell in cells if cell.box and max(map(abs, cell.box)) >= _LARGEST]:
        raise ExchangeError(f"Boxes with numbers above {_LARGEST:,} px are no boxes: in {named(far)}.")
    classes = _meanings(cells, known, keep_unknown)
    used = sorted({cell.picture for cell in cells} if single else set(found.pictures))
    names = _names(used)
    of = _with_ids(of, names)
    return Plan(
        what=found.what,
        root=root,
        folder=CELL_FOLDER if single else IMAGE_FOLDER,
        pictures={name: picture for picture, name in names.items()},
        smears=pd.DataFrame() if single else _smears(names, of),
        cells=_cells(cells, classes, names, of, single),
        classes=classes,
        left_out={why: listed for why, listed in left_out.items() if listed},
    )


def updated(found: Found, folder: Path, known: Mapping[str, Meaning], *, keep_unknown: bool) -> Plan:
    """A data set in `folder`, with the classes that annotations give to its cells; arguments as of `planned`.

    An annotation belongs to the cell whose box it overlaps most (intersection over union of at least half).
    The paths of annotated pictures start at the data set's folder of pictures. The plan has all smears and
    cells, and differs from the data set in the labels of annotated cells only.

    Raises:
        ExchangeError: the data set has no boxes.
        DataSetError: a table cannot be read.
    """
    smears, cells = (read_all(folder / name) for name in (SMEARS_FILE, CELLS_FILE))
    if not {"id", "wsi", "bbox"} <= set(cells.columns) or not {"id", "imgName"} <= set(smears.columns):
        raise ExchangeError(
            f"{folder} has no cells with boxes in smears, so no annotation can belong to one."
        )
    titles = list(CELL_LABELS)
    texts = cells.reindex(columns=titles, fill_value="").to_numpy(str).astype(object)
    smear = dict(zip(smears["imgName"], smears["id"], strict=True))
    boxes = np.array([numbers_of(text) or (0, 0, 0, 0) for text in cells["bbox"]], float).reshape(-1, 4)
    rows = {str(one): np.asarray(each) for one, each in cells.groupby("wsi").indices.items()}
    classes = _meanings(found.cells, known, keep_unknown)
    left_out = defaultdict(list, found.left_out)
    for cell in found.cells:
        meaning, box = classes[cell.label][0], cell.box
        near = rows.get(str(smear.get(cell.picture)), np.zeros(0, np.int64))
        overlap = overlaps(boxes[near], np.array(box)) if box else np.zeros(0)
        if not overlap.size or overlap.max() < 0.5:
            left_out[f"boxes that are no cell of {folder}"].append(cell.picture)
            continue
        place = int(near[overlap.argmax()])
        old = {title: SEPARATOR.join(parse_labels(texts[place, n])) for n, title in enumerate(titles)}
        if meaning and cell.label != exported_class(old):
            new = old | relabelled(old, meaning)
            texts[place] = [literal(new[title]) for title in titles]
    filled = {title: texts[:, n] for n, title in enumerate(titles) if title in cells or texts[:, n].any()}
    cells = cells.assign(**filled)
    pictures = {name: name for name in smears["imgName"]}
    kept = {why: listed for why, listed in left_out.items() if listed}
    return Plan(found.what, folder / IMAGE_FOLDER, IMAGE_FOLDER, pictures, smears, cells, classes, kept)


def _meanings(
    cells: Sequence[Cell], known: Mapping[str, Meaning], keep_unknown: bool
) -> dict[str, tuple[Meaning | None, int]]:
    """Class -> its meaning and the number of its cells."""
    counts = Counter(cell.label for cell in cells)
    found = {label: (meaning_of(label, known), count) for label, count in sorted(counts.items())}
    if not keep_unknown:
        return found
    return {label: (meaning or Meaning(label), count) for label, (meaning, count) in found.items()}


# --- patients and diagnoses -----------------------------------------------------------------------


def facts_of(found: Found, sources: FactSources) -> dict[str, Facts]:
    """What is known of each picture; an ExchangeError if it is not found, unknown, or there twice."""
    of = {picture: Facts() for picture in found.pictures}
    for what in ("patient", "diagnosis"):
        pairs = {(cell.picture, getattr(cell, what)) for cell in found.cells if getattr(cell, what)}
        _refuse_repeated(found.what, what, [picture for picture, _ in pairs])
        for picture, value in pairs:
            setattr(of[picture], what, value)
    if sources.pattern is not None:
        for picture, patient in _matched("--patient", sources.pattern, of).items():
            of[picture].patient = patient
    if sources.table is not None:
        _from_table(of, sources.table, sources.columns)
    if sources.diagnosis:
        pattern = "(" in sources.diagnosis
        found_in = _matched("--diagnosis", sources.diagnosis, of) if pattern else {}
        for picture, fact in of.items():
            fact.diagnosis = found_in.get(picture, sources.diagnosis)
    literals = {text: diagnosis_literal(text) for text in {fact.diagnosis for fact in of.values()}}
    if unknown := sorted(text for text, one in literals.items() if one is None):
        raise ExchangeError(
            f"Unknown diagnoses: {named(unknown)}. Write healthy, aml or apl, or as in {{'aml', 'm2'}}."
        )
    for fact in of.values():
        fact.diagnosis = literals[fact.diagnosis] or ""
    return of


def _refuse_repeated(where: str, what: str, keys: Iterable[str]) -> None:
    """Raise ExchangeError if a key is there twice."""
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ExchangeError(f"{where}: more than one {what} for {named(twice)}. Correct the table.")


def _matched(option: str, pattern: str, pictures: Iterable[str]) -> dict[str, str]:
    """Picture -> the first group of a pattern in its path."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ExchangeError(f"{option} {pattern!r} is no regular expression: {brief(error)}.") from error
    if not compiled.groups:
        raise ExchangeError(f"{option} {pattern!r} needs a group in brackets, such as '([^/]+)/[^/]+$'.")
    found = {picture: compiled.search(picture) for picture in pictures}
    if wrong := [picture for picture, match in found.items() if match is None or not match[1]]:
        raise ExchangeError(f"{option} {pattern!r} finds nothing in {len(wrong):,} paths: {named(wrong)}.")
    return {picture: match[1] for picture, match in found.items() if match}


def _from_table(of: dict[str, Facts], path: Path, given: Mapping[str, str]) -> None:
    """Fill in what a table has of each picture, or of each patient if it names no pictures."""
    table = read_all(path)
    columns = columns_of(list(table.columns), given, path)
    if path.name == SMEARS_FILE:  # of this layout
        columns |= {"name": "id", "diagnosis": "label"}
    key = "picture" if "picture" in columns else "patient"
    facts = [what for what in (*_FACTS, "name") if columns.get(what) in table.columns and what != key]
    if key not in columns or not facts:
        raise ExchangeError(
            f"{path} needs a column of pictures or patients, and one of diagnoses, patients or sites; it has "
            f"{named(table.columns, 12)}. Name them: --column patient=TITLE --column diagnosis=TITLE."
        )
    used = table[[columns[key], *(columns[what] for what in facts)]].drop_duplicates()
    _refuse_repeated(str(path), "row", [name for name in used[columns[key]] if name])
    rows = {row[columns[key]]: row for row in used.to_dict("records")}
    missing, pictures = [], defaultdict(list)
    for picture, fact in of.items():
        keys = _ends(picture) if key == "picture" else [fact.patient]
        found = next((one for one in keys if one in rows), None)
        if found is None:
            missing.append(fact.patient if key == "patient" and fact.patient else picture)
            continue
        pictures[found].append(picture)
        for what in facts:
            setattr(fact, what, rows[found][columns[what]] or getattr(fact, what))
    twice = [some for some in pictures.values() if len(some) > 1]
    if twice and key == "picture":
        raise ExchangeError(f"{path} has one row for {named(twice[0])}. Write their folders, too.")
    if missing:
        how = "" if key == "picture" else " (--patient says where their names are)"
        raise ExchangeError(f"{path} has no row for some {key}s{how}: {named(missing)}.")


def _ends(picture: str) -> list[str]:
    """The ways in which a table can name a picture: with all its folders, with fewer, without its ending."""
    parts = PurePosixPath(picture).parts
    return ["/".join(parts[start:]) for start in range(len(parts))] + [PurePosixPath(picture).stem]


def _with_ids(of: Mapping[str, Facts], names: Mapping[str, str]) -> dict[str, Facts]:
    """The same with an id for each smear: of the table, else the name without its ending."""
    given = [of[picture].name for picture in names]
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names.values()]
    options = (given if all(given) else [], stems, list(names.values()))
    ids = next(one for one in options if one and len(set(one)) == len(one))
    return {picture: replace(of[picture], name=name) for picture, name in zip(names, ids, strict=True)}


# --- pictures of single cells ---------------------------------------------------------------------


def _content(path: Path) -> str:
    """The hash of the pixels of a picture; '' if it cannot be read."""
    try:
        return pixel_hash(read_image(path))
    except ImageError:
        return ""


def _usable(
    cells: list[Cell], of: Mapping[str, Facts], root: Path, left_out: dict[str, list[str]]
) -> list[Cell]:
    """Cells whose picture can be read and is there once, or the first of equal ones."""
    paths = [(root / cell.picture).absolute() for cell in cells]  # a worker may be in another folder
    contents = list(progress(HERE.map(_content, paths), "pictures", len(paths)))
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell, content in zip(cells, contents, strict=True):
        groups[content].append(cell)
    left_out["pictures that cannot be read"] += [cell.picture for cell in groups.pop("", [])]
    kept = []
    for equal in groups.values():
        if len({of[cell.picture].patient for cell in equal}) > 1:
            left_out["equal pictures of two patients"] += [cell.picture for cell in equal]
        elif len({cell.label for cell in equal}) > 1:
            left_out["equal pictures under two classes"] += [cell.picture for cell in equal]
        else:
            kept.append(equal[0])
            left_out["copies of another picture"] += [cell.picture for cell in equal[1:]]
    return kept


# --- tables ---------------------------------------------------------------------------------------


def _names(pictures: list[str]) -> dict[str, str]:
    """Picture -> its name in the data set: its path without the folders that all have in common."""
    common = os.path.commonpath([PurePosixPath(each).parent for each in pictures]) if pictures else ""
    return {each: PurePosixPath(each).relative_to(common).as_posix() for each in pictures}


def _filled(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns that may be absent and are empty."""
    return table.drop(columns=[one for one in _OPTIONAL if one in table and not (table[one] != "").any()])


def _smears(names: Mapping[str, str], of: Mapping[str, Facts]) -> pd.DataFrame:
    facts = {picture: of[picture] for picture in names}
    rows = [(one.name, names[each], one.diagnosis, one.patient, one.site) for each, one in facts.items()]
    return _filled(pd.DataFrame(rows, columns=["id", "imgName", "label", "patient", "site"], dtype=object))


def _cells(
    cells: list[Cell],
    classes: Mapping[str, tuple[Meaning | None, int]],
    names: Mapping[str, str],
    of: Mapping[str, Facts],
    single: bool,
) -> pd.DataFrame:
    given = [cell.attributes.get("id", "") for cell in cells]
    ids = given if all(given) and len(set(given)) == len(given) else [str(n + 1) for n in range(len(cells))]
    facts = [of[cell.picture] for cell in cells]
    columns: dict[str, list[str]] = {"id": ids}
    if single:
        columns["imgName"] = [names[cell.picture] for cell in cells]
        columns |= {what: [getattr(one, what) for one in facts] for what in _FACTS}
    else:
        columns["wsi"] = [one.name for one in facts]
        columns["bbox"] = [str(np.rint(cell.box or (0, 0, 0, 0)).astype(int).tolist()) for cell in cells]
    labels = [_labels(cell, classes[cell.label][0] or Meaning("")) for cell in cells]
    columns |= {column: [literal(one.get(column, "")) for one in labels] for column in CELL_LABELS}
    return _filled(pd.DataFrame(columns, dtype=object))


def _labels(cell: Cell, meaning: Meaning) -> dict[str, str]:
    """The labels of a cell by column. A class other than the one that an export wrote is a correction."""
    written = {column: cell.attributes.get(column, "") for column in CELL_LABELS}
    if cell.label == exported_class(written):
        return meaning._asdict() | dict(cell.attributes)
    return written | relabelled(written, meaning)


def relabelled(old: Mapping[str, str], meaning: Meaning) -> dict[str, str]:
    """The labels of a cell by column, after a person has given it another class.

    A class without a characteristic leaves the old ones. A class that is only a characteristic (Auer rods)
    leaves the old type.
    """
    new = meaning._asdict()
    if not meaning.specialCharacteristics:
        new["specialCharacteristics"] = old["specialCharacteristics"]
    elif not meaning.cellType:
        new["cellType"] = old["cellType"]
    return new


# --- writing --------------------------------------------------------------------------------------


def write(plan: Plan, folder: Path, *, copy: bool) -> None:
    """Write a data set: whole, or not at all.

    The pictures are copied, or get relative links. A UserError if the folder holds something.
    """
    with whole_folder(folder) as part:
        for name, picture in progress(plan.pictures.items(), "pictures", len(plan.pictures)):
            source, target = (plan.root / picture).resolve(), part / plan.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copyfile(source, target)
            else:
                target.symlink_to(os.path.relpath(source, target.parent.resolve()))
        for name, table in ((SMEARS_FILE, plan.smears), (CELLS_FILE, plan.cells)):
            if not table.empty:
                write_table(part / name, table)
