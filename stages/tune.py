"""Search for the head of one task on features; score every item by heads trained without its patient.

Usage: python stages/tune.py TASK            (a name of `tasks` in params.yaml)
       python stages/tune.py TASK --worker   (trains trials of the study that the first form runs, here or on
                                              another machine, and writes nothing)
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from aplsmear.errors import UserError
from aplsmear.heads.results import conclude
from aplsmear.heads.search import Trial, run_study, study_key
from aplsmear.heads.study import STORAGE_VARIABLE, open_study
from aplsmear.heads.task_data import read_task_data
from aplsmear.params import named, read_params
from aplsmear.progress import progress
from aplsmear.runs.stage import home, origin, run
from aplsmear.runs.tracking import Tracker


def main(name: str, role: str = "") -> None:
    if role not in ("", "--worker"):
        raise UserError(f"{role!r}: the only word after the task is --worker")
    params = read_params(Path("params.yaml"))
    task = named(params.tasks, name, "tasks")
    settings, seed = params.tune_of(name), params.seed

    task_data = read_task_data(task, params.backbones)
    key = f"{name}-{study_key(task_data, settings, seed)}"
    url = os.environ.get(STORAGE_VARIABLE, settings.storage)
    journal = home() / f".studies/{key}.journal"
    study = open_study(key, journal, url)
    print(f"study {key}", file=sys.stderr)
    running = run_study(task_data, settings, seed, study)
    final_model = task_data.folds  # its number as an outer fold (aplsmear.evaluation.splits)
    finished = progress(running, "trials", settings.trials, best_so_far(final_model))
    if role == "--worker":
        for _ in finished:
            pass
        return

    dashboard = f"optuna-dashboard {'<the URL of the storage>' if url else journal.relative_to(home())}"
    tags = origin("tune", name) | {"optuna_study": key, "optuna_dashboard": dashboard}
    tracker = Tracker(home(), f"tune {name}", key, tags, {"seed": seed, "trials": settings.trials})
    trials = list(logged(finished, tracker, task_data.folds))
    results = conclude(task_data, study, trials, settings, seed, params.combine.resamples, settings.pick)
    results.write(Path(f"tuned/{name}"))
    chosen = {"chosen": str(results.best["trial"]), "why": results.best["why"]}
    tracker.close(chosen, {"auroc": results.metrics["auroc"]["value"]})


def best_so_far(outer_fold: int) -> Callable[[Trial], str]:
    """A note for the progress bar: the best inner AUROC in this outer fold so far."""
    best = 0.0

    def note(trial: Trial) -> str:
        nonlocal best
        best = best if trial.failure else max(best, trial.auroc(outer_fold))
        return f"best AUROC {best:.3f}"

    return note


def logged(trials: Iterable[Trial], tracker: Tracker, folds: int) -> Iterator[Trial]:
    """Log each trial in MLflow (recipe, AUROC overall and on each fold) and pass it on."""
    for trial in trials:
        metrics = {"auroc": trial.auroc(folds)}
        metrics |= {f"auroc_fold_{fold}": value for fold, value in enumerate(trial.by_fold())}
        tracker.log_trial(
            trial.number,
            asdict(trial.recipe),
            metrics,
            started=trial.started,
            ended=trial.ended,
            failure=trial.failure,
        )
        yield trial


if __name__ == "__main__":
    run(main)
