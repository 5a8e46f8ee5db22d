"""The pipeline on a tiny data set: every stage does all of its work."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from aplsmear.sources.drawn import draw_data_set

MEMBERS = {
    "apl_healthy": ["blast", "apl_healthy_cell", "apl_healthy_smear"],
    "apl_aml": ["blast", "apl_aml_smear"],
    "aml_healthy": ["blast", "apl_healthy_smear"],
}
TASKS = sorted({task for members in MEMBERS.values() for task in members})


def make_small(folder: Path, members: Mapping[str, Sequence[str]] = MEMBERS) -> None:
    """Reduce a clone to a tiny data set, one backbone and few short trials.

    Args:
        folder: a clone.
        members: of each ensemble; of an ensemble that is not named, `blast`. No other tasks are kept; `blast`
            must be one of them.
    """
    tasks = sorted({task for each in members.values() for task in each})
    shutil.rmtree(folder / "demo")
    draw_data_set(folder / "demo", 18, 3, size=(240, 320), cells_per_smear=8)
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    params["split"]["folds"] = 3
    params["augment"] |= {"size": {"cell": 32, "smear": 64}, "views": 1}
    params["backbones"] = {
        "mobilenet": params["backbones"]["mobilenet"] | {"input_size": {"cell": 32, "smear": 64}}
    }
    params["tune"] |= {"trials": 2}
    params["tune"]["space"]["epochs"] = [2]
    params["tasks"] = {task: params["tasks"][task] for task in tasks}
    params["overrides"] = {task: {} if task == "blast" else {"trials": 2} for task in tasks}
    params["task"] = "blast"
    params["finetune"] |= {"folds": 1, "blocks": 1, "epochs": 2, "pictures": 1}
    params["finetune"]["head"] |= {"epochs": 1, "members": 2, "units": 4, "centre_crop": 0.6}
    for name, row in params["ensembles"].items():
        row |= {"members": list(members.get(name, ["blast"])), "weigh_by": "blast"}
    params["combine"] |= {"trials": 3, "resamples": 100, "refits": 20, "shares": ["blast"]}
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    (folder / "dvc.lock").unlink()
