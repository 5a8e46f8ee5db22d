"""Combine the members of one ensemble into a calibrated probability and a verdict per patient.

Usage: python stages/ensemble.py ENSEMBLE   (a name of `ensembles` in params.yaml)
"""

from pathlib import Path

from aplsmear.comparison import compare, pooled_features, pooled_rival, rivals_of
from aplsmear.curves import calibration_table, confusion_table, precision_recall_table, roc_curve_table
from aplsmear.ensembles import (
    as_model,
    draw_candidates,
    importance,
    judge,
    measure,
    patients_of,
    read_members,
)
from aplsmear.features import read_features
from aplsmear.params import read_params
from aplsmear.stage import run
from aplsmear.statistics import write_json
from aplsmear.tables import read_table, write_table


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    ensemble, combine = params.ensembles[name], params.combine
    patients = patients_of(read_table(Path("splits/folds.csv")), ensemble.positive, ensemble.negative)
    members = read_members(Path(f"members/{name}"), ensemble.members)
    candidates = draw_candidates(combine, params.seed)
    verdicts = judge(patients, members, candidates, combine.refits, params.seed)

    rivals = rivals_of(patients, members, combine.shares, params.seed)
    features = read_features(Path("features/cell"), params.backbones)
    cells = read_table(Path("dataset/cells.csv")).rename(columns={"cell": "item"})
    if pooled := pooled_features(features.values(), cells, patients):
        rivals["mean-pooled features"] = pooled_rival(patients, pooled)

    out = Path(f"ensembles/{name}")
    table = verdicts.table
    label, probability = table["label"], table["probability"]
    names = [ensemble.negative, ensemble.positive]
    write_table(out / "predictions.csv", table)
    write_table(out / "comparison.csv", compare(patients, probability.to_numpy(), rivals))
    write_table(out / "importance.csv", importance(verdicts, combine.shuffles, params.seed))
    write_table(out / "roc.csv", roc_curve_table(label, probability))
    write_table(out / "precision_recall.csv", precision_recall_table(label, probability))
    write_table(out / "calibration.csv", calibration_table(label, probability))
    write_table(out / "confusion.csv", confusion_table(label, table["verdict"], names))
    write_json(out / "metrics.json", measure(verdicts, combine.resamples, params.seed))
    write_json(out / "model" / "combination.json", as_model(verdicts, ensemble), digits=12)


if __name__ == "__main__":
    run(main)
