"""A small network to finetune, its data, and a training that can be interrupted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from networks import keras_network

from aplsmear.features.store import Features
from aplsmear.finetune.cache import cache_views
from aplsmear.finetune.finetuning import Trained, build_trainers, finetune
from aplsmear.finetune.inputs import Inputs, Start
from aplsmear.finetune.network import HeadDesign, build_network
from aplsmear.finetune.sampling import Run, TrainingSet
from aplsmear.finetune.training import History, Trainer
from aplsmear.heads.head import Head, Recipe, TrainingItems
from aplsmear.heads.task_data import make_task_data
from aplsmear.images.reading import encode_jpeg
from aplsmear.images.view_store import View, view_writer
from aplsmear.params import Backbone, Finetune, read_params

PARAMS = read_params(Path(__file__).parents[1] / "params.yaml")
SETTINGS = PARAMS.finetune.model_copy(
    update={"blocks": 1, "batch": 8, "views": 1, "epochs": 3, "patience": 0}
)
LAYER = "conv_pw_2_relu+conv_pw_3_relu"
BACKBONE = Backbone(
    application="MobileNet",
    options={"alpha": 0.25},
    input_size={"cell": 32, "smear": 32},
    layer=[LAYER],
    weights="none",
    batch=8,
)
CHANNELS = 64
RECIPE = Recipe(
    f"net/{LAYER}", 1, 1, 4, "gelu", 0.3, 0.01, "constant", 0.0, 0.5, 0.0, 0.0, 8, 3
)  # fmt: skip


def head() -> Head:
    random = np.random.Generator(np.random.Philox(3))
    kernels = random.normal(size=(CHANNELS, 4)), random.normal(size=(4, 1))
    return Head(
        RECIPE.features,
        tuple(each.astype(np.float32) for each in kernels),
        (np.full(4, 0.1, np.float32), np.zeros(1, np.float32)),
        "gelu",
    )


def images() -> np.ndarray:
    return np.random.Generator(np.random.Philox(4)).integers(0, 256, (48, 32, 32, 3)).astype(np.uint8)


def views() -> list[View]:
    """A plain and an augmented view of each of twenty-four items."""
    return [View(str(n // 2), n % 2, encode_jpeg(image)) for n, image in enumerate(images())]


def training_set(subclasses: int = 1) -> TrainingSet:
    """Twenty-four items of twelve patients in three folds, each item with one augmented view."""
    numbers = np.arange(24)
    items = TrainingItems(
        row=2 * numbers,
        views=np.ones(24, np.int64),
        copies=np.ones(24, np.int64),
        label=(numbers % 2).astype(np.int8),
        fold=numbers % 3,
    )
    within = numbers % 4 // 2 if subclasses == 2 else 0
    subclass = within + subclasses * items.label.astype(np.int64)
    return TrainingSet(items, subclass, (subclasses, subclasses), numbers // 2, 7)


def features() -> np.ndarray:
    """float16 (views, channels), which separate the classes."""
    random = np.random.Generator(np.random.Philox(5)).normal(size=(48, CHANNELS))
    return (random + np.repeat(training_set().items.label, 2)[:, None]).astype(np.float16)


def train(
    folder: Path, kills: int = 0, strategy: Any = None, recipe: Recipe = RECIPE, **changed: Any
) -> tuple[History, list[np.ndarray]]:
    """Train the small network.

    Args:
        folder: gets cache and checkpoint.
        kills: another process trains so many epochs and is killed, before this one continues; 0: none.
        strategy: of TensorFlow.
        recipe: of the head.
        changed: settings that differ from `SETTINGS`.

    Returns:
        History and weights at the end.
    """
    settings: Finetune = SETTINGS.model_copy(update=changed)
    extra = settings.head if settings.head.epochs else None
    data = training_set(2 if extra else 1)
    design = HeadDesign(recipe, CHANNELS, data.subclasses)
    if extra:
        design = HeadDesign(recipe, CHANNELS, data.subclasses, extra.members, extra.units, extra.centre_crop)
    run = Run("inner_0_1", recipe, frozenset({0, 1}), 1, settings.epochs)
    for last in (kills, settings.epochs) if kills else (settings.epochs,):
        trainer = Trainer(
            lambda: build_network(BACKBONE, "cell", design, settings.blocks, 5),
            lambda network: cache_views(
                folder, [views()], np.ones(48, bool), network, features(), online=settings.online
            ),
            data,
            settings,
            0.1,
            strategy,
        )
        for history in trainer.train(run, head(), folder / "run.npz"):
            if len(history.loss) == last:
                break
    return history, trainer.weights()


def inputs(folder: Path, outer_folds: Sequence[int] = (0,), **changed: Any) -> tuple[Inputs, list[Start]]:
    """A finetuning of the items of `training_set`, and where outer folds and the final model start.

    Args:
        folder: gets the views.
        outer_folds: their numbers.
        changed: settings that differ from `SETTINGS`.
    """
    with view_writer({"cell": folder / "views.parquet"}) as write:
        write({"cell": views()})
    table = pd.DataFrame([{"item": view.item, "view": view.view} for view in views()])
    values = keras_network(BACKBONE, "cell", 7)(images())[LAYER].numpy()
    patient = np.char.add("p", (np.arange(24) // 2).astype(str))
    task_data = make_task_data(
        pd.DataFrame({"item": np.arange(24).astype(str), "patient": patient}),
        training_set().items.label,
        pd.DataFrame({"patient": np.unique(patient), "fold": np.arange(12) % 3}),
        {RECIPE.features: Features(RECIPE.features, table, values.astype(np.float16))},
    )
    made = Inputs(
        task_data,
        SETTINGS.model_copy(update=changed),
        PARAMS.tune.model_copy(update={"restarts": 1, "average": 1}),
        {"net": BACKBONE},
        "cell",
        folder / "views.parquet",
        0.1,
        7,
    )
    return made, [Start(number, 0, RECIPE, 2, head()) for number in (*outer_folds, 3)]


def trained(folder: Path, **changed: Any) -> list[Trained]:
    """All runs of the finetuning of `inputs`, after their last epoch."""
    made, starts = inputs(folder, **changed)
    trainers = build_trainers(made, starts, folder)
    return list({each.run: each for each in finetune(made, starts, trainers, folder)}.values())
