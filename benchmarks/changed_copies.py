"""Changed copies of real pictures: how many are missed, by kind of change, and how many pairs are false.

Usage: python benchmarks/changed_copies.py FOLDER ... [--pictures 125]

Each FOLDER holds pictures, also in folders below it. If it is a data set with boxes, its cells are cut out,
too, and searched among each other. Of each kind, `--pictures` are drawn evenly and changed
in each of the ways of `CHANGES`. A changed copy is searched among all pictures of its kind.
Results go to benchmarks/results/changed_copies.json, by the name of the folder.
"""

import argparse
import io
import json
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from record import ROOT, commit, machine
from scale import read_csv

from aplsmear.data.copies import fingerprint, same_pictures
from aplsmear.files import write_json
from aplsmear.images.reading import Rgb, is_picture_name, read_image
from aplsmear.progress import progress

RESULTS = ROOT / "benchmarks" / "results" / "changed_copies.json"
Change = Callable[[Rgb], Rgb]
Part = tuple[Path, tuple[int, ...]]  # a picture; y0, x0, y1, x1 of a cell in it, or ()


def saved(rgb: Rgb, form: str, **options: Any) -> Rgb:
    """A picture after it was written to a file and read again."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form, **options)
    return np.asarray(Image.open(file).convert("RGB"))


def cut(rgb: Rgb, top: float = 0, left: float = 0, bottom: float = 0, right: float = 0) -> Rgb:
    """A picture without its edges: shares of its height and width."""
    height, width = rgb.shape[:2]
    return rgb[
        round(top * height) : height - round(bottom * height),
        round(left * width) : width - round(right * width),
    ]


def resized(rgb: Rgb, high: float, wide: float) -> Rgb:
    """A picture of other height and width: factors."""
    how = cv2.INTER_AREA if high < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(rgb, None, fx=wide, fy=high, interpolation=how), dtype=np.uint8)


def with_scale_bar(rgb: Rgb) -> Rgb:
    """A picture with a white bar in its lower right corner."""
    marked = rgb.copy()
    height, width = rgb.shape[:2]
    marked[-height // 10 : -height // 24, -width // 3 : -width // 32] = 255
    return marked


CHANGES: dict[str, Change] = {
    "as it is": lambda rgb: rgb,
    "WebP, quality 80": lambda rgb: saved(rgb, "WEBP", quality=80),
    "JPEG, quality 30": lambda rgb: saved(rgb, "JPEG", quality=30),
    "half the size": lambda rgb: resized(rgb, 0.5, 0.5),
    "larger, other proportions": lambda rgb: resized(rgb, 1.46, 1.56),
    "cut: 3 % of two sides": lambda rgb: cut(rgb, 0.03, 0.03),
    "cut: 8 % of the left": lambda rgb: cut(rgb, left=0.08),
    "cut: 10 % of the bottom": lambda rgb: cut(rgb, bottom=0.1),
    "cut: 8 % of two sides": lambda rgb: cut(rgb, 0.08, right=0.08),
    "cut: 8 % of four sides": lambda rgb: cut(rgb, 0.08, 0.08, 0.08, 0.08),
    "cut: 6 % of left and right": lambda rgb: cut(rgb, left=0.06, right=0.06),
    "negative": lambda rgb: 255 - rgb,
    "red and blue exchanged": lambda rgb: rgb[:, :, ::-1],
    "scale bar": with_scale_bar,
    "brighter": lambda rgb: np.clip(rgb * 1.1 + 9, 0, 255).astype(np.uint8),
    "grey": lambda rgb: np.repeat(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2),
    "turned, cut, JPEG": lambda rgb: saved(
        np.ascontiguousarray(np.rot90(cut(rgb, 0.02, 0.01, 0.01))), "JPEG", quality=60
    ),
} | {
    f"{'mirrored, ' if turn >= 4 else ''}turned by {turn % 4 * 90}": (
        lambda rgb, turn=turn: np.rot90(rgb[:, ::-1] if turn >= 4 else rgb, turn % 4)
    )
    for turn in range(1, 8)
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--pictures", type=int, default=125)
    asked = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for folder in asked.folders:
        paths = [path for path in sorted(folder.rglob("*")) if is_picture_name(path.name)]
        for kind, parts in (("pictures", [(path, ()) for path in paths]), ("cells", cells_of(folder))):
            if parts:
                name = f"{'/'.join(folder.resolve().parts[-2:])}, {kind}"
                found[name] = {"machine": machine(), "commit": commit()} | searched(parts, asked.pictures)
                print(f"{name}: {json.dumps(found[name])}", flush=True)
    write_json(RESULTS, found)


def cells_of(folder: Path) -> list[Part]:
    """The cells of a data set: the path of a smear and a box. Empty for other folders."""
    if not (folder / "wsi.csv").is_file():
        return []
    smears = read_csv(folder / "wsi.csv").set_index("id")["imgName"]
    cells = read_csv(folder / "labeled_cells.csv")
    cells = cells[cells["bbox"] != ""].sort_values("wsi", kind="stable")
    boxes = (tuple(round(side) for side in json.loads(box)) for box in cells["bbox"])
    return [(folder / "wsi" / smears[wsi], box) for wsi, box in zip(cells["wsi"], boxes, strict=True)]


@lru_cache(maxsize=1)
def whole(path: Path) -> Rgb:
    return read_image(path)


def picture(part: Part) -> Rgb:
    """A whole picture, or the cell in a box of it."""
    path, box = part
    rgb = whole(path)
    y0, x0, y1, x1 = box or (0, 0, *rgb.shape[:2])
    return rgb[y0:y1, x0:x1]


def searched(parts: list[Part], wanted: int) -> dict[str, Any]:
    """How many changed copies of some pictures are missed among all pictures, and how many pairs are false.

    Returns:
        ``pictures``, of which ``changed`` were changed; ``pairs`` of them before any change; ``copies``, of
        which ``missed`` were not found, by kind of change; and ``false``: pairs of a copy and a picture that
        is neither its original nor a pair of it.
    """
    every = [fingerprint(picture(part)) for part in progress(parts, "pictures", len(parts))]
    chosen = np.unique(np.linspace(0, len(every) - 1, min(wanted, len(every))).round().astype(int)).tolist()
    pairs = same_pictures(every)
    alike = {place: {place} for place in chosen}
    for one, other in [*pairs, *(pair[::-1] for pair in pairs)]:
        alike.get(one, set()).add(other)
    missed, false = Counter[str](), 0
    for kind, change in CHANGES.items():
        copies = [fingerprint(np.ascontiguousarray(change(picture(parts[place])))) for place in chosen]
        matches: dict[int, set[int]] = {place: set() for place in chosen}
        for one, other in same_pictures(copies, every):
            matches[chosen[one]].add(other)
        missed[kind] = sum(not matches[place] & alike[place] for place in chosen)
        false += sum(len(matches[place] - alike[place]) for place in chosen)
    return {
        "pictures": len(every), "changed": len(chosen), "pairs": len(pairs),
        "copies": len(chosen) * len(CHANGES), "missed": dict(+missed), "false": false,
    }  # fmt: skip


if __name__ == "__main__":
    main()
