"""Summarise, patient by patient, what one task says to one ensemble; its heads go along for new patients.

Usage: python stages/member.py ENSEMBLE TASK WEIGHER   (a name of `ensembles` in params.yaml, two of `tasks`)
"""

from pathlib import Path

from aplsmear.files import copy_whole
from aplsmear.members import summarise_patients
from aplsmear.params import named, read_params
from aplsmear.stage import run
from aplsmear.tables import read_scores, write_table


def main(ensemble: str, task: str, weigher: str) -> None:
    params = read_params(Path("params.yaml"))
    level, of_weigher = (named(params.tasks, name, "tasks").level for name in (task, weigher))
    scores, weights = (read_scores(Path(f"tuned/{name}/scores.parquet")) for name in (task, weigher))
    table = summarise_patients(scores, weights if level == of_weigher else None)
    write_table(Path(f"members/{ensemble}/{task}.csv"), table)
    copy_whole(Path(f"tuned/{task}/heads.npz"), Path(f"members/{ensemble}/{task}.heads.npz"))


if __name__ == "__main__":
    run(main)
