"""Does every computer give the same bytes? The whole chain on this processor and on emulated ones.

Usage: python benchmarks/computers.py [--processors NAME ...]

The chain goes from drawn smears to predictions: views, graphs and features of every kind of backbone in
profiles/, heads, ensemble, `predict`. It runs on this processor with 1 and 2 threads, with and without oneDNN
in TensorFlow, and on processors that qemu-user emulates: Intel's and AMD's first ones with AVX2, and later
ones. Each link of the chain gets a digest of all its files. The digests are printed as a table and written to
benchmarks/results/computers.json. Exit code 1: some differ.

The data set and the weights are the same on every machine, so digests of two machines can be compared, too.
Use qemu 10 or later: version 7.2 emulates AVX2 with an error, so that `np.argsort` gives a wrong order.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import joblib
import numpy as np
import yaml
from processors import INSTALL, QEMU, SORTS, UPDATE, can_emulate, emulator, lines_of
from record import ROOT, commit, machine
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from aplsmear.cli import app
from aplsmear.compute.runtime import start_tensorflow
from aplsmear.dino_variants import VARIANTS
from aplsmear.features.backbones import cut_network
from aplsmear.params import Backbone
from aplsmear.sources.drawn import draw_data_set
from aplsmear.workspace.profiles import read_profile

RESULTS = ROOT / "benchmarks" / "results" / "computers.json"
PROCESSORS = ["Haswell", "Broadwell", "Skylake-Client", "EPYC", "EPYC-Rome", "EPYC-Milan"]
SIZES = {"cell": 40, "smear": 48}  # px; a side of a map is odd at some depth
ENSEMBLE, TASKS = "apl_healthy", ["apl_healthy_cell", "apl_healthy_smear", "apl_healthy_patient"]
CHAIN = "import computers, sys; computers.chain(sys.argv[1])"  # in a process of its own

Digests = dict[str, str]  # link of the chain -> SHA-256 of its files


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processors",
        nargs="*",
        default=PROCESSORS,
        metavar="NAME",
        help=f"emulated ones, of `{QEMU} -cpu help` (default: {', '.join(PROCESSORS)})",
    )
    asked = parser.parse_args()
    if asked.processors and not can_emulate(SORTS):
        reason = UPDATE if can_emulate() else INSTALL
        sys.exit(f"{reason}; `python benchmarks/computers.py --processors` runs this processor only")
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch) / "inputs", backbones_of_profiles())
        found = digests_of(Path(scratch), cases(asked.processors))
    same = identical(found)
    Console().print(table(found))
    RESULTS.write_text(
        json.dumps(
            {
                "computers": len(found),
                "identical": len(same),
                "machine": machine() | ({"emulator": emulator()} if asked.processors else {}),
                "commit": commit(),
                "digests": found,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    print(f"{len(same)} of {len(found)} computers gave the same bytes")
    return int(len(same) < len(found))


# --- the chain ------------------------------------------------------------------------------------------


def chain(folder: str) -> None:
    """Run the chain in a folder of `prepare`; print the name and the digest of each link."""
    with chdir(folder), redirect_stdout(sys.stderr):
        for link, paths in run_stages():
            print(json.dumps([link, digest(paths)]), file=sys.__stdout__, flush=True)


def run_stages() -> Iterator[tuple[str, list[Path]]]:
    """The outs of each link, as soon as they are written."""
    yield "inputs", sorted(Path().iterdir())
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    for name in ("download", "split", "augment"):
        stage(name).main()
    yield "views", [Path("dataset"), Path("splits"), Path("augmented")]
    for name in params["backbones"]:
        stage("bottleneck").main(name)
        yield f"graph of {name}", [Path("backbones") / name]
        yield f"features of {name}", [Path(f"features/{level}/{name}") for level in SIZES]
    tune = stage("tune")
    tune.Tracker = MagicMock()  # MLflow writes no out, and takes minutes on an emulated processor
    for task in params["tasks"]:
        tune.main(task)
    yield "heads", [Path("tuned")]
    for task in params["ensembles"][ENSEMBLE]["members"]:
        stage("member").main(ENSEMBLE, task)
    stage("ensemble").main(ENSEMBLE)
    yield "ensemble", [Path("ensembles")]
    words = [
        "--ensemble",
        f"ensembles/{ENSEMBLE}",
        "--data",
        "data",
        "--out",
        "new.csv",
        "--report",
        "new.html",
    ]
    app(["predict", *words], standalone_mode=False)
    yield "predict", [Path("new.csv"), Path("new.html")]


def stage(name: str) -> Any:
    """The script of a stage as a module."""
    spec = spec_from_file_location(f"stage_{name}", ROOT / "stages" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(paths: Sequence[Path]) -> str:
    """A hash of the names and contents of all files in some folders."""
    found = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found.update(file.as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


# --- its inputs -----------------------------------------------------------------------------------------


def backbones_of_profiles() -> dict[str, dict[str, Any]]:
    """The backbones of all profiles, at a small size: by a name of their own, settings as in params.yaml."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "profiles").glob("*.yaml")):
        for name, row in yaml.safe_load(read_profile(path.parent, path.stem))["backbones"].items():
            found[f"{path.stem}_{name}"] = row | {"batch": 16} | small(row)
    return found


def small(row: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a backbone that make it small. A vision transformer keeps two blocks and whole patches."""
    if row["application"] not in VARIANTS:
        return {"input_size": SIZES}
    patch = VARIANTS[row["application"]].patch
    sides = {level: -(-side // patch) * patch for level, side in SIZES.items()}
    return {"input_size": sides, "options": row.get("options", {}) | {"depth": 2}}


def prepare(folder: Path, backbones: Mapping[str, dict[str, Any]]) -> None:
    """Write the data set, the weights and params.yaml.

    Args:
        folder: gets them.
        backbones: settings as in params.yaml. Those with weights get drawn ones.
    """
    draw_data_set(folder / "data", 9, 3, size=(160, 200), cells_per_smear=3)
    params = yaml.safe_load(read_profile(ROOT / "profiles", "demo"))
    params["split"]["folds"] = 3
    params["augment"] |= {"size": SIZES, "views": 1, "extra_views": {}}
    params["backbones"] = {}
    for name, row in backbones.items():
        changed = {"weights": f"{name}.weights.h5", "sha256": ""} if row["weights"] != "none" else {}
        params["backbones"][name] = row | changed
        if changed:
            write_weights(folder / changed["weights"], Backbone.model_validate(row | {"weights": "none"}))
    params["tune"] |= {"trials": 6}
    params["tune"]["space"] |= {"epochs": [3], "activation": ["relu", "gelu", "tanh"]}
    params["tasks"] = {task: params["tasks"][task] for task in TASKS}
    params["overrides"] = {task: {} for task in TASKS}
    params["ensembles"] = {
        ENSEMBLE: params["ensembles"][ENSEMBLE] | {"members": TASKS, "weigh_by": "apl_healthy_cell"}
    }
    params["task"] = "apl_healthy_cell"
    params["combine"] |= {
        "trials": 6,
        "resamples": 100,
        "refits": 20,
        "shuffles": 5,
        "shares": ["apl_healthy_cell"],
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def write_weights(path: Path, settings: Backbone) -> None:
    """Weights that are the same on every machine, and with which features neither fade nor grow with depth.

    Keras's own initial weights would not do: features fade to zeros in deep networks, and float16 then hides
    differences.
    """
    start_tensorflow(gpus=False)
    network, _ = cut_network(settings, "cell", 1)
    random = np.random.Generator(np.random.Philox(1))
    for weight in network.weights:
        kind, shape = weight.path.rsplit("/", 1)[-1], weight.shape
        if kind in ("moving_variance", "variance", "gamma"):
            values = random.uniform(0.5, 1.5, shape)
        elif len(shape) < 2:
            values = random.normal(0, 0.1, shape)
        else:
            inputs = np.prod(shape[:2] if shape[-1] == 1 else shape[:-1])  # one output: of each channel
            values = random.normal(0, np.sqrt(2 / inputs), shape)
        weight.assign(values)
    network.save_weights(path)


# --- computers ------------------------------------------------------------------------------------------


def cases(processors: Sequence[str]) -> dict[str, dict[str, str]]:
    """Arguments of `lines_of` for each computer, by its name in the table."""
    native = {
        f"this one, {threads} threads, oneDNN {onednn}": {
            "LOKY_MAX_CPU_COUNT": threads,
            "TF_ENABLE_ONEDNN_OPTS": onednn,
        }
        for threads in ("1", "2")
        for onednn in ("0", "1")
    }
    # One thread: joblib would start other processes, and these would not be emulated.
    return native | {name: {"processor": name, "LOKY_MAX_CPU_COUNT": "1"} for name in processors}


def digests_of(scratch: Path, computers: Mapping[str, dict[str, str]]) -> dict[str, Digests]:
    """The digests of the chain on each computer, as many computers at once as there are cores.

    Args:
        scratch: a folder with `inputs` of `prepare`.
        computers: of `cases`.
    """
    backbones = yaml.safe_load((scratch / "inputs/params.yaml").read_text(encoding="utf-8"))["backbones"]

    def run(number: int, how: dict[str, str]) -> Digests:
        folder, found = scratch / str(number), {}
        shutil.copytree(scratch / "inputs", folder)
        for line in lines_of(CHAIN, str(folder), TF_CPP_MIN_LOG_LEVEL="3", **how):
            link, found[link] = json.loads(line)
            bar.update()
        return found

    with (
        tqdm(total=len(computers) * (5 + 2 * len(backbones)), unit=" links") as bar,
        ThreadPoolExecutor(joblib.cpu_count()) as pool,
    ):
        running = [pool.submit(run, number, how) for number, how in enumerate(computers.values())]
        return {name: each.result() for name, each in zip(computers, running, strict=True)}


def identical(found: Mapping[str, Digests]) -> list[str]:
    """The computers whose digests are all those of the first one."""
    return [name for name, digests in found.items() if digests == next(iter(found.values()))]


def table(found: Mapping[str, Digests]) -> Table:
    """The first digits of all digests: a row for each link, a column for each computer; red: other digits."""
    shown, first = Table("link", *found), next(iter(found.values()))
    for link in first:
        values = [digests[link][:6] for digests in found.values()]
        shown.add_row(link, *(each if each == values[0] else f"[bold red]{each}[/]" for each in values))
    return shown


if __name__ == "__main__":
    sys.exit(main())
