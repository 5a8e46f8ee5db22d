"""Divide patients, or whole sites, into stratified folds, once for all tasks and ensembles."""

from pathlib import Path

from aplsmear.data.tasks import patient_rows
from aplsmear.evaluation.splits import make_folds
from aplsmear.params import read_params
from aplsmear.runs.stage import run
from aplsmear.tables import read_table, write_table


def main() -> None:
    params = read_params(Path("params.yaml"))
    patients = patient_rows(*(read_table(Path(f"dataset/{level}s.csv")) for level in ("smear", "cell")))
    folds = make_folds(patients, params.split.folds, params.seed, params.split.by)
    write_table(Path("splits/folds.csv"), folds)


if __name__ == "__main__":
    run(main)
