"""Heads on bottleneck features: many small networks trained as one stacked computation.

A head is a logistic regression or a network with one hidden layer. Heads of different trials and folds that read the
same features train together: their weights carry a leading model axis, their learning rates, weight decays, dropout
rates and class weights are vectors over it, and narrower hidden layers are padded with zeros (which stay zero, since
neither signal nor gradient reaches them). One step of all of them is one batched product instead of many small ones
under a large overhead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from aplsmear.splits import HeldOut

CHUNK = 2048  # items scored at a time


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a head."""

    features: str  # backbone/layer
    views: int  # augmented views that training sees of an item, at most (times the item's copies)
    width: int  # units of the hidden layer; 0: none
    dropout: float
    learning_rate: float
    weight_decay: float
    balance: float  # 0: classes weigh as they are, 1: both the same
    batch: int
    epochs: int


@dataclass(frozen=True)
class Job:
    """One head to train: a recipe on the patients outside the held-out folds."""

    trial: int
    recipe: Recipe
    held_out: HeldOut


@dataclass(frozen=True)
class Head:
    """A trained head; the standardisation of the features is folded into its first product."""

    features: str
    kernels: tuple[np.ndarray, ...]  # float32: (channels, 1), or (channels, width) and (width, 1)
    biases: tuple[np.ndarray, ...]  # float32: (units,) each


@dataclass(frozen=True)
class TrainingItems:
    """The labelled items of a task; all arrays have the shape (items,)."""

    row: np.ndarray  # int64: the row of the item's plain view; its augmented views follow
    views: np.ndarray  # int64: how many augmented views follow
    copies: np.ndarray  # int64: how often an epoch shows the item
    label: np.ndarray  # int8: 0 or 1
    fold: np.ndarray  # int64


def parameters(recipe: Recipe, channels: int) -> int:
    """The number of weights of a head on features of so many channels."""
    return channels + 1 if not recipe.width else (channels + 1) * recipe.width + recipe.width + 1


def train_heads(
    jobs: Sequence[Job], values: Mapping[str, np.ndarray], items: TrainingItems, seed: int
) -> list[Head]:
    """Train heads, stacked where they read the same features in the same way.

    Args:
        jobs: what to train.
        values: for each name of features, float16 (views, channels).
        items: the labelled items; a job sees those outside its held-out folds.
        seed: with a job's trial and held-out folds, seeds its weights, order and views.

    Returns:
        One head a job, in their order. The same call gives the same bits.

    Raises:
        ValueError: a job is left with one class only.
    """
    heads: dict[int, Head] = {}
    for stack in _stacks(jobs):
        trained = _train_stack([jobs[i] for i in stack], values[jobs[stack[0]].recipe.features], items, seed)
        heads.update(zip(stack, trained, strict=True))
    return [heads[i] for i in range(len(jobs))]


def score(heads: Sequence[Head], values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Probabilities of the positive class.

    Args:
        heads: that read these features.
        values: float16 (views, channels).
        rows: int64 (items,), which views to score.

    Returns:
        float32 (heads, items).
    """
    scores = np.zeros((len(heads), len(rows)), dtype=np.float32)
    for depth in sorted({len(head.kernels) for head in heads}):
        chosen = [place for place, head in enumerate(heads) if len(head.kernels) == depth]
        weights = []
        for layer in range(depth):
            weights.append(_padded([heads[place].kernels[layer] for place in chosen]))
            weights.append(_padded([heads[place].biases[layer][None] for place in chosen]))
        for start in range(0, len(rows), CHUNK):
            part = values[rows[start : start + CHUNK]].astype(np.float32)
            scores[chosen, start : start + CHUNK] = _forward(depth)(part, weights).numpy()
    return scores


def write_heads(path: Path, heads: Sequence[Head]) -> None:
    """Write heads to a byte-stable .npz that holds arrays only (nothing in it can run)."""
    arrays: dict[str, np.ndarray] = {"features": np.array([head.features for head in heads])}
    for place, head in enumerate(heads):
        for layer, (kernel, bias) in enumerate(zip(head.kernels, head.biases, strict=True)):
            arrays[f"{place}.kernel.{layer}"] = kernel
            arrays[f"{place}.bias.{layer}"] = bias
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, allow_pickle=False, **arrays)


def read_heads(path: Path) -> list[Head]:
    """The heads of `write_heads`."""
    with np.load(path, allow_pickle=False) as file:
        heads = []
        for place, features in enumerate(file["features"].tolist()):
            depth = sum(name.startswith(f"{place}.kernel.") for name in file.files)
            kernels = tuple(file[f"{place}.kernel.{layer}"] for layer in range(depth))
            biases = tuple(file[f"{place}.bias.{layer}"] for layer in range(depth))
            heads.append(Head(features, kernels, biases))
    return heads


def _stacks(jobs: Sequence[Job]) -> list[list[int]]:
    """Jobs that can train together: same features, same depth, same batch."""
    groups: dict[tuple[str, bool, int], list[int]] = {}
    for number, job in enumerate(jobs):
        key = (job.recipe.features, job.recipe.width > 0, job.recipe.batch)
        groups.setdefault(key, []).append(number)
    return [groups[key] for key in sorted(groups)]


def _train_stack(jobs: Sequence[Job], values: np.ndarray, items: TrainingItems, seed: int) -> list[Head]:
    import tensorflow as tf

    recipes = [job.recipe for job in jobs]
    randoms = [np.random.Generator(np.random.Philox(_job_seed(job, seed))) for job in jobs]
    inside = [np.flatnonzero(~np.isin(items.fold, sorted(job.held_out))) for job in jobs]
    for job, rows in zip(jobs, inside, strict=True):
        if len(set(items.label[rows].tolist())) < 2:
            raise ValueError(f"without the folds {sorted(job.held_out)} only one class is left to train on")
    used, compact = np.unique(
        np.concatenate([np.arange(r, r + v + 1) for r, v in zip(items.row, items.views, strict=True)]),
        return_inverse=True,
    )
    x = tf.constant(values[used])
    plain = compact[np.concatenate([[0], np.cumsum(items.views + 1)[:-1]])]
    mean, scale = _standardisation(values[used[plain]].astype(np.float32), items.fold, jobs)
    state = _start(recipes, values.shape[1], randoms)
    train = _epoch(len(state) // 6)
    taken = 0
    heads: dict[int, Head] = {}
    alive = np.arange(len(jobs))
    for epoch in range(max(recipe.epochs for recipe in recipes)):
        index, target, weight, pace = _draw(
            [recipes[i] for i in alive],
            [inside[i] for i in alive],
            [randoms[i] for i in alive],
            items,
            plain,
            epoch,
        )
        hyper = np.array(
            [[recipes[i].learning_rate, recipes[i].weight_decay, recipes[i].dropout] for i in alive],
            np.float32,
        )
        dice = np.array([seed, epoch], np.int32)
        state = train(
            state, x, mean[alive], scale[alive], index, target, weight, pace, hyper, dice, np.int32(taken)
        )
        taken += len(index)
        done = np.array([recipes[i].epochs == epoch + 1 for i in alive])
        for place in np.flatnonzero(done):
            job = int(alive[place])
            heads[job] = _folded(
                recipes[job], [part[place].numpy() for part in state], mean[job, 0], scale[job, 0]
            )
        if done.any():
            alive = alive[~done]
            state = [tf.boolean_mask(part, ~done) for part in state]
    return [heads[i] for i in range(len(jobs))]


def _job_seed(job: Job, seed: int) -> list[int]:
    return [seed, job.trial, *(fold + 1 for fold in sorted(job.held_out))]


def _standardisation(
    plain: np.ndarray, fold: np.ndarray, jobs: Sequence[Job]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1/deviation of each channel over the plain views outside a job's held-out folds: (jobs, 1, channels)."""
    folds = np.unique(fold)
    count = np.array([(fold == f).sum() for f in folds], np.float64)
    total = np.stack([plain[fold == f].sum(0, dtype=np.float64) for f in folds])
    square = np.stack([(plain[fold == f].astype(np.float64) ** 2).sum(0) for f in folds])
    seen = np.array([[f not in job.held_out for f in folds.tolist()] for job in jobs], np.float64)
    n = (seen @ count)[:, None]
    mean = np.einsum("mf,fc->mc", seen, total) / n
    deviation = np.sqrt(np.maximum(np.einsum("mf,fc->mc", seen, square) / n - mean**2, 0))
    # A channel that hardly moves is not blown up to the size of the others.
    scale = 1 / (deviation + 0.05 * deviation.mean(1, keepdims=True) + 1e-6)
    return mean.astype(np.float32)[:, None], scale.astype(np.float32)[:, None]


def _start(recipes: Sequence[Recipe], channels: int, randoms: Sequence[np.random.Generator]) -> list[Any]:
    """First weights (kernel and bias of each layer), then both moments of Adam for each of them, all zero."""
    import tensorflow as tf

    layers = [_layers(recipe, channels) for recipe in recipes]
    weights = []
    for layer in range(len(layers[0])):
        kernels = []
        for sizes, random in zip(layers, randoms, strict=True):
            limit = np.sqrt(6 / sum(sizes[layer]))  # Glorot and Bengio 2010
            kernels.append(random.uniform(-limit, limit, sizes[layer]).astype(np.float32))
        kernel = _padded(kernels)
        weights += [kernel, np.zeros((len(recipes), 1, kernel.shape[2]), np.float32)]
    moments = [np.zeros_like(weight) for weight in weights]
    return [tf.constant(each) for each in weights + moments + moments]


def _layers(recipe: Recipe, channels: int) -> list[tuple[int, int]]:
    """Rows and columns of each product of a head."""
    return [(channels, recipe.width), (recipe.width, 1)] if recipe.width else [(channels, 1)]


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Matrices of several sizes stacked on a leading axis, padded with zeros."""
    rows, columns = np.max([array.shape for array in arrays], axis=0)
    out = np.zeros((len(arrays), rows, columns), np.float32)
    for place, array in enumerate(arrays):
        out[place, : array.shape[0], : array.shape[1]] = array
    return out


def _folded(recipe: Recipe, weights: Sequence[np.ndarray], mean: np.ndarray, scale: np.ndarray) -> Head:
    """A head without padding, that takes raw features: (x - mean) * scale @ k + b = x @ (scale k) + (b - mean scale k)."""
    sizes = _layers(recipe, len(mean))
    kernels = [weights[2 * layer][:rows, :columns] for layer, (rows, columns) in enumerate(sizes)]
    biases = [weights[2 * layer + 1][0, :columns] for layer, (_, columns) in enumerate(sizes)]
    kernels[0] = scale[:, None] * kernels[0]
    biases[0] = biases[0] - mean @ kernels[0]
    return Head(recipe.features, tuple(kernels), tuple(biases))


def _draw(
    recipes: Sequence[Recipe],
    inside: Sequence[np.ndarray],
    randoms: Sequence[np.random.Generator],
    items: TrainingItems,
    plain: np.ndarray,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One epoch of every model: which view at which step, its label and weight, and the pace of learning.

    Returns:
        index int32, target float32, weight float32, each (steps, models, batch); pace float32 (steps, models).
    """
    batch = recipes[0].batch
    shown = [np.repeat(rows, items.copies[rows]) for rows in inside]
    steps = max(-(-len(rows) // batch) for rows in shown)
    index = np.zeros((len(recipes), steps * batch), np.int32)
    target = np.zeros((len(recipes), steps * batch), np.float32)
    weight = np.zeros((len(recipes), steps * batch), np.float32)
    pace = np.zeros((steps, len(recipes)), np.float32)
    for model, (recipe, rows, random) in enumerate(zip(recipes, shown, randoms, strict=True)):
        order = random.permutation(rows)
        seen = np.minimum(recipe.views * items.copies[order], items.views[order])
        view = (random.random(len(order)) * (seen + 1)).astype(np.int64)
        label = items.label[order].astype(np.float32)
        positives = label.sum()
        heavier = ((len(label) - positives) / positives) ** recipe.balance
        each = np.where(label == 1, heavier, 1.0)
        index[model, : len(order)] = plain[order] + view
        target[model, : len(order)] = label
        weight[model, : len(order)] = each / each.mean()
        progress = (epoch + np.arange(steps) / steps) / recipe.epochs
        pace[:, model] = 0.5 * (1 + np.cos(np.pi * progress))  # Loshchilov and Hutter 2017
        pace[-(-len(order) // batch) :, model] = 0  # it has seen all its items
    shape = (len(recipes), steps, batch)
    stacked = [np.swapaxes(each.reshape(shape), 0, 1) for each in (index, target, weight)]
    return stacked[0], stacked[1], stacked[2], pace


@lru_cache(maxsize=4)
def _epoch(depth: int) -> Any:
    """The graph of one epoch of a stack of heads of this depth, with AdamW (Loshchilov and Hutter 2019)."""
    import tensorflow as tf

    cube, plane = [None, None, None], [None, None]
    signature = [
        [tf.TensorSpec(cube, tf.float32)] * (6 * depth),  # state
        tf.TensorSpec(plane, tf.float16),  # x
        tf.TensorSpec(cube, tf.float32),  # mean
        tf.TensorSpec(cube, tf.float32),  # scale
        tf.TensorSpec(cube, tf.int32),  # index
        tf.TensorSpec(cube, tf.float32),  # target
        tf.TensorSpec(cube, tf.float32),  # weight
        tf.TensorSpec(plane, tf.float32),  # pace
        tf.TensorSpec([None, 3], tf.float32),  # hyper
        tf.TensorSpec([2], tf.int32),  # dice
        tf.TensorSpec([], tf.int32),  # taken
    ]
    count = 2 * depth

    def epoch(
        state: list[Any], x: Any, mean: Any, scale: Any, index: Any, target: Any, weight: Any, pace: Any,
        hyper: Any, dice: Any, taken: Any,
    ) -> Any:  # fmt: skip
        rate, decay, dropout = (hyper[:, column, None, None] for column in range(3))

        def step(number: Any, state: list[Any]) -> tuple[Any, list[Any]]:
            weights, first, second = state[:count], state[count : 2 * count], state[2 * count :]
            batch = (tf.cast(tf.gather(x, index[number]), tf.float32) - mean) * scale
            with tf.GradientTape() as tape:
                tape.watch(weights)
                signal = batch
                for layer in range(depth):
                    if layer:
                        signal = tf.nn.relu(signal)
                        seed = tf.stack([dice[0], dice[1] * 100_003 + number])
                        kept = tf.random.stateless_uniform(tf.shape(signal), seed) >= dropout
                        signal = tf.where(kept, signal / (1 - dropout), 0.0)
                    signal = signal @ weights[2 * layer] + weights[2 * layer + 1]
                losses = tf.nn.sigmoid_cross_entropy_with_logits(target[number], signal[..., 0])
                shown = tf.maximum(tf.reduce_sum(tf.sign(weight[number]), axis=1), 1.0)
                # Heads share no weight, so the gradient of the sum is that of each mean.
                loss = tf.reduce_sum(losses * weight[number], axis=1) / shown
            gradients = tape.gradient(loss, weights)
            time = tf.cast(taken + number + 1, tf.float32)
            first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients, strict=True)]
            second = [0.999 * v + 0.001 * g * g for v, g in zip(second, gradients, strict=True)]
            moved = []
            for place, (w, m, v) in enumerate(zip(weights, first, second, strict=True)):
                direction = (m / (1 - 0.9**time)) / (tf.sqrt(v / (1 - 0.999**time)) + 1e-6)
                shrink = decay * w if place % 2 == 0 else 0.0  # biases do not decay
                moved.append(w - rate * pace[number][:, None, None] * (direction + shrink))
            return number + 1, moved + first + second

        steps = tf.shape(index)[0]
        return tf.while_loop(lambda number, _: number < steps, step, (0, list(state)))[1]

    return tf.function(epoch, input_signature=signature)


@lru_cache(maxsize=4)
def _forward(depth: int) -> Any:
    """The graph that scores items by a stack of heads of this depth: (items, channels) -> (heads, items)."""
    import tensorflow as tf

    cube = [None, None, None]
    signature = [tf.TensorSpec([None, None], tf.float32), [tf.TensorSpec(cube, tf.float32)] * (2 * depth)]

    def forward(x: Any, weights: list[Any]) -> Any:
        signal = x[None]
        for layer in range(depth):
            signal = (tf.nn.relu(signal) if layer else signal) @ weights[2 * layer] + weights[2 * layer + 1]
        return tf.sigmoid(signal[..., 0])

    return tf.function(forward, input_signature=signature)
