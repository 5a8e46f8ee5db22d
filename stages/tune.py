"""Search for the head of one task on features; score every item by heads that never saw its patient.

Usage: python stages/tune.py TASK            (a name of `tasks` in params.yaml)
       python stages/tune.py TASK --worker   (joins in with the study that the first form runs, here or on
                                              another machine, and writes nothing)
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.data.tasks import task_items, task_labels
from aplsmear.errors import UserError
from aplsmear.evaluation.curves import roc_curve_table
from aplsmear.evaluation.intervals import headline
from aplsmear.features.store import read_features
from aplsmear.files import whole, write_json
from aplsmear.heads.head import write_heads
from aplsmear.heads.search import (
    TaskData,
    Trial,
    choose_all,
    explain_choice,
    held_out_predictions,
    held_out_scores,
    importances,
    make_patient_task_data,
    make_task_data,
    measure,
    run_study,
    scores_table,
    study_key,
    trials_table,
)
from aplsmear.heads.study import STORAGE_VARIABLE, open_study
from aplsmear.params import Params, Task, named, read_params
from aplsmear.progress import progress
from aplsmear.runs.stage import home, origin, run
from aplsmear.runs.tracking import Tracker
from aplsmear.tables import read_table, write_table


def main(name: str, role: str = "") -> None:
    if role not in ("", "--worker"):
        raise UserError(f"{role!r} is neither left out nor --worker")
    params = read_params(Path("params.yaml"))
    task = named(params.tasks, name, "tasks")
    settings = params.tune_of(name)
    threads = params.compute.threads
    start_tensorflow(threads)

    task_data = task_data_of(task, params)
    key = f"{name}-{study_key(task_data, settings, params.seed, threads)}"
    url = os.environ.get(STORAGE_VARIABLE, settings.storage)
    journal = home() / f".studies/{key}.journal"
    study = open_study(key, journal, url)
    print(f"study {key}", file=sys.stderr)
    running = run_study(task_data, settings, params.seed, study)
    found = progress(running, "trials", settings.trials, best_so_far(task_data.folds))
    if role:
        for _ in found:
            pass
        return

    dashboard = f"optuna-dashboard {'<the URL of the storage>' if url else journal.relative_to(home())}"
    described = origin("tune", name) | {"optuna_study": key, "optuna_dashboard": dashboard}
    tracker = Tracker(
        home(), f"tune {name}", key, described, {"seed": params.seed, "trials": settings.trials}
    )
    trials = list(logged(found, tracker, task_data.folds))
    choices = choose_all(trials, task_data.folds, settings.pick.get(name))
    scores, heads = held_out_scores(task_data, [choice.trial for choice in choices], settings, params.seed)
    predictions = held_out_predictions(task_data, scores)
    metrics = measure(predictions, params.combine.resamples, params.seed)
    important = importances(study.trials(), params.seed)
    explained = {"study": key} | explain_choice(trials, choices, important)

    out = Path(f"tuned/{name}")
    write_table(out / "trials.csv", trials_table(trials, choices))
    write_table(out / "predictions.csv", predictions)
    write_table(out / "roc.csv", roc_curve_table(predictions["label"], predictions["probability"]))
    with whole(out / "scores.parquet") as part:
        scores_table(task_data, scores).to_parquet(part, index=False)
    write_heads(out / "heads.npz", heads, settings.average)
    write_json(out / "metrics.json", headline(metrics), digits=4)
    with whole(out / "best.yaml") as part:
        part.write_text(yaml.safe_dump(explained, sort_keys=False, allow_unicode=True), encoding="utf-8")
    tracker.close(
        {"chosen": str(explained["trial"]), "why": explained["why"]}, {"auroc": metrics["auroc"]["value"]}
    )


def task_data_of(task: Task, params: Params) -> TaskData:
    """All that the study of a task works on; the tables that it is made from are not kept."""
    images = task_items(read_table(Path(f"dataset/{task.images}s.csv")), task.images)
    items = task_items(images, task.level)
    label = task_labels(items, task)
    folds = read_table(Path("splits/folds.csv"))
    features = read_features(Path(f"features/{task.images}"), params.backbones)
    if task.level == "patient":
        return make_patient_task_data(images, items, label, folds, features)
    return make_task_data(items, label, folds, features)


def best_so_far(outer_fold: int) -> Callable[[Trial], str]:
    """The remark beside the progress bar."""
    best = 0.0

    def note(trial: Trial) -> str:
        nonlocal best
        best = best if trial.failure else max(best, trial.auroc(outer_fold))
        return f"best AUROC {best:.3f}"

    return note


def logged(trials: Iterable[Trial], tracker: Tracker, folds: int) -> Iterator[Trial]:
    """Pass trials on and log each: its recipe, and its AUROC overall and on every fold."""
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
