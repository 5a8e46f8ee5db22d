"""Combine the members of one ensemble into a calibrated probability and a verdict per patient.

Usage: python stages/ensemble.py ENSEMBLE   (a name of `ensembles` in params.yaml)
"""

from dataclasses import replace
from pathlib import Path

from aplsmear.ensembles.baselines import baselines_of, compare, pooled_baseline, pooled_features
from aplsmear.ensembles.bundle import (
    Member,
    describe_usual,
    make_model,
    make_reference,
    reference_features,
    write_bundle,
)
from aplsmear.ensembles.combination import (
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
from aplsmear.features.store import read_features
from aplsmear.files import write_json
from aplsmear.heads.head import read_heads
from aplsmear.images.view_store import plain_views, read_views
from aplsmear.params import LEVELS, Level, named, read_params
from aplsmear.reports.ensemble import Findings, wanted_cells, write_page
from aplsmear.reports.model_card import write_model_card
from aplsmear.runs.checksums import md5
from aplsmear.runs.stage import run
from aplsmear.tables import read_scores, read_table, write_table


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    ensemble, combine = named(params.ensembles, name, "ensembles"), params.combine
    inputs = folds, cells = Path("splits/folds.csv"), Path("dataset/cells.csv")
    patients = patients_of(read_table(folds), ensemble.positive, ensemble.negative)
    folder = Path(f"members/{name}")
    levels = {task: each.level for task, each in params.tasks.items()}
    weights = read_scores(Path(f"tuned/{ensemble.weigh_by}/scores.parquet"))
    members = read_members(
        folder, {task: levels[task] for task in ensemble.members}, {levels[ensemble.weigh_by]: weights}
    )
    candidates = draw_candidates(combine, params.seed)
    verdicts = judge(patients, members, candidates, combine.refits, params.seed)

    baselines = baselines_of(patients, members, combine.shares, params.seed)
    features = {level: read_features(Path(f"features/{level}"), params.backbones) for level in LEVELS}
    items = {
        "cell": read_table(cells).rename(columns={"cell": "item"}),
        "smear": read_table(Path("dataset/smears.csv")).rename(columns={"smear": "item"}),
    }
    if pooled := pooled_features(features["cell"].values(), items["cell"], patients):
        baselines["mean-pooled features"] = pooled_baseline(patients, pooled)

    important = importance(verdicts, combine.shuffles, params.seed)
    of_cells = important[[levels[task] == "cell" for task in important["member"]]]
    pictured_by = "" if of_cells.empty else str(of_cells.loc[of_cells["auroc_drop"].idxmax(), "member"])
    wanted = wanted_cells(verdicts, pictured_by, members[pictured_by]) if pictured_by else {}
    names = {cell for ends in wanted.values() for end in ends for cell in end}

    table = verdicts.table
    label, probability = table["label"], table["probability"]
    findings = Findings(
        name=name,
        ensemble=ensemble,
        verdicts=verdicts,
        members=members,
        measured=measure(verdicts, combine.resamples, params.seed),
        comparison=compare(patients, probability.to_numpy(), baselines),
        importance=important,
        roc=roc_curve_table(label, probability),
        band=roc_band_table(label, probability, combine.resamples, params.seed),
        precision_recall=precision_recall_table(label, probability),
        calibration=calibration_table(label, probability),
        pictures=plain_views(Path("augmented/cell/views.parquet"), names) if names else {},
        pictured_by=pictured_by,
        inputs={
            path.as_posix(): md5(path)
            for path in [*inputs, *(folder / f"{task}.scores.parquet" for task in ensemble.members)]
        },
        settings={
            "seed": params.seed,
            "combine": combine.model_dump(),
            f"ensembles.{name}": ensemble.model_dump(),
        },
    )

    out = Path(f"ensembles/{name}")
    write_table(out / "predictions.csv", table)
    write_table(out / "comparison.csv", findings.comparison)
    curves = ("roc", "precision_recall", "calibration")
    write_json(out / "curves.json", {curve: getattr(findings, curve).to_dict("records") for curve in curves})
    write_table(
        out / "confusion.csv",
        confusion_table(label, table["verdict"], [ensemble.negative, ensemble.positive]),
    )
    write_json(out / "metrics.json", headline(findings.measured), digits=4)
    drops = important.rename(columns={"auroc_drop": "value"}).set_index("member").to_dict("index")
    write_json(out / "intervals.json", findings.measured | {"auroc_drop_without": drops})
    heads = {ensemble.weigh_by: Path(f"tuned/{ensemble.weigh_by}/heads.npz")}
    heads |= {task: folder / f"{task}.heads.npz" for task in ensemble.members}
    of_task = {
        task: Member(
            task=task,
            level=levels[task],
            one_each=task in members and bool((members[task]["items"] == 1).all()),
        )
        for task in heads
    }
    level: Level = "cell" if any(of_task[task].images == "cell" for task in ensemble.members) else "smear"
    chosen = reference_features(
        read_heads(heads[task]) for task in ensemble.members if of_task[task].images == level
    )
    reference = make_reference(
        patients,
        items[level],
        level,
        features[level][chosen],
        read_views(Path(f"augmented/{level}/views.parquet"), 256),
    )
    if combine.standardise:
        read = [(of_task[task].images, read_heads(path)) for task, path in heads.items()]
        reference = replace(reference, usual=describe_usual(patients, items, features, read))
    model = make_model(
        name=name,
        positive=ensemble.positive,
        negative=ensemble.negative,
        members=[of_task[task] for task in ensemble.members],
        weigh_by=of_task[ensemble.weigh_by],
        seed=params.seed,
        min_box=params.dataset.min_box,
        augment=params.augment,
        backbones=params.backbones,
        combinations=verdicts.combinations,
        reference_level=level,
        reference_features=chosen,
        min_items=reference.min_items,
        pictured_by=pictured_by,
        high_is_positive=bool(pictured_by) and high_is_positive(verdicts, pictured_by),
        standardise=combine.standardise,
        inputs=findings.inputs,
    )
    write_bundle(out / "model", model, heads, Path("backbones"), reference)
    write_page(out / "report.html", findings)
    write_model_card(out / "model_card.md", findings)


if __name__ == "__main__":
    run(main)
