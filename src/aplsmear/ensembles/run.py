"""One ensemble from end to end: outs of earlier stages in, held-out verdicts, measures and the bundle out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.ensembles.baselines import (
    POOLED,
    Baselines,
    baselines_of,
    compare,
    pooled_baseline,
    pooled_features,
    share_of,
)
from aplsmear.ensembles.bundle import Member, Model, make_reference, reference_features, write_bundle
from aplsmear.ensembles.cell_curve import AttendedCells, CellMember, Curve, ScoredCells, cell_curve
from aplsmear.ensembles.combination import (
    Verdicts,
    as_json,
    draw_candidates,
    importance,
    judge,
    logits_of_all,
    measure,
    measure_alarm,
    patients_of,
    read_members,
    rounded_summaries,
)
from aplsmear.ensembles.evidence import Evidence, evidence_of, evidence_table
from aplsmear.ensembles.familiarity import COMMON
from aplsmear.evaluation.curves import confusion_table, curve_tables
from aplsmear.evaluation.intervals import headline
from aplsmear.features.store import Features, read_features
from aplsmear.files import whole, write_json
from aplsmear.heads.head import read_average, read_heads
from aplsmear.images.view_store import read_views
from aplsmear.params import LEVELS, Augment, Backbone, Combine, Ensemble, Level, Task, TaskLevel, named
from aplsmear.runs.checksums import md5
from aplsmear.tables import read_table, write_table

_VIEWS = 256  # read at once


@dataclass(frozen=True)
class Inputs:
    """What an ensemble is made from."""

    name: str
    ensemble: Ensemble  # its row of params.yaml
    levels: Mapping[str, TaskLevel]  # of each member and of `Ensemble.weigh_by`
    everyone: pd.DataFrame  # ``patient, diagnosis, fold`` of all patients of the data set
    patients: pd.DataFrame  # of `aplsmear.ensembles.combination.patients_of`
    members: Mapping[str, pd.DataFrame]  # of `aplsmear.ensembles.combination.read_members`
    weighing: pd.DataFrame  # the same of `Ensemble.weigh_by`
    items: Mapping[Level, pd.DataFrame]  # all cells and all smears, with ``item`` and ``patient``
    features: Mapping[Level, Mapping[str, Features]]  # of all cells and all smears, by ``backbone/layer``
    heads: Mapping[str, Path]  # of each member and of `Ensemble.weigh_by`
    scores: Mapping[str, pd.DataFrame]  # of the items of each member, and of `Ensemble.weigh_by`
    md5: Mapping[str, str]  # of the tables, by file, as dvc.lock has it
    left_out: Mapping[str, Any]  # of the whole data set: what -> ``count``

    @property
    def summaries(self) -> dict[str, pd.DataFrame]:
        """Those of the members, and of `Ensemble.weigh_by`."""
        return {self.ensemble.weigh_by: self.weighing, **self.members}


@dataclass(frozen=True)
class Results:
    """The verdicts of an ensemble on held-out patients, and its measures."""

    inputs: Inputs
    verdicts: Verdicts
    logits: pd.DataFrame  # of `aplsmear.ensembles.combination.logits_of_all`
    measured: dict[str, Any]  # of `aplsmear.ensembles.combination.measure`
    comparison: pd.DataFrame  # of `aplsmear.ensembles.baselines.compare`
    baselines: Baselines  # for new patients
    importance: pd.DataFrame  # of `aplsmear.ensembles.combination.importance`
    cells: Curve  # of `aplsmear.ensembles.cell_curve`
    # Of `aplsmear.evaluation.curves`, by name: roc, band (of the ROC curve), precision_recall, calibration.
    curves: Mapping[str, pd.DataFrame]
    evidence: pd.DataFrame  # of `cell_evidence`
    settings: Mapping[str, Any]  # the parameters that shaped the results


def read_inputs(
    name: str, ensembles: Mapping[str, Ensemble], tasks: Mapping[str, Task], backbones: Mapping[str, Backbone]
) -> Inputs:
    """Read what an ensemble of params.yaml is made from, below the current folder.

    Raises ParamsError if there is no such ensemble; UserError if a diagnosis has no patients, or a member
    or features of a backbone are missing or not named.
    """
    ensemble = named(ensembles, name, "ensembles")
    folder, weighting = Path(f"members/{name}"), Path(f"tuned/{ensemble.weigh_by}")
    folds, tables = Path("splits/folds.csv"), {level: Path(f"dataset/{level}s.csv") for level in LEVELS}
    levels = {task: tasks[task].level for task in [ensemble.weigh_by, *ensemble.members]}
    weights = pd.read_parquet(weighting / "scores.parquet")
    everyone = read_table(folds)
    hashed = [folds, tables["cell"], *(folder / f"{task}.scores.parquet" for task in ensemble.members)]
    mine = {task: levels[task] for task in ensemble.members}
    members = read_members(folder, mine, {levels[ensemble.weigh_by]: weights})
    return Inputs(
        name=name,
        ensemble=ensemble,
        levels=levels,
        everyone=everyone,
        patients=patients_of(everyone, ensemble.positive, ensemble.negative),
        members=members,
        weighing=rounded_summaries(weights),
        items={level: read_table(path).rename(columns={level: "item"}) for level, path in tables.items()},
        features={level: read_features(Path(f"features/{level}"), backbones) for level in LEVELS},
        heads={ensemble.weigh_by: weighting / "heads.npz"}
        | {task: folder / f"{task}.heads.npz" for task in ensemble.members},
        scores={task: pd.read_parquet(folder / f"{task}.scores.parquet") for task in ensemble.members}
        | {ensemble.weigh_by: weights},
        md5={path.as_posix(): md5(path) for path in hashed},
        left_out=json.loads(Path("dataset/report.json").read_text(encoding="utf-8"))["left_out"],
    )


def cell_members(inputs: Inputs) -> dict[str, CellMember]:
    """The members that read cells, each with what it has of all cells, in the order of `Inputs.items`."""
    cells, weigh_by = inputs.items["cell"]["item"], inputs.ensemble.weigh_by

    def scores(task: str) -> np.ndarray:
        table = inputs.scores[task].set_index("item")
        columns = [column for column in table.columns if column.startswith("outer_")]
        return np.asarray(table[columns].reindex(cells).to_numpy())

    found: dict[str, CellMember] = {}
    for task in inputs.ensemble.members:
        if inputs.levels[task] == "cell":
            found[task] = ScoredCells(
                scores(task), scores(weigh_by) if inputs.levels[weigh_by] == "cell" else None
            )
        elif inputs.levels[task] == "patient":
            found[task] = _attended(inputs, task, cells)
    return found


def _attended(inputs: Inputs, task: str, cells: pd.Series) -> AttendedCells:
    """A member of level patient."""
    heads = read_heads(inputs.heads[task])
    features = {head.features: inputs.features["cell"][head.features] for head in heads}
    view = next(iter(features.values())).index["item"].reset_index(drop=True)
    first = view.drop_duplicates()
    row = pd.Series(first.index, first).reindex(cells).to_numpy()
    return AttendedCells(
        heads=heads,
        values={name: each.values for name, each in features.items()},
        row=row,
        views=view.value_counts().reindex(cells).to_numpy() - 1,
        average=read_average(inputs.heads[task]),
    )


def judge_and_compare(inputs: Inputs, combine: Combine, seed: int) -> Results:
    """Judge every patient by models that never saw the patient, and compare with members and baselines."""
    patients, members = inputs.patients, inputs.members
    verdicts = judge(patients, members, draw_candidates(combine, seed), combine.refits, seed, combine.promise)
    label, probability = verdicts.table["label"], verdicts.table["probability"]
    tables = inputs.summaries
    shares = {
        task: tables[task]
        for task in combine.shares
        if task in tables and patients["patient"].isin(tables[task]["patient"]).any()
    }
    judged = baselines_of(patients, members, shares, seed)
    held_out = {name: each.table["probability"].to_numpy() for name, each in judged.items()}
    regression = None
    if pooled := pooled_features(inputs.features["cell"].values(), inputs.items["cell"], patients):
        held_out[POOLED], regression = pooled_baseline(patients, pooled)
    return Results(
        inputs=inputs,
        verdicts=verdicts,
        logits=logits_of_all(verdicts, inputs.everyone, members, seed),
        measured=measure(verdicts.table, combine.resamples, seed) | {"alarm": measure_alarm(verdicts.table)},
        comparison=compare(patients, probability.to_numpy(), held_out),
        baselines=Baselines(
            {name: judged[name].combinations[-1] for name in map(share_of, shares)}, regression
        ),
        importance=importance(verdicts, combine.shuffles, seed),
        cells=cell_curve(verdicts, cell_members(inputs), inputs.items["cell"]["patient"].to_numpy(), seed),
        curves=curve_tables(label, probability, combine.resamples, seed),
        evidence=cell_evidence(inputs, verdicts),
        settings={
            "seed": seed,
            "combine": combine.model_dump(),
            f"ensembles.{inputs.name}": inputs.ensemble.model_dump(),
        },
    )


def cell_evidence(inputs: Inputs, verdicts: Verdicts) -> pd.DataFrame:
    """The table `aplsmear.ensembles.evidence.evidence_table` of the patients of an ensemble.

    Scores, attention and evidence of a cell are those of the models that never saw its patient.
    """
    names = inputs.items["cell"]["item"].to_numpy()
    members = cell_members(inputs)
    places = inputs.items["cell"].groupby("patient").indices
    found: list[Evidence | None] = []
    for patient, fold, logits in zip(
        verdicts.table["patient"], verdicts.table["fold"], verdicts.logits, strict=True
    ):
        if patient not in places:
            continue
        mine, combination = np.asarray(places[patient]), verdicts.combinations[fold]
        items = {
            task: member.items(mine, fold, "mean" if one_item_each(inputs, task) else combination.summary)
            for task, member in members.items()
        }
        found.append(evidence_of(names[mine], items, combination, logits))
    cells = inputs.items["cell"].rename(columns={"item": "cell"})
    cells = cells[cells["patient"].isin(set(verdicts.table["patient"]))]
    smears = inputs.items["smear"].rename(columns={"item": "smear"})
    return evidence_table(smears, cells, {inputs.name: found})


def one_item_each(inputs: Inputs, task: str) -> bool:
    """Whether no patient has more than one item of this task."""
    return bool((inputs.summaries[task]["items"] == 1).all())


def write_results(out: Path, results: Results) -> None:
    """Write the tables, the curves and the measures into the folder ``ensembles/<name>``."""
    table, ensemble = results.verdicts.table, results.inputs.ensemble
    write_table(out / "predictions.csv", table)
    write_table(out / "logits.csv", results.logits)
    write_table(out / "comparison.csv", results.comparison)
    write_table(out / "cells.csv", results.cells.table)
    with whole(out / "evidence.parquet") as part:
        results.evidence.to_parquet(part, index=False)
    drawn = {name: curve.to_dict("records") for name, curve in results.curves.items() if name != "band"}
    write_json(out / "curves.json", drawn)
    names = [ensemble.negative, ensemble.positive]
    write_table(out / "confusion.csv", confusion_table(table["label"], table["verdict"], names))
    write_json(out / "metrics.json", headline(results.measured), digits=4)
    drops = results.importance.rename(columns={"auroc_drop": "value"}).set_index("member").to_dict("index")
    write_json(out / "intervals.json", results.measured | {"auroc_drop_without": drops})


def write_model(
    out: Path, results: Results, backbones: Mapping[str, Backbone], augment: Augment, min_box: int, seed: int
) -> None:
    """Write the bundle that judges new patients (`aplsmear.ensembles.bundle`) into a folder."""
    inputs, ensemble = results.inputs, results.inputs.ensemble
    members = {
        task: Member(task=task, level=level, one_each=one_item_each(inputs, task))
        for task, level in inputs.levels.items()
    }
    mine = [members[task] for task in ensemble.members]
    level: Level = "cell" if any(member.images == "cell" for member in mine) else "smear"
    chosen = reference_features(read_heads(inputs.heads[each.task]) for each in mine if each.images == level)
    fold = dict(zip(inputs.patients["patient"], inputs.patients["fold"], strict=True))
    owner = inputs.items[level].set_index("item")["patient"]
    owner = owner[owner.isin(fold)]
    views = read_views(Path(f"augmented/{level}/views.parquet"), _VIEWS)
    reference = make_reference(fold, dict(owner), inputs.features[level][chosen], views)
    model = Model(
        name=inputs.name,
        positive=ensemble.positive,
        negative=ensemble.negative,
        members=mine,
        weigh_by=members[ensemble.weigh_by],
        seed=seed,
        min_box=min_box,
        augment=augment,
        backbones={
            name: each.model_dump(exclude={"weights", "sha256"}, exclude_unset=True)
            for name, each in backbones.items()
        },
        combinations=[as_json(combination) for combination in results.verdicts.combinations],
        reference_level=level,
        reference_features=chosen,
        cell_curve=results.cells.bundled,
        min_items=float(np.quantile(owner.value_counts(), 1 - COMMON)),
        held_out=results.measured,
        inputs=dict(inputs.md5),
        shares={name: as_json(each) for name, each in results.baselines.shares.items()},
        pooled_features=results.baselines.pooled.layer if results.baselines.pooled else "",
    )
    write_bundle(out, model, inputs.heads, Path("backbones"), reference, results.baselines.pooled)
