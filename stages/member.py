"""Copy the scores and the heads of one task into the folder of an ensemble.

Usage: python stages/member.py ENSEMBLE TASK   (a name of `ensembles` in params.yaml, one of `tasks`)
"""

from pathlib import Path

from aplsmear.files import copy_whole
from aplsmear.params import named, read_params
from aplsmear.runs.stage import run


def main(ensemble: str, task: str) -> None:
    params = read_params(Path("params.yaml"))
    named(params.ensembles, ensemble, "ensembles")
    named(params.tasks, task, "tasks")
    for name in ("heads.npz", "scores.parquet"):
        copy_whole(Path(f"tuned/{task}/{name}"), Path(f"members/{ensemble}/{task}.{name}"))


if __name__ == "__main__":
    run(main)
