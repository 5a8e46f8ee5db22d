"""Time, memory and bytes as the number of patients grows, and what a user would write otherwise.

Usage: python benchmarks/scale.py [--patients 100 300 1000] [--drawn 36] [--work DIR] [--light]

Draws smears of the real field size (2560x1920 px, about 190 cells each) for the largest number of patients;
the smaller sets are its first patients. `--drawn` says how many patients are drawn: the others have their
fields, mirrored and under another lamp. Every set goes stage by stage through `dvc repro --single-item` in a
clone of this commit, with one backbone, one augmented view, one task and its ensemble; then `dvc repro` runs
once more, when nothing is stale. Beside it, in the same run, on the cells of the smallest set: the forward
pass alone; and files of cells, `keras.utils.image_dataset_from_directory`, augmentation layers,
`model.predict`. `--light` draws the same fields at a quarter of their sides, makes no augmented view and
small inputs of the network, and leaves Keras out: as many files, rows and features of a thousand patients in
minutes, for what memory says.

A machine that does other work too stretches wall time, so CPU time stands beside it and ratios are of CPU
time. Linux alone says what is measured here (/proc). Results go to benchmarks/results/scale.json, one section
a run, written after each set; the numbers of the run with the most patients stand at its top, and in
benchmarks/scale.png.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import yaml
from forward import compare
from matplotlib.figure import Figure
from networks import write_live_weights
from record import ROOT, commit, machine

from aplsmear.cpu import PINNED
from aplsmear.data.names import DISTINCT_FILE
from aplsmear.files import write_json
from aplsmear.images.view_store import read_views
from aplsmear.params import Backbone, read_params
from aplsmear.sources.drawn import draw_data_set
from aplsmear.tables import read_table

RESULTS, PLOT = ROOT / "benchmarks" / "results" / "scale.json", ROOT / "benchmarks" / "scale.png"
CELLS, SEED = 190, 8
MIRRORS = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # steps along rows and columns
TASK, ENSEMBLE, BACKBONE, LAYER = "apl_healthy_cell", "apl_healthy", "mobilenet", "conv_pw_11_relu"
STAGES = {
    "prepare": "prepare",
    "download": "download",
    "split": "split",
    "augment": "augment",
    "bottleneck": f"bottleneck@{BACKBONE}",
    "tune": f"tune@{TASK}",
    "member": f"member_{ENSEMBLE}@{TASK}",
    "ensemble": f"ensemble_{ENSEMBLE}",
}


@dataclass(frozen=True)
class Form:
    """Fields, and what is made of them.

    Attributes:
        height, width, cell_size: of a field, px.
        views: augmented ones.
        size: of a cell's view and of the network's input, px.
    """

    height: int = 1920
    width: int = 2560
    cell_size: int = 120
    views: int = 1
    size: int = 64


LIGHT = Form(480, 640, 30, 0, 32)
OUTS = ("dataset", "splits", "augmented", "features", "backbones", "tuned", "members", "ensembles")
CORES = os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patients", type=int, nargs="+", default=[12, 36])
    parser.add_argument("--drawn", type=int, default=12)
    parser.add_argument("--work", type=Path, help="where drawn sets stay; otherwise a folder that goes")
    parser.add_argument("--light", action="store_true")
    asked = parser.parse_args()
    form = LIGHT if asked.light else Form()
    with tempfile.TemporaryDirectory() as folder:
        work = (asked.work or Path(folder)).resolve()
        for found in measure(work, sorted(asked.patients), asked.drawn, form):
            record(found, asked.light)
    print(json.dumps({name: value for name, value in found.items() if name != "sets"}, indent=2))
    print(table(found))


def record(found: dict[str, Any], light: bool) -> None:
    """Write down what is known so far; of a run that is cut off, the sets that were done stay."""
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    kind, names = "-light" * light, [str(count) for count in found["patients"]]
    whole.pop("-".join(names[:-1]) + kind, None)
    whole["-".join(names) + kind] = found
    if not light and max(found["patients"]) >= max(whole.get("patients", [0])):
        runs = {name: value for name, value in whole.items() if isinstance(value, dict)}
        whole = runs | {name: value for name, value in found.items() if not isinstance(value, dict)}
        plot(found)
    write_json(RESULTS, whole)


def measure(work: Path, patients: Sequence[int], drawn: int, form: Form) -> Iterator[dict[str, Any]]:
    """The smallest set, the forward pass alone and Keras's way on it, then the others; all that is known,
    after each set."""
    alone: dict[str, Any] = {"machine": machine(), "commit": commit(), "drawn_patients": drawn}
    work /= str(form.width)
    whole = work / f"smears-{patients[-1]}"
    make_set(work / f"drawn-{drawn}", whole, patients[-1], drawn, form)
    sets: dict[str, Any] = {}
    for count in patients:
        sets[str(count)] = measure_set(work, whole, count, form)
        if len(sets) == 1:
            alone |= forward_speeds(workspace(work, count))
            alone |= {} if form == LIGHT else against_keras(work, count, sets[str(count)]["stages"])
        yield summary(sets) | alone


def summary(sets: dict[str, Any]) -> dict[str, Any]:
    """What the sets say together, from the smallest to the largest."""
    each = list(sets.values())
    few, many = each[0], each[-1]
    peaks = [max(stage["peak_memory_gb"] for stage in each["stages"].values()) for each in (few, many)]
    counts = np.array([int(count) for count in sets])
    took = counts * [found["cpu_seconds_per_patient"] for found in each]
    growth = {
        # Between one set and the next: without what any set costs, however few its patients.
        "cpu_seconds_of_one_patient_more": (np.diff(took) / np.diff(counts)).tolist(),
        "memory_growth": peaks[1] / peaks[0] - 1,
        "time_per_patient_growth": many["cpu_seconds_per_patient"] / few["cpu_seconds_per_patient"] - 1,
        "memory_growth_of_stages": {
            name: many["stages"][name]["peak_memory_gb"] / stage["peak_memory_gb"] - 1
            for name, stage in few["stages"].items()
        },
    }
    return (growth if len(sets) > 1 else {}) | {
        "patients": [int(count) for count in sets],
        "peak_memory_gb": max(peaks),
        "bytes_written_ratio": many["bytes_written_ratio"],
        "files": many["files"],
        "augment_wants_cores": many["stages"]["augment"]["cores_wanted"],
        "unchanged_seconds": many["unchanged"]["wall_seconds"],
        "unchanged_cpu_seconds": many["unchanged"]["cpu_seconds"],
        "sets": sets,
    }


# --- data sets -----------------------------------------------------------------------------------------


def make_set(base: Path, folder: Path, patients: int, drawn: int, form: Form) -> None:
    """Write a set of `patients`, of whom `drawn` are drawn into `base`; what is there already stays."""
    if not (base / "wsi.csv").is_file():
        shutil.rmtree(base, ignore_errors=True)
        size = form.height, form.width
        draw_data_set(base, drawn, SEED, size=size, cells_per_smear=CELLS, cell_size=form.cell_size)
    if (folder / "wsi.csv").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wsi").mkdir(parents=True)
    smears, cells = (read_csv(base / name) for name in ("wsi.csv", "labeled_cells.csv"))
    names = list(dict.fromkeys(smears["patient"]))
    rows: list[list[pd.DataFrame]] = [[], []]
    copies = range(-(-patients // len(names)))
    for copy in copies:
        wanted = names[: patients - copy * len(names)]
        mine = smears[smears["patient"].isin(wanted)]
        theirs = cells[cells["wsi"].isin(set(mine["id"]))].copy()
        for name in mine["imgName"]:
            copy_field(base / "wsi" / name, folder / "wsi" / f"{copy}_{name}", copy)
        theirs["bbox"] = [turned(box, copy, form) for box in theirs["bbox"]]
        theirs["id"], theirs["wsi"] = f"{copy}_" + theirs["id"], f"{copy}_" + theirs["wsi"]
        rows[1].append(theirs)
        rows[0].append(mine.assign(
            id=f"{copy}_" + mine["id"],
            imgName=f"{copy}_" + mine["imgName"],
            patient=f"{copy}_" + mine["patient"],
        ))  # fmt: skip
    declare_distinct(folder / DISTINCT_FILE, smears["imgName"], len(copies))
    pd.concat(rows[1]).to_csv(folder / "labeled_cells.csv", index=False)
    pd.concat(rows[0]).to_csv(folder / "wsi.csv", index=False)


def declare_distinct(path: Path, fields: Iterable[str], copies: int) -> None:
    """Declare the mirrored fields as pictures of their own: the pipeline finds that they are copies."""
    pairs = [
        ("image", f"{one}_{field}", f"{other}_{field}")
        for field in fields
        for one, other in combinations(range(copies), 2)
    ]
    if pairs:
        pd.DataFrame(pairs, columns=["what", "name", "other"]).to_csv(path, index=False)


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def copy_field(source: Path, path: Path, copy: int) -> None:
    """A field mirrored, and from the fifth copy on under another lamp."""
    if not copy:
        shutil.copyfile(source, path)
        return
    rows, columns = MIRRORS[copy % len(MIRRORS)]
    lamp = 1 - 0.02 * (copy // len(MIRRORS))
    light = np.rint(np.arange(256) * lamp).astype(np.uint8)
    image = cv2.LUT(np.ascontiguousarray(cv2.imread(str(source))[::rows, ::columns]), light)
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 86])  # as demo smears


def turned(box: str, copy: int, form: Form) -> str:
    if not box:
        return box
    y0, x0, y1, x1 = json.loads(box)
    rows, columns = MIRRORS[copy % len(MIRRORS)]
    if rows < 0:
        y0, y1 = form.height - y1, form.height - y0
    if columns < 0:
        x0, x1 = form.width - x1, form.width - x0
    return json.dumps([y0, x0, y1, x1])


def first_patients(whole: Path, folder: Path, patients: int) -> None:
    """A set of the first patients of another one, whose images it shares."""
    if (folder / "wsi.csv").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wsi").mkdir(parents=True)
    smears, cells = (read_csv(whole / name) for name in ("wsi.csv", "labeled_cells.csv"))
    mine = smears[smears["patient"].isin(list(dict.fromkeys(smears["patient"]))[:patients])]
    if (whole / DISTINCT_FILE).is_file():
        shutil.copyfile(whole / DISTINCT_FILE, folder / DISTINCT_FILE)
    for name in mine["imgName"]:
        os.link(whole / "wsi" / name, folder / "wsi" / name)
    cells[cells["wsi"].isin(set(mine["id"]))].to_csv(folder / "labeled_cells.csv", index=False)
    mine.to_csv(folder / "wsi.csv", index=False)


# --- the pipeline --------------------------------------------------------------------------------------


def first(work: Path, patients: int) -> Path:
    return work / f"first-{patients}"


def workspace(work: Path, patients: int) -> Path:
    return work / f"pipeline-{patients}"


def measure_set(work: Path, whole: Path, patients: int, form: Form) -> dict[str, Any]:
    """Every stage over the first patients, then all of them once more."""
    data, folder = first(work, patients), workspace(work, patients)
    first_patients(whole, data, patients)
    stages, kept = {}, folder / "measured.json"
    if not kept.is_file() or json.loads(kept.read_text(encoding="utf-8"))["commit"] != commit():
        prepare(folder, data, form)
    else:  # a run that was cut off goes on
        stages = json.loads(kept.read_text(encoding="utf-8"))["stages"]
    for name, stage in STAGES.items():
        if name not in stages:
            stages[name] = asdict(watched(["dvc", "repro", "--single-item", stage], folder))
            write_json(kept, {"commit": commit(), "stages": stages})
            print(f"{patients} patients, {name}: {stages[name]}", file=sys.stderr, flush=True)
    unchanged = watched(["dvc", "repro", STAGES["ensemble"]], folder)
    raw = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    outs = [path for out in OUTS for path in (folder / out).rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in outs)
    return {
        "stages": stages,
        "unchanged": asdict(unchanged),
        "cpu_seconds_per_patient": sum(each["cpu_seconds"] for each in stages.values()) / patients,
        "wall_seconds_per_patient": sum(each["wall_seconds"] for each in stages.values()) / patients,
        "smears": len(read_table(folder / "dataset" / "smears.csv")),
        "cells": len(read_table(folder / "dataset" / "cells.csv")),
        "raw_bytes": raw,
        "bytes_written": written,
        "bytes_written_ratio": written / raw,
        "files": len(outs),
    }


def prepare(folder: Path, data: Path, form: Form) -> None:
    """A clone of this commit with the parameters of this benchmark; nothing has run in it."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["task"] = TASK
    params["dataset"]["root"] = str(data)
    params["split"]["folds"] = 3
    sizes = {"cell": form.size, "smear": 3 * form.size}
    params["augment"] |= {"views": form.views, "extra_views": {}, "size": sizes}
    backbone = params["backbones"][BACKBONE] | {"layer": [LAYER], "input_size": sizes}
    weights = folder.with_suffix(".weights.h5")
    write_live_weights(weights, Backbone.model_validate(backbone), next((data / "wsi").iterdir()))
    params["backbones"] = {BACKBONE: backbone | {"weights": str(weights)}}
    params["tune"]["items_per_patient"] = 50
    params["tune"]["space"]["epochs"] = [4]
    params["tasks"], params["overrides"] = {TASK: params["tasks"][TASK]}, {TASK: {}}
    for ensemble in params["ensembles"].values():
        ensemble |= {"members": [TASK], "weigh_by": TASK}
    params["combine"] |= {"trials": 8, "resamples": 500, "refits": 50, "shuffles": 20, "shares": []}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


@dataclass
class Watched:
    """What a command took.

    Attributes:
        wall_seconds: as it was.
        cpu_seconds: of all its processes, user and system.
        peak_memory_gb: of its largest process, resident memory at most, pages of mapped files included.
        private_memory_gb: the same without pages of files, which the system takes back when it needs them.
        cores_wanted: the share of the cores that its threads used or waited for: what they would have kept
            busy, had the machine had nothing else to do.
        tensorflow: whether any process had loaded it.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_gb: float = 0.0
    private_memory_gb: float = 0.0
    cores_wanted: float = 0.0
    tensorflow: bool = False


def watched(command: Sequence[str], folder: Path) -> Watched:
    """Run a command, and look at its processes several times a second."""
    # Our stages set the limits of `aplsmear.cpu` themselves; Keras's way has none.
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", *PINNED}}
    found = Watched()
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    done = threading.Event()
    looking = threading.Thread(target=look, args=(process.pid, found, done))
    looking.start()
    _, status, used = os.wait4(process.pid, 0)
    found.wall_seconds = time.perf_counter() - started
    done.set()
    looking.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{' '.join(command)} failed in {folder}")
    found.cpu_seconds = used.ru_utime + used.ru_stime
    return found


def look(session: int, found: Watched, done: threading.Event) -> None:
    """Until it is done: what the processes of a session want and hold."""
    wanted = spans = 0.0
    before, then = demand(session), time.perf_counter()
    while not done.wait(0.3):
        now, at = demand(session), time.perf_counter()
        new = sum(value - before.get(thread, 0.0) for thread, value in now.items())
        wanted += min(new, CORES * (at - then))
        spans += at - then
        before, then = now, at
        found.cores_wanted = wanted / spans / CORES
        for process in processes(session):
            try:
                status = (process / "status").read_text()
                found.tensorflow |= "libtensorflow" in (process / "maps").read_text()
            except OSError:
                continue  # it has ended
            sizes = dict(line.split(":", 1) for line in status.splitlines())
            resident, private = (
                1024e-9 * int(sizes.get(name, "0").split()[0]) for name in ("VmHWM", "RssAnon")
            )
            found.peak_memory_gb = max(found.peak_memory_gb, resident)
            found.private_memory_gb = max(found.private_memory_gb, private)


def processes(session: int) -> Iterator[Path]:
    """Folders of /proc of the processes of a session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                yield stat.parent
        except OSError:
            continue  # it has ended


def demand(session: int) -> dict[str, float]:
    """Of every thread of a session, the seconds that it ran or waited for a core."""
    found = {}
    for process in processes(session):
        try:
            for each in process.glob("task/*/schedstat"):
                ran, waited, _ = each.read_text().split()
                found[str(each)] = (int(ran) + int(waited)) / 1e9
        except OSError:
            continue  # the process, or one of its threads, has ended
    return found


# --- the forward pass alone ----------------------------------------------------------------------------


def forward_speeds(folder: Path) -> dict[str, float]:
    """Speed of `bottleneck` over that of bare forward passes, on cells of this set; see forward.py."""
    settings = read_params(folder / "params.yaml").backbones[BACKBONE]
    views = (
        view for each in read_views(folder / "augmented" / "cell" / "views.parquet", 256) for view in each
    )
    found = compare(settings, views)
    return {
        "forward_fraction": found["forward_fraction"],
        "bottleneck_vs_tensorflow_forward": found["vs_tensorflow"]["as_it_starts"],
    }


# --- Keras's way ---------------------------------------------------------------------------------------


def against_keras(work: Path, patients: int, stages: dict[str, Any]) -> dict[str, Any]:
    """`augment`, `bottleneck` and `tune`, with DVC around them, and Keras's way from the same cells to the
    same features and heads."""
    data, folder = first(work, patients), workspace(work, patients)
    cells, smears = (read_table(folder / "dataset" / f"{level}s.csv") for level in ("cell", "smear"))
    folds = read_table(folder / "splits" / "folds.csv")
    trials = folder / "tuned" / TASK / "trials.csv"
    weights = folder.with_suffix(".weights.h5")
    with tempfile.TemporaryDirectory() as out:
        table = Path(out) / "cells.csv"
        whole = cells.merge(smears[["smear", "image"]], on="smear")
        whole.merge(folds[["patient", "fold"]], on="patient").to_csv(table, index=False)
        script = ROOT / "benchmarks" / "keras_pipeline.py"
        theirs = watched([sys.executable, *map(str, (script, data, table, weights, trials, out))], folder)
        written = [path.stat().st_size for path in Path(out).rglob("*") if path.is_file()]
        parts = json.loads((Path(out) / "parts.json").read_text(encoding="utf-8"))

    def mine(kind: str, *names: str) -> float:
        return sum(stages[name][kind] for name in names)

    all_three = ("augment", "bottleneck", "tune")
    features = parts["start_and_cells"] + parts["features"]
    return {
        "speedup_vs_keras_pipeline": theirs.cpu_seconds / mine("cpu_seconds", *all_three),
        "speedup_vs_keras_pipeline_wall": theirs.wall_seconds / mine("wall_seconds", *all_three),
        "speedup_vs_keras_features": features / mine("cpu_seconds", "augment", "bottleneck"),
        "speedup_vs_keras_heads": parts["heads"] / mine("cpu_seconds", "tune"),
        "keras": asdict(theirs)
        | {"patients": patients, "files": len(written), "bytes_written": sum(written), "parts": parts},
    }


# --- the table and the picture --------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """Stages and sets as a table of Markdown, as README.md shows it."""
    sets = found["sets"]
    head = "".join(f" {count}: CPU s | wall s | GB | of it private |" for count in sets)
    rows = [f"| patients |{head}", "|---|" + "---|" * 4 * len(sets)]
    names = ("cpu_seconds", "wall_seconds", "peak_memory_gb", "private_memory_gb")
    for stage in [*STAGES, "unchanged"]:
        cells = [each["stages"].get(stage, each["unchanged"]) for each in sets.values()]
        numbers = (f"{cell[name]:.{2 if name.endswith('gb') else 1}f}" for cell in cells for name in names)
        rows.append(f"| {stage} | {' | '.join(numbers)} |")
    for name in ("cpu_seconds_per_patient", "bytes_written_ratio", "files", "cells"):
        numbers = (f"{each[name]:.4g} | | |" for each in sets.values())
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(numbers)} |")
    return "\n".join(rows)


def plot(found: dict[str, Any]) -> None:
    """CPU time per patient, by stage, and the largest process, over the number of patients."""
    sizes = [str(count) for count in found["patients"]]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    below = np.zeros(len(sizes))
    for stage in STAGES:
        took = np.array([found["sets"][n]["stages"][stage]["cpu_seconds"] / int(n) for n in sizes])
        left.bar(sizes, took, bottom=below, label=stage, width=0.6)
        below += took
        peaks = [found["sets"][n]["stages"][stage]["peak_memory_gb"] for n in sizes]
        right.plot(sizes, peaks, marker="o", label=stage)
    left.set(xlabel="patients", ylabel="CPU seconds a patient")
    right.set(xlabel="patients", ylabel="largest process, GB", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(PLOT, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
