"""Pictures of smears and of single cells, and the boxes of cells: read once, compared and checked."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from aplsmear.compute.engine import Engine, Here
from aplsmear.data import boxes
from aplsmear.data.copies import Fingerprint, fingerprint, groups, same_boxes, same_pictures
from aplsmear.data.names import DISTINCT_FILE, declaration, image_path
from aplsmear.data.notes import Notes, listed, sorted_ids
from aplsmear.data.problems import Problem
from aplsmear.data.quality import Quality, doubts, measured
from aplsmear.data.schema import CELLS_FILE, SINGLE_CELL, Shown, leaves_folder
from aplsmear.images import reading as images
from aplsmear.progress import progress
from aplsmear.tables import BOX
from aplsmear.words import named

_NAMED = 5  # most rows named in one message
_FEW_IMAGES = 8  # checked faster in this process than by new ones


def on_disk(root: Path, names: pd.Series, shown: Shown, notes: Notes) -> pd.Series:
    """The names (`imgName`) of pictures on the disk: in another Unicode form, or case of the ending.

    A remark names the rows. Names without a file, or with two files that fit, stay as they are.
    """
    folders: dict[Path, dict[str, list[str]]] = {}
    found = {name: _file_name(root, name, shown.folder, folders) for name in names.unique()}
    other = names.map(found)
    if len(rows := names.index[names != other]):
        notes.remarks.append(
            f"pictures whose files have the names of {shown.file} but for the case of the ending, or the "
            f"Unicode form: rows {named(rows)}"
        )
    return other


def _file_name(root: Path, name: str, inside: str, folders: dict[Path, dict[str, list[str]]]) -> str:
    """The name of the one file that fits; `folders` keeps the names of folders that were listed."""
    try:
        path = root / image_path(name, inside)
        if not name or leaves_folder(name) or path.exists():
            return name
        folder = path.parent
        if folder not in folders:
            folders[folder] = defaultdict(list)
            for each in folder.iterdir():
                folders[folder][_plain_form(each.name)].append(each.name)
    except (OSError, ValueError):  # no name that a file can have; the check of the picture says so
        return name
    fitting = folders[folder].get(_plain_form(path.name), [])
    return f"{name.removesuffix(path.name)}{fitting[0]}" if len(fitting) == 1 else name


def _plain_form(name: str) -> str:
    path = Path(unicodedata.normalize("NFC", name))
    return path.stem + path.suffix.lower()


@dataclass(frozen=True)
class _Look:
    """What is kept of one image; `wrong` and `fix` if it cannot be read."""

    height: int = 0
    width: int = 0
    content: str = ""
    fingerprint: Fingerprint | None = None
    darkness: boxes.Darkness | None = None
    quality: Quality | None = None
    notes: tuple[str, ...] = ()
    levels: str = ""
    wrong: str = ""
    fix: str = ""


def _look(part: tuple[Path, boxes.Numbers], whole: bool) -> _Look:
    path, numbers = part
    try:
        data = images.image_bytes(path)
        if not whole:
            return _Look(*images.image_size(path), hashlib.sha256(data).hexdigest())
        rgb, said, levels = images.read_picture(data)
        found, dark = fingerprint(rgb), boxes.darkness(rgb, numbers) if len(numbers) else None
        return _Look(rgb.shape[0], rgb.shape[1], found.pixels, found, dark, measured(rgb), said, levels)
    except images.ImageError as error:
        return _Look(wrong=error.what, fix=error.fix)


def boxes_of(cells: pd.DataFrame) -> dict[str, boxes.Numbers]:
    """The boxes in each smear, as numbers: float64, shape (n, 4)."""
    found = cells[cells["numbers"].astype(bool)].groupby("smear")["numbers"]
    return {str(smear): np.array(given.tolist(), dtype=np.float64) for smear, given in found}


def with_images(
    root: Path,
    engine: Engine,
    whole: bool,
    skip_bad: bool,
    labelled: bool,
    notes: Notes,
    items: pd.DataFrame,
    shown: Shown,
    numbers: Mapping[str, boxes.Numbers],
) -> pd.DataFrame:
    """Add width, height and content to smears or single cells; problems and remarks go to `notes`.

    An image is decoded as a `whole`, or only its size is read. An item with a bad image is a problem; with
    `skip_bad` it is left out and listed. What a message advises depends on `labelled` (data for training).
    `numbers` are the boxes in each smear, of `boxes_of`.
    """
    none, names = np.empty((0, 4)), items[shown.item].tolist()
    parts = [(root / file, numbers.get(name, none)) for name, file in zip(names, items["file"], strict=True)]
    engine = engine if whole and len(parts) >= _FEW_IMAGES else Here(1)
    looking = engine.map(partial(_look, whole=whole), parts)
    looks = _of_same_levels(list(progress(looking, "images", len(parts)) if parts else looking))
    notes.remarks += _remarks(zip(items["image"].tolist(), looks, strict=True))
    otherwise = "set dataset.skip_bad_images in params.yaml to leave it out" if labelled else "delete its row"
    bad = {}
    for row, name, image, look in zip(items.index, names, items["image"], looks, strict=True):
        if look.wrong and skip_bad:
            bad[name] = f"{image}: {look.wrong}"
        elif look.wrong:
            expected, fix = f"a whole picture: {look.wrong}", f"{look.fix}, or {otherwise}"
            notes.problems.append(Problem(shown.file, row, "imgName", image, expected=expected, fix=fix))
    notes.left_out[f"{shown.item}s_with_bad_image"] = {"count": len(bad), "images": bad}
    kept = ("height", "width", "content", "fingerprint", "darkness")
    table = pd.DataFrame(
        {name: [getattr(look, name) for look in looks] for name in kept}, items.index, dtype=object
    )
    seen = items.assign(**table.astype({"height": int, "width": int}))
    return seen[seen["content"] != ""]


def _of_same_levels(looks: list[_Look]) -> list[_Look]:
    """Pictures whose levels were taken from their pixels, and differ from most of the others, are wrong."""
    counts = Counter(look.levels for look in looks if look.levels)
    if len(counts) < 2:
        return looks
    most, count = max(counts.items(), key=lambda one: one[::-1])
    wrong = f"it seems to use %s, but {count} other pictures {most}: one of both would be too dark"
    fix = "save all pictures as 8-bit RGB, as bright as on the screen"
    return [
        replace(look, content="", wrong=wrong % look.levels, fix=fix)
        if look.levels not in ("", most)
        else look
        for look in looks
    ]


def _remarks(looks: Iterable[tuple[str, _Look]]) -> list[str]:
    """What was decided while pictures were read, and pictures in which nothing may be seen, by name."""
    seen = [(image, look) for image, look in looks if look.quality and not look.wrong]
    found = defaultdict(list)
    for image, look in seen:
        for note in look.notes:
            found[f"pictures read so: {note}"].append(image)
    qualities = [look.quality for _, look in seen if look.quality]
    for (image, _), (doubt, figure) in zip(seen, doubts(qualities), strict=True):
        if doubt:
            found[f"pictures {doubt}"].append(f"{image} ({figure})")
    return [f"{what}: {named(sorted(names))}" for what, names in found.items()]


def without_copies(items: pd.DataFrame, shown: Shown, has_patients: bool, notes: Notes) -> pd.DataFrame:
    """Count items with the same picture as one patient, or note them if they contradict each other.

    Two smears contradict each other in patient or diagnosis; two cells in one of these, or in their type.
    """
    items = items.sort_values("content")
    images = items["image"].tolist()
    alike = same_pictures([one for one in items["fingerprint"] if one is not None])
    for places in items.reset_index().groupby("content").groups.values():
        alike += [*pairwise(places), *((places[0], place) for place in places[2:])]
    alike = [pair for pair in alike if not notes.distinct.declares("image", *(images[one] for one in pair))]
    columns = ["patient" if has_patients else "diagnosis", *(["cell_type"] if shown is SINGLE_CELL else [])]
    same = []
    for _, found in items.groupby(groups(len(items), alike)):
        if len(found) == 1:
            continue
        group = found.sort_index()
        ids = sorted_ids(group[shown.item])
        if not has_patients:
            items.loc[group.index, "patient"] = ids[0]
        if any(len(set(group[column]) - {""}) > 1 for column in columns):
            for row, image in zip(group.index.tolist(), group["image"].tolist(), strict=True):
                others = group["image"].drop(row).iloc[:_NAMED]
                rows = ", ".join(map(str, others.index))
                expected = f"a picture of its own; row {rows} has the same with another patient or label"
                fix = "delete the wrong row, or give both rows the same patient and label, or, "
                names = (one.removeprefix(f"{shown.folder}/") for one in (image, others.iloc[0]))
                fix += declaration("image", *names)
                notes.problems.append(Problem(shown.file, row, "imgName", image, expected=expected, fix=fix))
        else:
            same.append(ids)
    if shown is SINGLE_CELL and same:
        count = sum(map(len, same))
        notes.remarks.append(
            f"{count} cells have one of {len(same)} pictures: each picture is of one patient and counts more "
            f"than once, such as that of {' and '.join(same[0][:_NAMED])}"
        )
    else:
        notes.remarks += [
            f"the same picture, counted as one patient: smears {', '.join(ids)}" for ids in same
        ]
    return items.sort_index()


def as_cells(singles: pd.DataFrame, min_box: int, notes: Notes) -> pd.DataFrame:
    """Single cells with the whole picture as their box; those of a small picture are left out and listed."""
    boxed = singles.assign(smear="", y0=0, x0=0, y1=singles["height"], x1=singles["width"])
    small = (boxed[["height", "width"]] < min_box).any(axis=1)
    notes.left_out["cells_with_picture_under_min_box"] = listed(boxed["cell"][small])
    return boxed[~small]


def with_boxes(cells: pd.DataFrame, smears: pd.DataFrame, min_box: int, notes: Notes) -> pd.DataFrame:
    """Boxes as numbers, clipped to their image; cells without a box or with a small one are left out."""
    empty = cells["bbox"] == ""
    notes.left_out["cells_without_box"] = listed(cells["cell"][empty])
    cells = cells[~empty]
    numbers = np.array(cells["numbers"].tolist(), dtype=np.float64).reshape(-1, 4)
    sizes = smears.set_index("smear")[["height", "width"]].reindex(cells["smear"])
    seen = sizes["height"].notna().to_numpy()
    if _check_order(cells[seen], numbers[seen], sizes[seen].to_numpy(np.float64), smears["darkness"], notes):
        return cells.iloc[:0].assign(**dict.fromkeys(BOX, 0))
    whole = (numbers == np.rint(numbers)).all(axis=1)  # the others are noted already
    cells, box, seen = cells[whole], numbers[whole].astype(np.int64), seen[whole]
    start, end = box[:, :2], box[:, 2:]
    size = sizes[whole].fillna(np.iinfo(np.int32).max).to_numpy(dtype=np.int64)

    swapped = np.any(end < start, axis=1)
    outside = ((start >= size) | (end <= 0)).any(axis=1) & (end > start).all(axis=1) & seen
    rows, texts = cells.index.tolist(), cells["bbox"].tolist()
    for place in np.flatnonzero(swapped | outside).tolist():
        height, width = size[place].tolist()
        expected = f"a box inside its image of {height} px height and {width} px width"
        fix = "correct the box (y comes first) or the smear, or leave the box empty"
        if swapped[place]:
            expected = "y0 before y1 and x0 before x1 in [y0, x0, y1, x1]"
            fix = "correct the box, or leave it empty"
        problem = Problem(CELLS_FILE, rows[place], "bbox", texts[place], expected=expected, fix=fix)
        notes.problems.append(problem)

    inside = np.concatenate([np.clip(start, 0, size), np.clip(end, 0, size)], axis=1)
    small = (inside[:, 2:] - inside[:, :2] < min_box).any(axis=1)
    fine = ~swapped & ~outside
    notes.left_out["cells_with_box_under_min_box"] = listed(cells["cell"][small & fine])
    notes.changed["boxes_clipped"] = listed(cells["cell"][(inside != box).any(axis=1) & fine & ~small])
    clipped = pd.DataFrame(inside, index=cells.index, columns=list(BOX))
    cells = pd.concat([cells, clipped], axis=1).iloc[np.flatnonzero(fine & ~small)]
    _check_same_cells(cells, notes)
    return cells


def _check_order(
    cells: pd.DataFrame, numbers: boxes.Numbers, sizes: boxes.Numbers, dark: pd.Series, notes: Notes
) -> bool:
    """Whether all boxes together have another order or unit: one problem instead of one for each box."""
    if notes.distinct.declares("boxes", "right"):
        return False
    found = [one for one in dark if one is not None]
    whole = sum(found[1:], found[0]) if found else None
    readings = boxes.other_readings(numbers, sizes, whole)
    notes.remarks += filter(None, [] if readings else [boxes.from_one(numbers), boxes.off_nuclei(whole)])
    if not readings:
        return False
    notes.problems = [one for one in notes.problems if (one.file, one.column) != (CELLS_FILE, "bbox")]
    forms = " or ".join(f"[{order}] in {unit}" for order, unit in readings)
    right = np.rint(boxes.as_read(numbers[:1], sizes[:1], *readings[0])[0]).astype(int).tolist()
    fix = f"write all boxes as [y0, x0, y1, x1] in px: in row {cells.index[0]}, {right}"
    if len(readings) > 1:
        fix = "look which it is, and write all boxes as [y0, x0, y1, x1] in px"
    fix += f". If the boxes are right as they are, add the row `boxes,right,` to {DISTINCT_FILE}"
    expected = f"[y0, x0, y1, x1] in px; all boxes together fit only as {forms}"
    value = cells["bbox"].iloc[0]
    notes.problems.append(Problem(CELLS_FILE, None, "bbox", value, expected=expected, fix=fix))
    return True


def _check_same_cells(cells: pd.DataFrame, notes: Notes) -> None:
    """Note cells with nearly the same box: a problem if their types differ, else a remark."""
    rows, types, ids = cells.index.tolist(), cells["cell_type"].tolist(), cells["cell"].tolist()
    same = same_boxes(cells[list(BOX)].to_numpy(), cells["smear"].tolist())
    for first, second in same:
        if "" != types[first] != types[second] != "":
            expected = f"one type for one cell; row {rows[first]} has the box {cells['bbox'].iloc[first]}"
            fix = "correct the type or the box, or delete one of the rows"
            title = "cellType"
            notes.problems.append(
                Problem(CELLS_FILE, rows[second], title, types[second], expected=expected, fix=fix)
            )
    if same:
        notes.remarks.append(
            f"{len(same)} pairs of cells have nearly the same box and count twice, such as "
            + " and ".join(sorted_ids(ids[place] for place in same[0]))
        )
