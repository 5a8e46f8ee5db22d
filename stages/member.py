"""Summarise, patient by patient, what one task says to one ensemble.

Usage: python stages/member.py ENSEMBLE TASK   (names of `ensembles` and `tasks` in params.yaml)
"""

import sys
from pathlib import Path

import pandas as pd

from aplsmear.members import summarise_patients
from aplsmear.tables import write_table


def main(ensemble: str, task: str) -> None:
    scores = pd.read_parquet(Path(f"tuned/{task}/scores.parquet"))
    write_table(Path(f"members/{ensemble}/{task}.csv"), summarise_patients(scores))


if __name__ == "__main__":
    main(*sys.argv[1:])
