"""What an epoch shows of the training items: which views, in which order, with which targets and weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aplsmear.errors import UserError
from aplsmear.evaluation.splits import HeldOut
from aplsmear.heads.head import Recipe, TrainingItems
from aplsmear.params import Finetune

EXTRA = 10**6  # epochs of the extra heads count from here, so that they show other views than later epochs


@dataclass(frozen=True)
class Run:
    """One model to train. It starts from a head that was trained on the same patients."""

    name: str
    recipe: Recipe  # of the head; its views, balance and smoothing hold here too
    held_out: HeldOut
    judged: int | None  # the fold on which it is scored after every epoch; None: none
    epochs: int  # at most


@dataclass(frozen=True)
class TrainingSet:
    """The items of a task, as finetuning uses them."""

    items: TrainingItems
    subclass: np.ndarray  # int64 (items,): negative subclasses come first
    subclasses: tuple[int, int]  # number of negative and of positive subclasses
    patient: np.ndarray  # int64 (items,): number of the patient
    seed: int  # of all random choices


def epoch_items(
    run: Run, data: TrainingSet, settings: Finetune, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The views that an epoch shows, in order, with targets and weights.

    Rare subclasses weigh more, as far as the balance of the recipe asks for it. Within a subclass, the items
    of a patient with few of them weigh more, as far as `finetune.patient_weight` asks for it.

    Returns:
        Rows of the views, int64 (shown,); targets, float32 (shown, subclasses); weights, float32 (shown,),
        with a mean of 1.

    Raises UserError: only one class is left to train on.
    """
    items = data.items
    rng = rng_of(0, run, data.seed, epoch)
    inside = np.flatnonzero(~np.isin(items.fold, sorted(run.held_out)))
    if len(np.unique(items.label[inside])) < 2:
        raise UserError(f"{run.name}: without folds {sorted(run.held_out)} only one class is left")
    shown = rng.permutation(np.repeat(inside, items.copies[inside]))
    seen = np.minimum(settings.views * items.copies[shown], items.views[shown])
    view = items.row[shown] + (rng.random(len(shown)) * (seen + 1)).astype(np.int64)
    subclass = data.subclass[shown]
    count = np.bincount(subclass, minlength=sum(data.subclasses))
    pairs = np.stack([subclass, data.patient[shown]])
    _, owner, owned = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    share = owned[owner] ** -settings.patient_weight
    # The total weight of a subclass does not depend on `patient_weight`.
    share /= (np.bincount(subclass, share) / np.maximum(count, 1))[subclass]
    weight = share * np.maximum(count, 1.0)[subclass] ** -run.recipe.balance
    smoothing = run.recipe.smoothing
    target = np.eye(len(count))[subclass] * (1 - smoothing) + smoothing / len(count)
    return view, target.astype(np.float32), (weight / weight.mean()).astype(np.float32)


def augment_online(images: np.ndarray, brightness: float, rng: np.random.Generator) -> np.ndarray:
    """Each image rotated by a multiple of 90 degrees, mirrored or not, and with another brightness.

    Images are uint8 (batch, size, size, 3); `brightness` is its largest relative change, either way.
    """
    turns = rng.integers(0, 4, len(images))
    mirrored = rng.integers(0, 2, len(images))
    factor = rng.uniform(1 - brightness, 1 + brightness, len(images)).astype(np.float32)
    out = np.empty_like(images)
    for number, image in enumerate(images):
        turned = np.rot90(image, turns[number])
        turned = turned[:, ::-1] if mirrored[number] else turned
        out[number] = np.clip(turned * factor[number] + 0.5, 0, 255).astype(np.uint8)
    return out


def rng_of(purpose: int, run: Run, seed: int, epoch: int) -> np.random.Generator:
    """Random numbers of one epoch of a run: for its items (0) or its augmentation (1)."""
    folds = (fold + 1 for fold in sorted(run.held_out))
    return np.random.Generator(np.random.Philox([purpose, seed, epoch, *folds]))
