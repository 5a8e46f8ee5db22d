"""How fast the search is, beside `keras.Model.fit`, end-to-end training, and the bare matrix products.

Usage: python benchmarks/tuning.py [--data DIR --weights FILE --work DIR] [--task T] [--trials N] [--fits N]

With --data (a folder in the Kaggle layout) and --weights (of MobileNet, alpha 1), the stages of the pipeline
make features in the folder --work; without, the features of `make demo` are used. Everything is measured in
this process on the same features, folds, candidates and epochs, and nothing stops early. The search and the
bare products use one thread, TensorFlow all cores. What is too slow to measure whole is measured on a random
part and extrapolated: such names begin with `extrapolated_`. Results go to benchmarks/results/tuning.json,
one section a data set.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aplsmear.heads.stack import JUDGED, Material, judge_heads, pace, steps_of_epoch, train_heads

# The library comes first: it pins what NumPy reads when it is imported.
# isort: split
import numpy as np
import yaml
from networks import keras_network
from record import commit, machine

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.evaluation.auroc import auroc_within_folds
from aplsmear.evaluation.splits import tuning_sets
from aplsmear.files import write_json
from aplsmear.heads.head import Job, Recipe, TrainingItems, layer_sizes, padded_deviation, score
from aplsmear.heads.search import draw_candidates
from aplsmear.heads.task_data import TaskData, read_task_data
from aplsmear.images.reading import decode
from aplsmear.images.view_store import read_views
from aplsmear.params import Params, Tune, read_params

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tuning.json"
LAYER = "conv_pw_12_relu"
TASKS = ["blast", "apl_aml_cell"]  # those that any set of leukaemia cells can be asked

# What is searched here: the knobs that cost time, spread as a user would spread them.
SPACE: dict[str, Any] = {
    "views": [0],
    "depth": [0, 1, 2],
    "width": [16, 32, 64, 128],
    "batch": [32],  # Keras's own
    "epochs": [10, 20],
    "mixup": [0.0],  # Keras's loop has no mixup
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--task", default="")
    parser.add_argument("--work", type=Path, default=ROOT)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--fits", type=int, default=24, help="fits of Keras's loop that are measured")
    asked = parser.parse_args()
    if asked.data:
        prepare(asked.work, asked.data, asked.weights)
    os.chdir(asked.work)
    task = asked.task or ("blast" if asked.data else "apl_aml_cell")
    params = read_params(Path("params.yaml"))
    task_data = read_task_data(params.tasks[task], params.backbones)
    tune = params.tune_of(task)
    space = tune.space.model_dump() | SPACE
    tune = Tune.model_validate(tune.model_dump() | {"trials": asked.trials, "patience": 0, "space": space})
    found = measure(task_data, tune, params, asked.fits)
    found |= {
        "data": "real cells" if asked.data else "demo",
        "task": task,
        "machine": machine(),
        "commit": commit(),
    }
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    section = "real" if asked.data else "demo"
    whole[section] = found
    if section == "real" or "speedup_vs_fit" not in whole:
        names = ("speedup_vs_fit", "speedup_vs_end_to_end", "times_arithmetic", "auroc_difference")
        whole |= {name: found[name] for name in names}
    write_json(RESULTS, whole)
    print(json.dumps(found, indent=2))


def prepare(work: Path, data: Path, weights: Path) -> None:
    """Features of a data set in a folder of their own, by the stages of the pipeline."""
    work.mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section in ("tasks", "overrides"):
        params[section] = {task: row for task, row in params[section].items() if task in TASKS}
    params["ensembles"] = {
        "apl_aml": params["ensembles"]["apl_aml"] | {"members": TASKS, "weigh_by": TASKS[0]}
    }
    params |= {"task": TASKS[0]}
    params["dataset"] |= {"root": str(data.resolve()), "source": "folder", "skip_bad_images": True}
    params["augment"] |= {"views": 0, "size": {"cell": 160, "smear": 64}}
    params["backbones"] = {
        "mobilenet": {
            "application": "MobileNet",
            "options": {},
            "input_size": {"cell": 160, "smear": 64},
            "layer": [LAYER],
            "weights": str(weights.resolve()),
            "batch": 64,
        }
    }
    (work / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    if not (work / "features" / "cell" / "mobilenet" / f"{LAYER}.npy").exists():
        for stage in (["download"], ["split"], ["augment"], ["bottleneck", "mobilenet"]):
            script = [sys.executable, "-P", str(ROOT / "stages" / f"{stage[0]}.py"), *stage[1:]]
            subprocess.run(script, cwd=work, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, check=True)


def measure(task_data: TaskData, tune: Tune, params: Params, fits: int) -> dict[str, Any]:
    """Everything about one data set."""
    recipes, _ = draw_candidates(tune, sorted(task_data.features), params.seed)
    material = task_data.material(tune, params.seed)
    jobs = [
        Job(number, recipe, pair)
        for number, recipe in enumerate(recipes)
        for pair in tuning_sets(task_data.folds)
    ]
    load = os.getloadavg()[0]
    stacked, _ = timed(lambda: judge_heads(jobs, material, 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bare = bare_arithmetic(jobs, material)
    tf = start_tensorflow()
    random = np.random.Generator(np.random.Philox(params.seed))
    sample = [jobs[i] for i in sorted(random.choice(len(jobs), min(fits, len(jobs)), replace=False))]
    keras_seconds, keras_aurocs = zip(*(keras_fit(job, material, tf.keras) for job in sample), strict=True)
    share = sum(steps_of(job, material) for job in sample) / sum(steps_of(job, material) for job in jobs)
    mine = own_aurocs(sample, material)
    image_seconds = end_to_end(params, task_data, tf.keras)
    images = sum(images_of(job, material) for job in jobs)
    found = {
        "trials": len(recipes),
        "heads": len(jobs),
        "items": len(material.items.row),
        "channels": next(iter(material.values.values())).shape[1],
        "seconds": stacked,
        "trials_per_minute": 60 * len(recipes) / stacked,
        "peak_memory_gb": peak,
        "keras_fits_measured": len(sample),
        "keras_seconds_of_these": sum(keras_seconds),
        "extrapolated_keras_seconds": sum(keras_seconds) / share,
        "speedup_vs_fit": sum(keras_seconds) / share / stacked,
        "arithmetic_seconds": bare,
        "times_arithmetic": stacked / bare,
        "end_to_end_milliseconds_per_image": 1000 * image_seconds,
        "extrapolated_end_to_end_seconds": images * image_seconds,
        "speedup_vs_end_to_end": images * image_seconds / stacked,
        "auroc": float(np.mean(mine)),
        "auroc_keras": float(np.mean(keras_aurocs)),
        "auroc_difference": float(np.mean(mine) - np.mean(keras_aurocs)),
        "load_before": load,
    }
    return found | {"growth": growth(task_data, tune, params)}


def timed(action: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def steps_of(job: Job, material: Material) -> int:
    """Steps of training, to which a fit of Keras is about proportional."""
    return job.recipe.epochs * steps_of_epoch(material.items, len(job.held_out), job.recipe.batch)


def images_of(job: Job, material: Material) -> float:
    """Images that pass the backbone in one fit: training and held-out ones in every epoch."""
    return job.recipe.epochs * len(material.items.row)


def held_out_auroc(job: Job, probability: np.ndarray, material: Material) -> float:
    """Mean AUROC on a job's held-out folds, of the probabilities of all items."""
    items = material.items
    each = [
        auroc_within_folds(items.label[rows], probability[rows], np.zeros(len(rows), int))
        for rows in (np.flatnonzero(items.fold == fold) for fold in sorted(job.held_out))
    ]
    return float(np.nanmean(each))


def own_aurocs(jobs: Sequence[Job], material: Material) -> list[float]:
    """Held-out AUROC of heads trained to their last epoch."""
    heads = train_heads(jobs, material)
    return [
        held_out_auroc(job, score(head, material.values[head.features], material.items.row), material)
        for job, head in zip(jobs, heads, strict=True)
    ]


def keras_fit(job: Job, material: Material, keras: Any) -> tuple[float, float]:
    """Seconds and held-out AUROC of one head by the loop of Keras: build, compile, fit and validate."""
    items, recipe = material.items, job.recipe
    x = np.asarray(material.values[recipe.features])[items.row].astype(np.float32)
    inside = ~np.isin(items.fold, sorted(job.held_out))
    label = items.label.astype(np.float32)
    started = time.perf_counter()
    mean, spread = x[inside].mean(axis=0), x[inside].std(axis=0)
    x = (x - mean) / padded_deviation(spread)
    heavier = ((label[inside] == 0).sum() / (label[inside] == 1).sum()) ** recipe.balance
    weight = np.where(label == 1, heavier, 1.0)
    weight /= weight[inside].mean()
    keras.utils.set_random_seed(material.seed + job.trial)
    model = keras.Sequential([keras.Input((x.shape[1],))])
    for _ in range(recipe.depth):
        model.add(keras.layers.Dense(recipe.width, activation=recipe.activation))
        model.add(keras.layers.Dropout(recipe.dropout))
    model.add(keras.layers.Dense(1, activation="sigmoid"))
    optimizer = keras.optimizers.AdamW(recipe.learning_rate, weight_decay=recipe.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, keras.losses.BinaryCrossentropy(label_smoothing=recipe.smoothing))
    model.fit(
        x[inside],
        label[inside],
        sample_weight=weight[inside],
        batch_size=recipe.batch,
        epochs=recipe.epochs,
        validation_data=(x[~inside], label[~inside], weight[~inside]),
        validation_batch_size=512,
        verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda epoch: recipe.learning_rate * pace(recipe, epoch))
        ],
    )
    seconds = time.perf_counter() - started
    return seconds, held_out_auroc(job, model.predict(x, verbose=0, batch_size=2048)[:, 0], material)


def bare_arithmetic(jobs: Sequence[Job], material: Material) -> float:
    """Seconds of the same matrix products, forward and backward, with nothing around them."""

    def products(x: np.ndarray, kernels: list[np.ndarray], backward: bool) -> None:
        signals = [x]
        for kernel in kernels:
            signals.append(signals[-1] @ kernel)
        back = signals[-1]
        for layer in range(len(kernels) - 1, -1, -1) if backward else ():
            np.matmul(np.swapaxes(signals[layer], 1, 2), back)
            back = back @ np.swapaxes(kernels[layer], 1, 2) if layer else back

    random = np.random.Generator(np.random.Philox(1))
    shapes: dict[tuple[int, int, int, int], list[int]] = {}
    for job in jobs:
        recipe = job.recipe
        channels = material.values[recipe.features].shape[1]
        counts = shapes.setdefault(
            (channels, recipe.depth, recipe.width if recipe.depth else 0, recipe.batch), [0, 0]
        )
        counts[0] += steps_of(job, material)
        held_out = np.isin(material.items.fold, sorted(job.held_out)).sum()
        counts[1] += recipe.epochs * -(-int(held_out) // JUDGED)
    together, repeats = 10, 20
    seconds = 0.0
    for (channels, depth, width, batch), counts in sorted(shapes.items()):
        kernels = [
            random.normal(size=(together, *size)).astype(np.float32)
            for size in layer_sizes(depth, width, channels)
        ]
        for items, count, backward in ((batch, counts[0], True), (JUDGED, counts[1], False)):
            x = random.normal(size=(together, items, channels)).astype(np.float32)
            run = partial(products, x, kernels, backward)
            run()
            took = min(timed(lambda run=run: [run() for _ in range(repeats)])[0] for _ in range(3))
            seconds += count * took / together / repeats
    return seconds


def end_to_end(params: Params, task_data: TaskData, keras: Any, count: int = 512) -> float:
    """Seconds an image takes in Keras's transfer-learning loop: frozen backbone, a head on top, `fit`."""
    name, layer = sorted(task_data.features)[0].split("/")
    settings = params.backbones[name]
    level = "cell"
    keras.utils.set_random_seed(1)
    frozen = keras_network(settings, level, params.seed)
    frozen.trainable = False
    size = settings.input_size[level]
    images = keras.Input((size, size, 3), dtype="uint8")
    features = frozen(images, training=False)[layer]
    model = keras.Model(images, keras.layers.Dense(1, activation="sigmoid")(features))
    model.compile(keras.optimizers.AdamW(0.001), "binary_crossentropy")
    batches = read_views(Path(f"augmented/{level}/views.parquet"), count)
    pixels = np.stack([decode(view.image) for view in next(iter(batches))][:count])
    label = (np.arange(len(pixels)) % 2).astype(np.float32)
    model.fit(pixels[:64], label[:64], batch_size=32, verbose=0)  # traces
    took = timed(lambda: model.fit(pixels, label, batch_size=32, verbose=0))[0]
    return took / len(pixels)


def growth(task_data: TaskData, tune: Tune, params: Params) -> dict[str, float]:
    """How many times as long a search takes when one thing doubles (folds: five instead of three)."""
    recipe = draw_candidates(tune, sorted(task_data.features), params.seed)[0][0]
    recipe = replace(recipe, depth=1, width=64, batch=64, epochs=6, learning_rate=0.001, dropout=0.2)

    def seconds(
        trials: int = 3, folds: int = task_data.folds, recipe: Recipe = recipe, patients: int = 2
    ) -> float:
        here = replace(
            task_data, table=task_data.table.assign(fold=task_data.table["fold"] % folds), folds=folds
        )
        material = here.material(tune, params.seed)
        items = material.items
        who = task_data.table["patient"].astype("category").cat.codes.to_numpy()
        patient = who[np.searchsorted(task_data.row, items.row)]
        kept = patient % 2 < patients
        fewer = TrainingItems(
            *(each[kept] for each in (items.row, items.views, items.copies, items.label, items.fold))
        )
        jobs = [Job(number, recipe, pair) for number in range(trials) for pair in tuning_sets(folds)]
        return timed(lambda: judge_heads(jobs, replace(material, items=fewer), 0))[0]

    base = seconds()
    return {
        "twice_the_items": base / seconds(patients=1),
        "twice_the_trials": seconds(trials=6) / base,
        "twice_the_width": seconds(recipe=replace(recipe, width=128)) / base,
        "five_folds_for_three": base / seconds(folds=3),
    }


if __name__ == "__main__":
    main()
