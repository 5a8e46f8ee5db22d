"""How large is the page of `aplsmear view`, and how long does a browser need to open it?

Usage: python benchmarks/view.py [--smears 200] [--keep HTML]

One drawn patient with so many smears of 2560x1920 px and 60 cells each. Chromium opens the page from the disk
without a network; the time is from the start of the process to the end of it, minus that of an empty page.
Results: benchmarks/results/view.json.
"""

import argparse
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd
from record import ROOT, commit, machine

from aplsmear.data.dataset import read_data_set
from aplsmear.files import write_json
from aplsmear.prediction.view import view_page
from aplsmear.sources.drawn import draw_data_set

RESULTS = ROOT / "benchmarks" / "results" / "view.json"
DRAWN = 8  # different smears; more are links to them
CELLS = 60  # a smear
TRIES = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smears", type=int, default=200, metavar="N")
    parser.add_argument("--keep", type=Path, metavar="HTML", help="where the page is kept")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = drawn(folder, asked.smears)
        begun = time.perf_counter()
        page = view_page(table, folder, "apl_aml", "apl")
        made = time.perf_counter() - begun
        path = asked.keep or folder / "view.html"
        path.write_text(page, encoding="utf-8")
        empty = folder / "empty.html"
        empty.write_text("<!DOCTYPE html><title>empty</title>", encoding="utf-8")
        opened = min(seconds(folder, path) for _ in range(TRIES))
        found = {
            "smears": asked.smears,
            "cells": len(table),
            "megabytes": path.stat().st_size / 1e6,
            "seconds to write": made,
            "seconds to open": opened - min(seconds(folder, empty) for _ in range(TRIES)),
            "megabytes of memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        }
    write_json(RESULTS, found | {"machine": machine(), "commit": commit()}, digits=2)
    print(pd.Series(found).to_string())


def drawn(folder: Path, smears: int) -> pd.DataFrame:
    """A table of cells of one patient, in the form of `predict --cells`, with made-up evidence."""
    draw_data_set(folder, DRAWN, 7, size=(1920, 2560), cells_per_smear=CELLS)
    found = read_data_set(folder, {}, min_box=8, skip_bad_images=False, check_images=False, labelled=False)
    image = dict(zip(found.smears["smear"], found.smears["image"], strict=True))
    cells = found.cells.assign(image=found.cells["smear"].map(image), patient="P")
    cells["evidence_apl_aml"] = (cells["x0"] - cells["x0"].mean()) / 1e5
    cells["score_blast"] = cells["y0"] / 1920
    several = []
    for n in range(smears):
        smear = list(image)[n % len(image)]
        name = Path(f"wsi/again_{n:03}.jpg")
        (folder / name).symlink_to(Path(image[smear]).name)
        mine = cells[cells["smear"] == smear]
        several.append(mine.assign(smear=str(n), image=str(name), cell=[f"{n}-{c}" for c in mine["cell"]]))
    return pd.concat(several, ignore_index=True)


def seconds(folder: Path, page: Path) -> float:
    """How long Chromium runs to open a page and to write its first element."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'shot.png'}", page.as_uri()]
    begun = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
