"""Heads on bottleneck features: their form, their scores, and their files.

A head is a logistic regression or a network with a few hidden layers; `aplsmear.heads.stack` trains many of
them side by side. A head on bags (patients with many cells) also weighs the cells by attention; see
`aplsmear.heads.bags`.
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
_BLOCK = 64  # rows; in a product of whole blocks, no row depends on the number of rows
ACTIVATIONS = ("relu", "gelu", "tanh")


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a head."""

    features: str  # backbone/layer
    views: int  # largest number of augmented views of an item in training (times its copies)
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
    epochs: int | None = None  # number of epochs of the recipe's schedule; None: all
    start: int = 0  # number among heads that differ by their random numbers alone


@dataclass(frozen=True)
class Head:
    """A trained head; the standardisation of the features is folded into its first product."""

    features: str
    kernels: tuple[np.ndarray, ...]  # float32: (channels, width), (width, width) ..., (width, 1)
    biases: tuple[np.ndarray, ...]  # float32: (units,) each
    activation: str = ACTIVATIONS[0]
    # Of a head on bags, float32: gates (width, 2 width), their biases (2 width,), weights (width, 1). A mean
    # of n such heads has n attentions: weights and last kernel have n columns, and logits are averaged.
    attention: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class TrainingItems:
    """The items to train on. A cell or a smear is one image; a patient is a bag of cells, many images."""

    row: np.ndarray  # int64 (images,): the row of the image's plain view in the features
    views: np.ndarray  # int64 (images,): number of augmented views, in the rows after the plain one
    copies: np.ndarray  # int64 (items,): number of times that an epoch shows the item
    label: np.ndarray  # int8 (items,): 0 or 1
    fold: np.ndarray  # int64 (items,)
    size: np.ndarray | None = None  # int64 (items,), of bags: number of images; those of an item are adjacent

    def images(self, items: np.ndarray) -> np.ndarray:
        """The places of the images of some items, one item after another: int64."""
        if self.size is None:
            return items
        size, start = self.size[items], (np.cumsum(self.size) - self.size)[items]
        return np.asarray(np.arange(size.sum()) + np.repeat(start - (np.cumsum(size) - size), size))


def padded_deviation(deviation: np.ndarray) -> np.ndarray:
    """What features are divided by: the deviation of each channel plus a part of the mean deviation.

    So a channel that hardly varies is not enlarged to the size of the others.
    """
    return np.asarray(deviation + 0.05 * deviation.mean() + 1e-6)


def layer_sizes(depth: int, width: int, channels: int) -> list[tuple[int, int]]:
    """Rows and columns of each product of a head."""
    units = [channels, *[width] * depth, 1]
    return list(pairwise(units))


def parameters(recipe: Recipe, channels: int, *, bags: bool = False) -> int:
    """The number of weights of a head on so many channels, with the attention of a head on bags."""
    sizes = layer_sizes(recipe.depth, recipe.width, channels)
    attention = (recipe.width + 1) * 2 * recipe.width + recipe.width if bags and recipe.depth else 0
    return sum((rows + 1) * columns for rows, columns in sizes) + attention


def mean_head(heads: Sequence[Head]) -> Head:
    """One head whose logit is the mean of the logits of several heads of one recipe.

    Their hidden layers are side by side and independent (block-diagonal products).
    """
    first, depth = heads[0], len(heads[0].kernels) - 1
    if len(heads) == 1:
        return first
    kernels = list(zip(*(head.kernels for head in heads), strict=True))  # by layer
    biases = list(zip(*(head.biases for head in heads), strict=True))
    if not depth:
        return replace(first, kernels=(np.mean(kernels[0], axis=0),), biases=(np.mean(biases[0], axis=0),))
    wide = [np.concatenate(kernels[0], axis=1), *(block_diag(*layer) for layer in kernels[1:depth])]
    joined = [np.concatenate(layer) for layer in biases[:depth]]
    if not first.attention:
        wide.append(np.concatenate(kernels[depth]) / np.float32(len(heads)))
        joined.append(np.mean(biases[depth], axis=0))
        return replace(first, kernels=tuple(wide), biases=tuple(joined))
    gates, offsets, weights = zip(*(head.attention for head in heads), strict=True)
    halves = zip(*(np.split(each, 2, axis=1) for each in gates), strict=True)
    shifts = [np.split(each, 2)[half] for half in range(2) for each in offsets]
    joint_gates = np.concatenate([block_diag(*half) for half in halves], axis=1)
    return replace(
        first,
        kernels=(*wide, block_diag(*kernels[depth])),
        biases=(*joined, np.concatenate(biases[depth])),
        attention=(joint_gates, np.concatenate(shifts), block_diag(*weights)),
    )


def score(head: Head, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Probabilities of the positive class by a head that is not on bags: float32 (items,).

    `values` are the features that the head reads, float16 (views, channels); `rows`, int64 (items,), the
    views to score. The probability of an item does not depend on the other items.
    """
    scores = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        x = rows_of(values, rows[start : start + CHUNK]).astype(np.float32)
        signal = np.pad(x, ((0, -len(x) % _BLOCK), (0, 0)))
        for layer, (kernel, bias) in enumerate(zip(head.kernels, head.biases, strict=True)):
            signal = (activate(signal, head.activation)[0] if layer else signal) @ kernel + bias
        scores[start : start + len(x)] = sigmoid(signal)[: len(x), 0]
    return scores


def mean_over_views(
    score: Callable[[np.ndarray], Any], row: np.ndarray, views: np.ndarray, average: int
) -> np.ndarray:
    """The mean of the scores of the plain view and of `average` augmented views of each image.

    `score` takes rows of the features, int64 (images,); `row` has those of the plain views. As many augmented
    views follow as `views` says, int64 (images,). An image with fewer than `average` repeats its last view.
    """
    each = [score(row + np.minimum(view, views)) for view in range(average + 1)]
    return np.asarray(np.mean(each, axis=0))


def write_heads(path: Path, heads: Sequence[Head], average: int = 0) -> None:
    """Write heads to a .npz of arrays: the same bytes from the same heads, and no code in it.

    `average` is the number of augmented views whose scores are averaged with that of the plain view.
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
            kernels, biases, attention = (
                tuple(file[name] for name in file.files if name.startswith(f"{place}.{part}."))
                for part in ("kernel", "bias", "attention")
            )
            heads.append(Head(features, kernels, biases, activation, attention))
    return heads


def read_average(path: Path) -> int:
    """The number of augmented views that are averaged with the plain view; see `write_heads`."""
    with np.load(path, allow_pickle=False) as file:
        return int(file["average"])
