"""Search for the head of one task on bottleneck features, and score every item by heads that never saw its patient.

Usage: python stages/tune.py TASK   (a name of `tasks` in params.yaml)
"""

from dataclasses import asdict
from pathlib import Path

import yaml

from aplsmear.curves import roc_curve_table
from aplsmear.features import read_features
from aplsmear.heads import write_heads
from aplsmear.params import read_params
from aplsmear.runtime import start_tensorflow
from aplsmear.stage import run
from aplsmear.statistics import write_json
from aplsmear.tables import read_table, write_table
from aplsmear.tasks import task_labels
from aplsmear.tracking import Tracker
from aplsmear.tuning import (
    choose,
    explain_choice,
    held_out_predictions,
    held_out_scores,
    make_board,
    measure,
    open_study,
    run_study,
    scores_table,
    study_key,
    trials_table,
)


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    task, settings = params.tasks[name], params.tune_of(name)
    start_tensorflow(params.compute.threads)

    items = read_table(Path(f"dataset/{task.level}s.csv")).assign(item=lambda table: table[task.level])
    board = make_board(
        items,
        task_labels(items, task),
        read_table(Path("splits/folds.csv")),
        read_features(Path(f"features/{task.level}"), params.backbones),
    )
    key = study_key(board, settings, params.seed)
    tracker = Tracker(f"tune {name}", {"stage": "tune", "task": name, "study": key})
    trials = []
    for trial in run_study(board, settings, params.seed, open_study(Path(f".studies/{name}.journal"), key)):
        trials.append(trial)
        tracker.log_trial(trial.number, asdict(trial.recipe), {"inner_auroc": trial.auroc(board.folds)})
    worlds = [choose(trials, world) for world in range(board.folds + 1)]
    scores, heads = held_out_scores(board, [trial for trial, _ in worlds], settings, params.seed)

    predictions = held_out_predictions(board, scores)
    metrics = measure(predictions, params.combine.resamples, params.seed)
    best = explain_choice(trials, worlds)

    out = Path(f"tuned/{name}")
    write_table(out / "trials.csv", trials_table(trials, board.folds + 1))
    write_table(out / "predictions.csv", predictions)
    write_table(out / "roc.csv", roc_curve_table(predictions["label"], predictions["probability"]))
    scores_table(board, scores).to_parquet(out / "scores.parquet", index=False)
    write_heads(out / "heads.npz", heads)
    write_json(out / "metrics.json", metrics)
    (out / "best.yaml").write_text(yaml.safe_dump(best, sort_keys=False, allow_unicode=True))
    tracker.close(best["recipe"], {"auroc": metrics["auroc"]["value"]})


if __name__ == "__main__":
    run(main)
