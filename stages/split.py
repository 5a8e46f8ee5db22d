"""Divide patients, or whole sites, into stratified folds, once for all tasks and ensembles."""

from pathlib import Path

from aplsmear.evaluation.splits import make_folds
from aplsmear.params import read_params
from aplsmear.runs.stage import run
from aplsmear.tables import read_table, write_table


def main() -> None:
    params = read_params(Path("params.yaml"))
    smears = read_table(Path("dataset/smears.csv"))
    folds = make_folds(smears, params.split.folds, params.seed, params.split.by)
    write_table(Path("splits/folds.csv"), folds)


if __name__ == "__main__":
    run(main)
