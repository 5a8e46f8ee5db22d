"""Train on from the tuned head of the one `task` of params.yaml, with the uppermost blocks of its backbone.

A run that was cut off goes on from its last epoch (what it keeps lies in .finetuning/ until it is done).
"""

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.data.tasks import task_labels
from aplsmear.evaluation.curves import roc_curve_table
from aplsmear.features.store import read_features
from aplsmear.files import hold, whole, write_json
from aplsmear.finetune.finetuning import (
    Deepened,
    FinetuneContext,
    compare,
    courses_table,
    deepen,
    examples,
    final_model,
    finetune_key,
    history_table,
    predict_held_out,
    starts,
    write_explanations,
)
from aplsmear.finetune.training import Course, Run, check_precision
from aplsmear.heads.head import read_heads
from aplsmear.heads.task_data import make_task_data
from aplsmear.images.view_store import plain_views
from aplsmear.params import read_params
from aplsmear.progress import progress
from aplsmear.runs.stage import home, origin, run
from aplsmear.runs.tracking import Tracker
from aplsmear.tables import read_table, write_table


def main() -> None:
    params = read_params(Path("params.yaml"))
    name, settings, seed = params.task, params.finetune, params.seed
    task, tuned = params.tasks[name], Path(f"tuned/{name}")
    start_tensorflow(params.compute.threads)
    check_precision(settings.precision)
    items = read_table(Path(f"dataset/{task.level}s.csv")).assign(item=lambda table: table[task.level])
    task_data = make_task_data(
        items,
        task_labels(items, task),
        read_table(Path("splits/folds.csv")),
        read_features(Path(f"features/{task.level}"), params.backbones),
    )
    best = yaml.safe_load((tuned / "best.yaml").read_text(encoding="utf-8"))
    found = starts(best, read_table(tuned / "trials.csv"), read_heads(tuned / "heads.npz"), settings.trial)
    views = Path(f"augmented/{task.level}/views.parquet")
    context = FinetuneContext(
        task_data,
        settings,
        params.tune_of(name),
        params.backbones,
        task.level,
        views,
        params.augment.brightness,
        seed,
        items[settings.head.subclasses].to_numpy() if settings.head.subclasses else None,
    )
    key = f"{name}-{finetune_key(context, found, params.compute.threads)}"
    context.folder = home() / ".finetuning" / key
    # Two experiments at once may need the same training: the second waits.
    lock = hold(context.folder.with_suffix(".lock"))
    knobs = {"seed": seed} | settings.model_dump()
    tracker = Tracker(home(), f"finetune {name}", key, origin("finetune", name), knobs)

    done: list[Deepened] = []
    courses: dict[Run, Course] = {}
    for trained, course in progress(deepen(context, found, done), "epochs", note=how_it_goes):
        courses[trained] = course
    log_courses(tracker, courses)
    *outer_folds, final = done
    predictions = predict_held_out(context, done)
    metrics = compare(predictions, read_table(tuned / "predictions.csv"), params.combine.resamples, seed) | {
        "task": name,
        "epochs": final.epochs,
        "folds": len(outer_folds),
        "folds_left_frozen": sum(not outer_fold.epochs for outer_fold in outer_folds),
    }
    history = courses_table(done)
    model = final_model(context, final)

    out = Path("finetuned")
    write_table(out / "predictions.csv", predictions)
    write_table(out / "roc.csv", roc_curve_table(predictions["label"], predictions["probability"]))
    write_table(out / "courses.csv", history)
    write_table(out / "history.csv", history_table(history))
    write_json(out / "metrics.json", metrics, digits=4)
    with whole(out / "architecture.json") as part:
        part.write_text(model.to_json() + "\n", encoding="utf-8")
    model.save_weights(context.folder / "model.weights.h5")
    (context.folder / "model.weights.h5").replace(out / "model.weights.h5")
    chosen = examples(predictions, settings.pictures)
    pictures = plain_views(views, set(chosen["item"]))
    write_explanations(context, done, chosen, pictures, out / "explanations")

    if settings.log_model:
        tracker.log_model(model)
    if settings.log_images:
        tracker.log_pictures(out / "explanations")
    difference = metrics["difference"]
    tracker.close({}, {"auroc": metrics["auroc"]["value"], "difference": difference["value"]})
    shutil.rmtree(context.folder)
    lock.close()
    print(
        f"{name}: AUROC {metrics['auroc']['value']:.3f}, frozen {metrics['frozen']['auroc']:.3f}; difference "
        f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f}); "
        f"{sum(course.seconds for course in courses.values()) / 60:.1f} minutes of training",
        file=sys.stderr,
    )
    if metrics["folds_left_frozen"]:
        print(
            f"{metrics['folds_left_frozen']} of {len(outer_folds)} folds stay with the frozen model: "
            "their inner folds gained nothing",
            file=sys.stderr,
        )


def how_it_goes(step: tuple[Run, Course]) -> str:
    """The remark beside the progress bar."""
    trained, course = step
    return f"{trained.name}" + (f" AUROC {course.auroc[-1]:.3f}" if course.auroc else "")


def log_courses(tracker: Tracker, courses: Mapping[Run, Course]) -> None:
    """Each model as a nested run, with its curves over the epochs."""
    now = time.time()
    for number, (trained, course) in enumerate(courses.items()):
        tracker.log_trial(
            number,
            {"held_out": sorted(trained.held_out), "judged": trained.judged, "epochs": len(course.loss)},
            {"best_auroc": max(course.auroc)} if course.auroc else {},
            started=now - course.seconds,
            ended=now,
            name=trained.name,
            curves={"auroc": course.auroc, "loss": course.loss},
        )


if __name__ == "__main__":
    run(main)
