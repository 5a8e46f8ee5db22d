"""One ensemble from end to end: outs of earlier stages in, held-out verdicts, measures and the bundle out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from aplsmear.ensembles.baselines import baselines_of, compare, pooled_baseline, pooled_features
from aplsmear.ensembles.bundle import Member, make_model, make_reference, reference_features, write_bundle
from aplsmear.ensembles.combination import (
    Verdicts,
    draw_candidates,
    high_is_positive,
    importance,
    judge,
    measure,
    patients_of,
    read_members,
)
from aplsmear.evaluation.curves import (
    calibration_table,
    confusion_table,
    precision_recall_table,
    roc_band_table,
    roc_curve_table,
)
from aplsmear.evaluation.intervals import headline
from aplsmear.features.store import Features, read_features
from aplsmear.files import write_json
from aplsmear.heads.head import read_heads
from aplsmear.images.view_store import read_views
from aplsmear.params import LEVELS, Augment, Backbone, Combine, Ensemble, Level, Task, TaskLevel, named
from aplsmear.runs.checksums import md5
from aplsmear.tables import read_scores, read_table, write_table

_VIEWS = 256  # read at once


@dataclass(frozen=True)
class Inputs:
    """What an ensemble is made from."""

    name: str
    ensemble: Ensemble  # its row of params.yaml
    levels: Mapping[str, TaskLevel]  # of each member and of `Ensemble.weigh_by`
    patients: pd.DataFrame  # of `aplsmear.ensembles.combination.patients_of`
    members: Mapping[str, pd.DataFrame]  # of `aplsmear.ensembles.combination.read_members`
    items: Mapping[Level, pd.DataFrame]  # all cells and all smears, with ``item`` and ``patient``
    features: Mapping[Level, Mapping[str, Features]]  # of all cells and all smears, by ``backbone/layer``
    heads: Mapping[str, Path]  # of each member and of `Ensemble.weigh_by`
    md5: Mapping[str, str]  # of the tables, by file, as dvc.lock has it


@dataclass(frozen=True)
class Results:
    """The verdicts of an ensemble on held-out patients, and its measures."""

    name: str
    ensemble: Ensemble  # its row of params.yaml
    verdicts: Verdicts
    members: Mapping[str, pd.DataFrame]  # of `aplsmear.ensembles.combination.read_members`
    measured: dict[str, Any]  # of `aplsmear.ensembles.combination.measure`
    comparison: pd.DataFrame  # of `aplsmear.ensembles.baselines.compare`
    importance: pd.DataFrame  # of `aplsmear.ensembles.combination.importance`
    roc: pd.DataFrame  # this and the next three: of `aplsmear.evaluation.curves`
    band: pd.DataFrame
    precision_recall: pd.DataFrame
    calibration: pd.DataFrame
    # Whose scores choose the cells that reports show: of the members that score cells, the one with the
    # highest importance. Empty: no member scores cells.
    pictured_by: str
    inputs: Mapping[str, str]  # file -> MD5, as dvc.lock has it
    settings: Mapping[str, Any]  # the parameters that shaped the results


def read_inputs(
    name: str, ensembles: Mapping[str, Ensemble], tasks: Mapping[str, Task], backbones: Collection[str]
) -> Inputs:
    """Read what an ensemble is made from, below the current folder.

    Args:
        name: of the ensemble.
        ensembles: of params.yaml.
        tasks: of params.yaml.
        backbones: names in params.yaml.

    Raises:
        ParamsError: there is no such ensemble.
        EnsembleError: a diagnosis has no patients, or a member is missing or not named.
        FeaturesError: features of a backbone are missing, or not named.
    """
    ensemble = named(ensembles, name, "ensembles")
    folder, weighting = Path(f"members/{name}"), Path(f"tuned/{ensemble.weigh_by}")
    folds, tables = Path("splits/folds.csv"), {level: Path(f"dataset/{level}s.csv") for level in LEVELS}
    levels = {task: tasks[task].level for task in [ensemble.weigh_by, *ensemble.members]}
    weights = {levels[ensemble.weigh_by]: read_scores(weighting / "scores.parquet")}
    hashed = [folds, tables["cell"], *(folder / f"{task}.scores.parquet" for task in ensemble.members)]
    return Inputs(
        name=name,
        ensemble=ensemble,
        levels=levels,
        patients=patients_of(read_table(folds), ensemble.positive, ensemble.negative),
        members=read_members(folder, {task: levels[task] for task in ensemble.members}, weights),
        items={level: read_table(path).rename(columns={level: "item"}) for level, path in tables.items()},
        features={level: read_features(Path(f"features/{level}"), backbones) for level in LEVELS},
        heads={ensemble.weigh_by: weighting / "heads.npz"}
        | {task: folder / f"{task}.heads.npz" for task in ensemble.members},
        md5={path.as_posix(): md5(path) for path in hashed},
    )


def judge_and_compare(inputs: Inputs, combine: Combine, seed: int) -> Results:
    """Judge every patient by models that never saw the patient, and compare with members and baselines.

    Args:
        inputs: of `read_inputs`.
        combine: of params.yaml.
        seed: of params.yaml.
    """
    patients, members = inputs.patients, inputs.members
    verdicts = judge(patients, members, draw_candidates(combine, seed), combine.refits, seed)
    label, probability = verdicts.table["label"], verdicts.table["probability"]
    baselines = baselines_of(patients, members, combine.shares, seed)
    if pooled := pooled_features(inputs.features["cell"].values(), inputs.items["cell"], patients):
        baselines["mean-pooled features"] = pooled_baseline(patients, pooled)
    important = importance(verdicts, combine.shuffles, seed)
    drops = dict(zip(important["member"], important["auroc_drop"], strict=True))
    of_cells = [task for task in drops if inputs.levels[task] == "cell"]
    return Results(
        name=inputs.name,
        ensemble=inputs.ensemble,
        verdicts=verdicts,
        members=members,
        measured=measure(verdicts, combine.resamples, seed),
        comparison=compare(patients, probability.to_numpy(), baselines),
        importance=important,
        roc=roc_curve_table(label, probability),
        band=roc_band_table(label, probability, combine.resamples, seed),
        precision_recall=precision_recall_table(label, probability),
        calibration=calibration_table(label, probability),
        pictured_by=max(of_cells, key=lambda task: drops[task], default=""),
        inputs=inputs.md5,
        settings={
            "seed": seed,
            "combine": combine.model_dump(),
            f"ensembles.{inputs.name}": inputs.ensemble.model_dump(),
        },
    )


def write_results(out: Path, results: Results) -> None:
    """Write the tables, the curves and the measures.

    Args:
        out: the folder ``ensembles/<name>``.
        results: of `judge_and_compare`.
    """
    table, ensemble = results.verdicts.table, results.ensemble
    write_table(out / "predictions.csv", table)
    write_table(out / "comparison.csv", results.comparison)
    curves = ("roc", "precision_recall", "calibration")
    write_json(out / "curves.json", {curve: getattr(results, curve).to_dict("records") for curve in curves})
    names = [ensemble.negative, ensemble.positive]
    write_table(out / "confusion.csv", confusion_table(table["label"], table["verdict"], names))
    write_json(out / "metrics.json", headline(results.measured), digits=4)
    drops = results.importance.rename(columns={"auroc_drop": "value"}).set_index("member").to_dict("index")
    write_json(out / "intervals.json", results.measured | {"auroc_drop_without": drops})


def write_model(
    out: Path,
    inputs: Inputs,
    results: Results,
    backbones: Mapping[str, Backbone],
    augment: Augment,
    min_box: int,
    seed: int,
) -> None:
    """Write the bundle that judges new patients (`aplsmear.ensembles.bundle`).

    Args:
        out: the folder ``ensembles/<name>/model``.
        inputs: of `read_inputs`.
        results: of `judge_and_compare`.
        backbones: of params.yaml.
        augment: of params.yaml.
        min_box: `dataset.min_box` of params.yaml.
        seed: of params.yaml.
    """
    ensemble, pictured_by = inputs.ensemble, results.pictured_by
    members = {
        task: Member(
            task=task,
            level=level,
            one_each=task in inputs.members and bool((inputs.members[task]["items"] == 1).all()),
        )
        for task, level in inputs.levels.items()
    }
    mine = [members[task] for task in ensemble.members]
    level: Level = "cell" if any(member.images == "cell" for member in mine) else "smear"
    chosen = reference_features(read_heads(inputs.heads[each.task]) for each in mine if each.images == level)
    reference = make_reference(
        inputs.patients,
        inputs.items[level],
        level,
        inputs.features[level][chosen],
        read_views(Path(f"augmented/{level}/views.parquet"), _VIEWS),
    )
    model = make_model(
        reference,
        name=inputs.name,
        positive=ensemble.positive,
        negative=ensemble.negative,
        members=mine,
        weigh_by=members[ensemble.weigh_by],
        seed=seed,
        min_box=min_box,
        augment=augment,
        backbones=backbones,
        combinations=results.verdicts.combinations,
        pictured_by=pictured_by,
        high_is_positive=bool(pictured_by) and high_is_positive(results.verdicts, pictured_by),
        inputs=dict(inputs.md5),
    )
    write_bundle(out, model, inputs.heads, Path("backbones"), reference)
