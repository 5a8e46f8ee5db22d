"""Heads on bottleneck features: what one is, what it says, and how it is kept.

A head is a logistic regression or a network with a few hidden layers; `aplsmear.heads.stack` trains many of
them together. A head that sees a patient as a bag of cells weighs them by attention besides
(`aplsmear.heads.bags`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import block_diag

from aplsmear.evaluation.splits import HeldOut
from aplsmear.files import rows_of, write_arrays
from aplsmear.heads.arithmetic import activate, sigmoid

CHUNK = 2048  # items scored at a time
_BLOCK = 64  # whole ones alone: the last rows of another product have other last digits
ACTIVATIONS = ("relu", "gelu", "tanh")


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a head."""

    features: str  # backbone/layer
    views: int  # augmented views that training sees of an item, at most (times the item's copies)
    depth: int  # hidden layers; 0: a logistic regression
    width: int  # units of each hidden layer
    activation: str  # one of ACTIVATIONS
    dropout: float  # after each hidden layer
    learning_rate: float
    schedule: str  # of the learning rate: constant, cosine or linear
    weight_decay: float
    balance: float  # 0: classes weigh as they are, 1: both the same
    smoothing: float  # of labels (Szegedy et al. 2016): 0.1 turns 0 and 1 into 0.05 and 0.95
    mixup: float  # alpha of its Beta distribution (Zhang et al. 2018); 0: none
    batch: int
    epochs: int


@dataclass(frozen=True)
class Job:
    """One head to train: a recipe on the patients outside the held-out folds."""

    trial: int
    recipe: Recipe
    held_out: HeldOut
    epochs: int | None = None  # stop after so many of the recipe's; None: after all
    start: int = 0  # which of the heads that differ by chance alone


@dataclass(frozen=True)
class Head:
    """A trained head; the standardisation of the features is folded into its first product."""

    features: str
    # float32: (channels, width), ..., (width, 1); one more than hidden layers
    kernels: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]  # float32: (units,) each
    activation: str = ACTIVATIONS[0]
    # Of a head on bags, float32: gates (width, 2 width), their biases (2 width,), weights (width, 1). The
    # mean of n such heads looks n times: its weights are (width, n), its last kernel too.
    attention: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class TrainingItems:
    """The labelled items of a task. A cell or a smear is one image; a patient, a bag of cells, has many."""

    row: np.ndarray  # int64 (images,): the row of the image's plain view; its augmented views follow
    views: np.ndarray  # int64 (images,): how many augmented views follow
    copies: np.ndarray  # int64 (items,): how often an epoch shows the item
    label: np.ndarray  # int8 (items,): 0 or 1
    fold: np.ndarray  # int64 (items,)
    size: np.ndarray | None = (
        None  # int64 (items,), of bags: so many images, one behind another, are an item's
    )

    @property
    def image_fold(self) -> np.ndarray:
        """The fold of each image, int64 (images,)."""
        return self.fold if self.size is None else np.repeat(self.fold, self.size)

    def images(self, items: np.ndarray) -> np.ndarray:
        """The places of the images of some items, one item after another: int64."""
        if self.size is None:
            return items
        size, start = self.size[items], (np.cumsum(self.size) - self.size)[items]
        return np.asarray(np.arange(size.sum()) + np.repeat(start - (np.cumsum(size) - size), size))


def padded_deviation(deviation: np.ndarray) -> np.ndarray:
    """What features are divided by, from the standard deviation of each channel.

    A part of the mean deviation is added, so that a channel that hardly varies is not enlarged to the size of
    the others.
    """
    return np.asarray(deviation + 0.05 * deviation.mean() + 1e-6)


def layer_sizes(depth: int, width: int, channels: int) -> list[tuple[int, int]]:
    """Rows and columns of each product of a head."""
    units = [channels, *[width] * depth, 1]
    return list(pairwise(units))


def parameters(recipe: Recipe, channels: int) -> int:
    """The number of weights of a head on features of so many channels."""
    return sum((rows + 1) * columns for rows, columns in layer_sizes(recipe.depth, recipe.width, channels))


def mean_head(heads: Sequence[Head]) -> Head:
    """One head that says the mean of what several of one recipe say, as a logit.

    Their hidden layers stand side by side and do not hear each other (block-diagonal products).
    """
    first = heads[0]
    if len(heads) == 1:
        return first
    depth = len(first.kernels) - 1
    kernels = [[head.kernels[layer] for head in heads] for layer in range(depth + 1)]
    biases = [[head.biases[layer] for head in heads] for layer in range(depth + 1)]
    if not depth:
        return replace(first, kernels=(np.mean(kernels[0], axis=0),), biases=(np.mean(biases[0], axis=0),))
    wide = [np.concatenate(kernels[0], axis=1), *(block_diag(*layer) for layer in kernels[1:depth])]
    joined = [np.concatenate(layer) for layer in biases[:depth]]
    if not first.attention:
        wide.append(np.concatenate(kernels[depth]) / np.float32(len(heads)))
        joined.append(np.mean(biases[depth], axis=0))
        return replace(first, kernels=tuple(wide), biases=tuple(joined))
    gates, offsets, weights = zip(*(head.attention for head in heads), strict=True)
    halves = [[np.split(each, 2, axis=-1)[half] for each in gates] for half in range(2)]
    shifts = [np.split(each, 2)[half] for half in range(2) for each in offsets]
    return replace(
        first,
        kernels=(*wide, block_diag(*kernels[depth])),
        biases=(*joined, np.concatenate(biases[depth])),
        attention=(
            np.concatenate([block_diag(*half) for half in halves], axis=1),
            np.concatenate(shifts),
            block_diag(*weights),
        ),
    )


def score(heads: Sequence[Head], values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Probabilities of the positive class. That of an item does not depend on the other items.

    Args:
        heads: that read these features; not on bags.
        values: float16 (views, channels).
        rows: int64 (items,), the views to score.

    Returns:
        float32 (heads, items).
    """
    scores = np.zeros((len(heads), len(rows)), dtype=np.float32)
    for start in range(0, len(rows), CHUNK):
        x = rows_of(values, rows[start : start + CHUNK]).astype(np.float32)
        count = len(x)
        x = np.pad(x, ((0, -count % _BLOCK), (0, 0)))
        for place, head in enumerate(heads):
            scores[place, start : start + count] = sigmoid(_logits(head, x))[:count, 0]
    return scores


def _logits(head: Head, x: np.ndarray) -> np.ndarray:
    """float32 (items, 1)."""
    signal = x
    for layer, (kernel, bias) in enumerate(zip(head.kernels, head.biases, strict=True)):
        signal = (activate(signal, head.activation)[0] if layer else signal) @ kernel + bias
    return signal


def mean_over_views(
    score: Callable[[np.ndarray], Any], row: np.ndarray, views: np.ndarray, average: int
) -> np.ndarray:
    """The mean of the scores of the plain view and of `average` augmented views of each image.

    Args:
        score: takes rows of the features, int64 (images,).
        row: int64 (images,), of the plain views; the augmented views follow.
        views: int64 (images,), how many follow. An image with fewer than `average` repeats its last view.
        average: number of augmented views.
    """
    each = [score(row + np.minimum(view, views)) for view in range(average + 1)]
    return np.asarray(np.mean(each, axis=0))


def write_heads(path: Path, heads: Sequence[Head], average: int = 0) -> None:
    """Write heads to a byte-stable .npz that holds arrays only (nothing in it can run).

    Args:
        path: of the file.
        heads: of each outer fold.
        average: augmented views whose scores are averaged with that of the plain one.
    """
    arrays: dict[str, np.ndarray] = {
        "average": np.array(average),
        "features": np.array([head.features for head in heads]),
        "activation": np.array([head.activation for head in heads]),
    }
    for place, head in enumerate(heads):
        for layer, (kernel, bias) in enumerate(zip(head.kernels, head.biases, strict=True)):
            arrays[f"{place}.kernel.{layer}"] = kernel
            arrays[f"{place}.bias.{layer}"] = bias
        for number, array in enumerate(head.attention):
            arrays[f"{place}.attention.{number}"] = array
    write_arrays(path, arrays)


def read_heads(path: Path) -> list[Head]:
    """The heads of `write_heads`."""
    with np.load(path, allow_pickle=False) as file:
        heads = []
        named = zip(file["features"].tolist(), file["activation"].tolist(), strict=True)
        for place, (features, activation) in enumerate(named):
            depth = sum(name.startswith(f"{place}.kernel.") for name in file.files)
            kernels = tuple(file[f"{place}.kernel.{layer}"] for layer in range(depth))
            biases = tuple(file[f"{place}.bias.{layer}"] for layer in range(depth))
            names = (f"{place}.attention.{number}" for number in range(3))
            attention = tuple(file[name] for name in names if name in file.files)
            heads.append(Head(features, kernels, biases, activation, attention))
    return heads


def read_average(path: Path) -> int:
    """How many augmented views are averaged with the plain one; see `write_heads`."""
    with np.load(path, allow_pickle=False) as file:
        return int(file["average"])
