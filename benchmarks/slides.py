"""How well `aplsmear fields` finds fields with one sharp layer of cells, and what a large slide costs.

Usage: python benchmarks/slides.py [--cells DIR ...] [--large] [--draw FILE]

It composes slides of known regions from pictures of cells: one layer; clumps (three pictures over each other:
their transmittances multiply); one layer out of focus; empty glass. The pictures are drawn, and with --cells
those of DIR/images or DIR/wsi. It counts how many of the fields lie in regions of one layer, and how many of
as many squares drawn by lot do. --large: only a pyramid of 100,000 x 80,000 px, its time and memory (Linux).
--draw: only write a small drawn slide to FILE. Results: benchmarks/results/slides.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from record import ROOT, commit, machine

from aplsmear.files import write_json
from aplsmear.images.reading import read_image
from aplsmear.sources.cell_size import lengths, ruler
from aplsmear.sources.drawn import draw_smear, generator, sample_patient
from aplsmear.sources.fields import choose_fields
from aplsmear.sources.slide import open_slide

RESULTS = ROOT / "benchmarks" / "results" / "slides.json"
MICROMETRES = 7.5  # diameter of a red cell, from which the resolution of the pictures is known
BLURS = (1.5, 2.5, 4.0)  # px, standard deviation: slightly, clearly, far out of focus
FIELDS, SIZE = 20, 1000  # px
SHARE = 0.8  # of a field that lies in regions of one layer, so that it counts as good
LARGE = (157, 196)  # tiles down and across: 80,384 x 100,352 px
SEED = 5

KINDS = ("glass", "one layer", "clumps", "blurred")
SHARES = (0.3, 0.2, 0.25, 0.25)  # of the kinds on a slide
TILE, STEP = 512, 4  # px; ratio of two levels
POOL = 16  # different tiles of each kind
CELLS = 35  # of a drawn tile
LAYERS = 3  # of cells in a clump

Rgb = npt.NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=Path, nargs="+", default=[], metavar="DIR")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--draw", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if asked.draw:
        draw(asked.draw)
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        if asked.large:
            results["large"] = large(Path(folder))
            print(results["large"])
        for source in () if asked.large else (None, *asked.cells):
            for blur in BLURS:
                name = f"{source.name if source else 'drawn'}, blur {blur:g} px"
                results[name] = quality(Path(folder), pictures(source), blur)
                print(name, results[name])
    write_json(RESULTS, results | {"machine": machine(), "commit": commit()})


def pictures(folder: Path | None) -> list[Rgb]:
    """Pictures of cells with one background: of a folder, or drawn of one patient."""
    if folder is None:
        patient = sample_patient("apl", generator(SEED))
        size = (TILE, TILE)
        return [draw_smear(patient, generator(SEED, n), size, CELLS).image for n in range(POOL)]
    found = [path for name in ("images", "wsi") for path in (folder / name).glob("*")]
    return [read_image(path) for path in sorted(found)[:100]]


def quality(folder: Path, sources: list[Rgb], blur: float) -> dict[str, float]:
    """How many fields of a slide lie in regions of one layer, and how many squares drawn by lot do."""
    red = ruler([lengths(one) for one in sources[:30]])
    mpp = MICROMETRES / red if red else 0.25
    kinds = regions(40, 48, 4, SEED)
    write_slide(folder / "slide.tif", pool(sources, blur, SEED), kinds, mpp)
    with open_slide(folder / "slide.tif") as slide:
        start = time.process_time()
        fields = choose_fields(slide, FIELDS, slide.mpp or mpp, SIZE).fields
        seconds = time.process_time() - start
    good = np.kron(kinds == KINDS.index("one layer"), np.ones((TILE // 8, TILE // 8)))

    def hits(corners: Iterable[tuple[int, int]]) -> float:
        shares = [good[y // 8 : (y + SIZE) // 8, x // 8 : (x + SIZE) // 8].mean() for x, y in corners]
        return float(np.mean(np.array(shares) >= SHARE))

    columns, rows = (length // SIZE for length in slide.size)
    every = itertools.product(range(0, columns * SIZE, SIZE), range(0, rows * SIZE, SIZE))
    return {
        "fields": len(fields),
        "good": hits(fields[["x", "y"]].itertuples(index=False)),
        "good_by_lot": hits(every),
        "cpu_seconds": seconds,
        "micrometres_per_pixel": mpp,
    }


def large(folder: Path) -> dict[str, float]:
    """Seconds and the largest memory of `aplsmear fields` on a slide of 100,352 x 80,384 px."""
    path = folder / "large.tif"
    start = time.monotonic()
    write_slide(path, pool(pictures(None), BLURS[1], SEED), regions(*LARGE, 8, SEED), 0.25)
    made = time.monotonic()
    command = [sys.executable, "-m", "aplsmear.cli", "fields", str(path), "--to", str(folder / "out")]
    highest = ""
    with subprocess.Popen(command) as running:
        while running.poll() is None:  # ru_maxrss would count the memory of this process, too
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{running.pid}/status").read_text())
            highest = found[1] if found else highest
            time.sleep(0.2)
    if running.returncode:
        sys.exit(running.returncode)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "gigabytes": path.stat().st_size / 1e9,
        "seconds_to_write_it": made - start,
        "seconds": time.monotonic() - made,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_gb": int(highest) / 2**20,
    }


def draw(path: Path) -> npt.NDArray[np.int64]:
    """Write a small drawn slide, 4096 x 3072 px; the kind of each of its tiles."""
    kinds = regions(6, 8, 2, SEED)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_slide(path, pool(pictures(None), BLURS[2], SEED), kinds, 0.25)
    return kinds


def pool(sources: Sequence[Rgb], blur: float, seed: int) -> list[list[Rgb]]:
    """Tiles of each kind (`KINDS`), composed of pictures; `blur` is the standard deviation in px."""
    rng = np.random.default_rng(seed)
    tiles: list[list[Rgb]] = [[], [], [], []]
    glass = np.median([np.percentile(one, 97, axis=(0, 1)) for one in sources], axis=0)
    side = min(TILE, *(min(one.shape[:2]) for one in sources))
    single, others = itertools.cycle(sources), itertools.cycle(sources[::-1])
    for _ in range(POOL):
        noise = rng.normal(0, 1.5, (TILE, TILE, 1)).astype(np.float32)
        tiles[0].append(np.clip(glass + noise, 0, 255).astype(np.uint8))
        tiles[1].append(_patchwork(single, side, rng))
        layers = [_patchwork(others, side, rng) for _ in range(LAYERS)]
        light = [layer / np.percentile(layer, 97, axis=(0, 1)) for layer in layers]
        tiles[2].append(np.clip(np.prod(light, axis=0) * glass, 0, 255).astype(np.uint8))
        soft = cv2.GaussianBlur(_patchwork(others, side, rng), (0, 0), blur)
        tiles[3].append(np.clip(soft + noise, 0, 255).astype(np.uint8))
    return tiles


def _patchwork(supply: Iterator[Rgb], side: int, rng: np.random.Generator) -> Rgb:
    """A tile of pictures side by side, each cut to a square, turned and mirrored by lot."""
    tile = np.empty((TILE, TILE, 3), np.uint8)
    for y, x in itertools.product(range(0, TILE, side), repeat=2):
        one = next(supply)
        top, left = (int(rng.integers(length - side + 1)) for length in one.shape[:2])
        part = np.rot90(one[top : top + side, left : left + side], int(rng.integers(4)))
        part = part[:, :: int(rng.choice([-1, 1]))]
        tile[y : y + side, x : x + side] = part[: TILE - y, : TILE - x]
    return tile


def regions(rows: int, columns: int, block: int, seed: int) -> npt.NDArray[np.int64]:
    """The kind of each tile: blocks of `block` tiles of one kind; each kind is there."""
    rng = np.random.default_rng(seed)
    shape = math.ceil(rows / block), math.ceil(columns / block)
    kinds = rng.choice(4, shape, p=SHARES)
    kinds.flat[rng.choice(kinds.size, 4, replace=False)] = range(4)
    return np.kron(kinds, np.ones((block, block), int))[:rows, :columns]


def write_slide(path: Path, tiles: list[list[Rgb]], kinds: npt.NDArray[np.int64], mpp: float) -> None:
    """Write a pyramid (tiled BigTIFF, JPEG) tile by tile. The kinds repeat their tiles."""
    number = kinds * POOL
    for kind in range(len(KINDS)):
        places = np.flatnonzero(kinds == kind)
        number.flat[places] += np.arange(len(places)) % POOL
    pixels = [tile for of_kind in tiles for tile in of_kind]
    height, width = (length * TILE for length in kinds.shape)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(math.ceil(math.log(max(height, width) / TILE, STEP)) + 1):
            scale = STEP**level
            per_cm = 1e4 / mpp / scale
            writer.write(
                _encoded(pixels, number, level), shape=(height // scale, width // scale, 3), dtype=np.uint8,
                tile=(TILE, TILE), photometric="ycbcr", compression="jpeg", subsampling=(1, 1),
                resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", metadata=None,
                subfiletype=int(level > 0),
            )  # fmt: skip


def _encoded(pixels: list[Rgb], number: npt.NDArray[np.int64], level: int) -> Iterator[bytes]:
    """The JPEG of each tile of a level, row by row."""
    across = STEP**level
    small = max(TILE // across, 1)
    cut = [cv2.resize(one, (small, small), interpolation=cv2.INTER_AREA) for one in pixels]
    ready = [_jpeg(one) for one in cut] if level == 0 else []
    rows, columns = (math.ceil(length * TILE // across / TILE) or 1 for length in number.shape)
    for row, column in itertools.product(range(rows), range(columns)):
        part = number[row * across : (row + 1) * across, column * across : (column + 1) * across]
        if level == 0:
            yield ready[part[0, 0]]
            continue
        tile = np.full((TILE, TILE, 3), 255, np.uint8)
        for (y, x), one in np.ndenumerate(part[: TILE // small, : TILE // small]):
            tile[y * small : (y + 1) * small, x * small : (x + 1) * small] = cut[one]
        yield _jpeg(tile)


def _jpeg(tile: Rgb) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(tile, level=85, colorspace="RGB", outcolorspace="YCBCR", subsampling="444")
    )


if __name__ == "__main__":
    main()
