"""What a source is: annotations of a known kind, folders of single-cell pictures, or a published layout."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from aplsmear.data.csvfile import read_all
from aplsmear.data.schema import CELLS_FILE, SMEARS_FILE
from aplsmear.exchange.classes import Meaning, plain
from aplsmear.exchange.found import Cell, ExchangeError, Found, Pictures, json_of
from aplsmear.exchange.readers import READERS, Request, columns_of, form_of, text_kind
from aplsmear.words import named

ClassFrom = Literal["folder", "above", "name", "none"]
_CLASS_FILES = {"classes.txt", "obj.names", "readme.txt", "requirements.txt"}
_MASTER = "master.csv"  # of the DeepAPL layout


def kinds_of(source: Path) -> dict[str, list[Path]]:
    """Kind of annotations -> its files, in a source that is a file or a folder; empty if there are none.

    Raises:
        ExchangeError: there is no such source, or it is a data set of this layout already.
    """
    if not source.exists():
        raise ExchangeError(f"There is no {source}.")
    if source.is_file():
        kind = "csv" if source.suffix.lower() == ".csv" else _kind_of(source)  # its columns may be named
        if not kind:
            raise ExchangeError(
                f"{source} is of no known kind. Known: {', '.join(READERS)}, folders of pictures."
            )
        return {kind: [source]}
    if (source / CELLS_FILE).exists() or (source / SMEARS_FILE).exists():
        raise ExchangeError(f"{source} is a data set of this layout already: `aplsmear check {source}`.")
    if _master(source):
        return {"deepapl": []}
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in (".xml", ".json", ".geojson", ".csv", ".txt") and path.is_file():
            files[path.suffix.lower()].append(path)
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files.pop(".csv", []):
        found[_kind_of(path)].append(path)
    for paths in files.values():
        kind = next(filter(None, map(_kind_of, paths)), "")
        found[kind] += [path for path in paths if path.name.lower() not in _CLASS_FILES]
    found.pop("", None)
    return dict(found)


def _kind_of(path: Path) -> str:
    """The kind of a file of annotations; '' if it is of none."""
    suffix = path.suffix.lower()
    if path.name.lower() in _CLASS_FILES:
        return ""
    if suffix == ".xml":
        return "voc"
    if suffix in (".json", ".geojson"):
        return _json_kind(json_of(path))
    if suffix == ".csv":
        columns = columns_of(list(read_all(path).columns), {}, path)
        return "csv" if form_of(columns) or {"picture", "label"} <= columns.keys() else ""
    return text_kind(path) if suffix == ".txt" else ""


def _json_kind(content: Any) -> str:
    first = content[0] if isinstance(content, list) and content else content
    if not isinstance(first, dict):
        return ""
    if first.get("type") in ("Feature", "FeatureCollection"):
        return "geojson"
    keys = {"coco": {"images", "annotations"}, "labelme": {"shapes", "imagePath"}, "label-studio": {"data"}}
    return next((kind for kind, needed in keys.items() if needed <= first.keys()), "")


def read_source(
    source: Path,
    known: Mapping[str, Meaning],
    *,
    kind: str | None = None,
    images: Path | None = None,
    columns: Mapping[str, str] | None = None,
    size: float | None = None,
    class_from: ClassFrom | None = None,
    cohort: str | None = None,
    unsigned: bool = False,
) -> tuple[Found, Path]:
    """The annotations of a source.

    Args:
        source: a file or a folder.
        known: the known classes, which tell from which part of a path the class is.
        kind: a key of `READERS`; needed only if a folder holds several kinds.
        images: the folder of the pictures; None: the source, or the folder of the file.
        columns: what a column of a CSV file holds -> its title.
        size: px, side of the box around a point.
        class_from: the part of a path that is the class of a single-cell picture; None: where most classes
            are known.
        cohort: of the DeepAPL layout; None: all.
        unsigned: also take the slides that nobody has signed (DeepAPL).

    Returns:
        The annotations, and the folder that the paths of their pictures start at.

    Raises:
        ExchangeError: they cannot be read, or several kinds are there.
        DataSetError: a CSV file cannot be read.
    """
    kinds = kinds_of(source)
    if kind and kind not in kinds:
        raise ExchangeError(f"{source} holds no {kind}; it holds {', '.join(kinds) or 'pictures only'}.")
    if not kind and len(kinds) > 1:
        listed = "; ".join(f"{one} ({named(path.name for path in paths)})" for one, paths in kinds.items())
        raise ExchangeError(
            f"{source} holds several kinds of annotations: {listed}. Choose one with --format."
        )
    chosen = kind or next(iter(kinds), "")
    pictures = Pictures(images or (source if source.is_dir() else source.parent))
    if not pictures.every:
        raise ExchangeError(
            f"{pictures.root} holds no pictures (PNG, JPEG or TIFF). Name their folder: --images."
        )
    if chosen == "deepapl":
        return _deepapl(source, pictures, cohort, unsigned), pictures.root
    if cohort or unsigned:
        raise ExchangeError(f"--cohort and --unsigned are for the layout of DeepAPL; {source} is none.")
    if not chosen:
        return _crops(pictures, known, class_from), pictures.root
    found = READERS[chosen](Request(source, kinds[chosen], pictures, size, columns or {}))
    pictures.check(source)
    return found, pictures.root


def _class_in(path: PurePosixPath, part: ClassFrom) -> str:
    """The class of a single-cell picture, from a part of its path; '' for ``none``."""
    if part == "folder":
        return path.parent.name
    if part == "above":
        return path.parent.parent.name
    return re.sub(r"[\W_]*\d.*", "", path.stem) if part == "name" else ""


def _crops(pictures: Pictures, known: Mapping[str, Meaning], wanted: ClassFrom | None) -> Found:
    """Folders of single-cell pictures: the class is a folder, or the start of the name."""
    paths = [PurePosixPath(each) for each in pictures.every]

    def share(one: ClassFrom) -> float:
        return sum(plain(_class_in(path, one)) in known for path in paths) / len(paths)

    where: dict[ClassFrom, str] = {
        "folder": "from the folder", "above": "from the folder above", "name": "from the name of the file",
    }  # fmt: skip
    part: ClassFrom = wanted if wanted is not None else max(where, key=share)
    cells = [Cell(str(path), _class_in(path, part)) for path in paths]
    return Found(
        f"pictures of single cells, class {where.get(part, 'not given')}", list(pictures.every), cells
    )


# --- DeepAPL --------------------------------------------------------------------------------------


def _master(source: Path) -> Path | None:
    """The table of patients of a folder in the layout of DeepAPL (Sidhom et al. 2021); None if it is none."""
    places = (source, source / "Data")
    return next(
        (one / _MASTER for one in places if (one / _MASTER).is_file() and (one / "All").is_dir()), None
    )


def _deepapl(source: Path, pictures: Pictures, cohort: str | None, unsigned: bool) -> Found:
    """``Data/All/<patient>/[<id or date>/]Signed slides/<class>/<name>.jpg``, and ``Data/master.csv``."""
    path = _master(source) or source
    table = read_all(path)
    if missing := [title for title in ("Patient_ID", "Diagnosis", "Cohort") if title not in table.columns]:
        raise ExchangeError(f"{path} has no column {missing[0]}.")
    cohorts = sorted(set(table["Cohort"]))
    if cohort and cohort not in cohorts:
        raise ExchangeError(f"{path} has no cohort {cohort!r}; it has {named(cohorts)}.")
    chosen = table if cohort is None else table[table["Cohort"] == cohort]
    diagnoses = dict(zip(chosen["Patient_ID"], chosen["Diagnosis"], strict=True))
    slides = "signed and unsigned" if unsigned else "signed"
    found = Found(f"DeepAPL, {cohort or 'all cohorts'}: {len(diagnoses):,} patients, {slides} slides")
    for each in pictures.every:
        parts = PurePosixPath(each).parts
        place = parts.index("All") + 1 if "All" in parts else len(parts)
        patient = parts[place] if place < len(parts) - 1 else ""
        signed, free = "Signed slides" in parts, "Unsigned slides" in parts
        why = _why_not(patient, diagnoses, set(table["Patient_ID"]), signed or (free and unsigned), free)
        if why:
            found.left_out[why].append(each)
            continue
        label = parts[-2] if signed and parts[-2] != "Signed slides" else ""
        found.pictures.append(each)
        found.cells.append(Cell(each, label, patient=patient, diagnosis=diagnoses[patient]))
    counts = Counter(cell.patient for cell in found.cells)
    found.left_out["patients of master.csv without pictures"] += [one for one in diagnoses if not counts[one]]
    return found


def _why_not(
    patient: str, diagnoses: Mapping[str, str], every: Collection[str], wanted: bool, free: bool
) -> str:
    """Why a picture of the DeepAPL layout is left out; '' if it is not."""
    if patient not in diagnoses:
        return "pictures of another cohort" if patient in every else "pictures of patients outside master.csv"
    if not wanted:
        return "pictures of unsigned slides" if free else "pictures outside the folders of slides"
    return ""
