"""A study that takes milliseconds: items that are made up, and a judge that trains nothing."""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.features.store import Features
from aplsmear.heads.head import Job
from aplsmear.heads.search import Trial, run_study
from aplsmear.heads.stack import Judged, Material
from aplsmear.heads.study import open_study
from aplsmear.heads.task_data import TaskData, make_task_data
from aplsmear.params import TaskTune, read_params

ROOT = Path(__file__).parents[1]
FOLDS = 4
SETTINGS = read_params(ROOT / "params.yaml").tune_of("blast")


def settings(space: Mapping[str, Any] | None = None, **changed: Any) -> TaskTune:
    """Those of params.yaml, small."""
    small = {"trials": 9} | changed
    merged = (
        SETTINGS.space.model_dump()
        | {"views": [0], "depth": [0, 1], "batch": [16], "epochs": [4]}
        | dict(space or {})
    )
    return TaskTune.model_validate(SETTINGS.model_dump() | small | {"space": merged})


def task_data(
    patients: int = 16, per_patient: int = 5, channels: int = 6, seed: int = 1, **changed: Any
) -> TaskData:
    """Patients p00, p01, ... with cells of both classes; two kinds of features, one tells the class."""
    random = np.random.Generator(np.random.Philox(seed))
    items = pd.DataFrame(
        [{"item": f"p{p:02}-{c}", "patient": f"p{p:02}"} for p in range(patients) for c in range(per_patient)]
    )
    label = random.integers(0, 2, len(items)).astype(np.int8)
    index = pd.DataFrame({"item": items["item"], "view": 0})
    values = random.normal(size=(2, len(items), channels))
    values[0, :, 0] += 2 * label
    features = {
        f"net/{name}": Features(f"net/{name}", index, x.astype(np.float16))
        for name, x in zip(("good", "poor"), values, strict=True)
    }
    folds = pd.DataFrame(
        {"patient": [f"p{p:02}" for p in range(patients)], "fold": np.arange(patients) % FOLDS}
    )
    return replace(make_task_data(items, label, folds, features), **changed)


def quick_judge(jobs: Sequence[Job], material: Material, patience: int) -> list[Judged]:
    """Scores by the job alone; trial 3 fails; each call is noted in the file that JUDGED names."""
    if "JUDGED" in os.environ:
        with Path(os.environ["JUDGED"]).open("a") as file:
            file.write(f"start {jobs[0].trial}\n")
    time.sleep(float(os.environ.get("JUDGING", "0")))
    found = []
    for job in jobs:
        name = hashlib.sha256(f"{job.trial} {sorted(job.held_out)}".encode()).digest()
        random = np.random.Generator(np.random.Philox(int.from_bytes(name[:8], "big")))
        scores = {
            fold: random.normal(size=(material.items.fold == fold).sum()).astype(np.float32)
            + material.items.label[material.items.fold == fold] * np.float32(job.trial % 4)
            for fold in sorted(job.held_out)
        }
        epochs = {fold: int(random.integers(1, 5)) for fold in sorted(job.held_out)}
        found.append(Judged({}, {}, "made to fail") if job.trial == 3 else Judged(epochs, scores))
    return found


def outcome(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    """What must be the same with any number of workers."""
    return [
        (t.number, t.recipe, t.inner.tobytes(), t.best_epoch.tobytes(), t.parameters, t.failure)
        for t in trials
    ]


def work(folder: str, url: str = "", trials: int = 9, name: str = "study") -> list[Trial]:
    """One worker, from start to end; what it ends with is written to a file of its own."""
    study = open_study(name, Path(folder) / f"{name}.journal", url)
    found = list(run_study(task_data(), settings(trials=trials), 5, study, quick_judge))
    Path(folder, f"outcome-{os.getpid()}").write_text(repr(outcome(found)))
    return found
