"""Summarise, patient by patient, what one task says to one ensemble.

Usage: python stages/member.py ENSEMBLE TASK   (names of `ensembles` and `tasks` in params.yaml)
"""

from pathlib import Path

from aplsmear.members import summarise_patients
from aplsmear.stage import run
from aplsmear.tables import read_scores, write_table


def main(ensemble: str, task: str) -> None:
    scores = read_scores(Path(f"tuned/{task}/scores.parquet"))
    write_table(Path(f"member_{ensemble}/{task}.csv"), summarise_patients(scores))


if __name__ == "__main__":
    run(main)
