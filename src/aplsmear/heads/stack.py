"""Training many small heads side by side.

Heads of one recipe train as a *stack*: one lane for each head, with its own held-out folds, batches and
random numbers. A stack only saves time: the bits of a head do not depend on the other lanes. Heads on bags of
images (patients) train in the same way; see `aplsmear.heads.bags`.

Measured and rejected: threads over stacks (twice as slow on two cores, since a step is many short calls), and
all trials in one stack (features would be gathered once for all, at most 12 % of the time, but each
hyper-parameter would be a vector and narrow heads would be padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from aplsmear.files import rows_of
from aplsmear.heads.arithmetic import Bags, Network, cross_entropy, sigmoid
from aplsmear.heads.head import (
    Head,
    Job,
    Recipe,
    TrainingItems,
    layer_sizes,
    mean_head,
    padded_deviation,
    parameters,
)

JUDGED = 512  # images judged at a time, at least
_WEIGHTS = 200_000  # of a stack, about: with their moments and gradients they stay in the cache of a core

T = TypeVar("T")


@dataclass(frozen=True)
class Judged:
    """The results of one head on each of its held-out folds, at the epoch that was best there."""

    epoch: dict[int, int]  # fold -> number of epochs
    score: dict[int, np.ndarray]  # fold -> float32: logits of the fold's items, in their order
    failure: str = ""  # the reason why there are no results


@dataclass(frozen=True)
class Material:
    """What heads are trained on, and how."""

    values: Mapping[str, np.ndarray]  # name of features -> float16 (views, channels), maybe memory-mapped
    items: TrainingItems  # a job trains on those outside its held-out folds
    seed: int  # with trial and held-out folds, of a head's weights; with the held-out folds, of its batches
    memory: int  # MiB of features kept in memory, at most; what does not fit is read again in each epoch
    bag: int = 1  # images of an item in a step, drawn from all that it has; more than one for bags
    restarts: int = 1  # heads that differ by their random numbers alone; a trained head is their mean


def train_heads(jobs: Sequence[Job], material: Material) -> list[Head]:
    """One head for each job: the mean of heads from several starts, trained for the epochs of the job.

    Raises:
        ValueError: a job is left with one class only.
        FloatingPointError: a head has weights that are not finite.
    """
    starts = range(material.restarts)
    every = [replace(job, start=job.start * len(starts) + start) for job in jobs for start in starts]
    heads = _trained(every, material, Stack.train)
    return [mean_head(heads[i * len(starts) : (i + 1) * len(starts)]) for i in range(len(jobs))]


def judge_heads(jobs: Sequence[Job], material: Material, patience: int) -> list[Judged]:
    """Train heads, and judge each after every epoch on the plain views of each of its held-out folds.

    Each fold has its own result, which depends on no item of another held-out fold: that of the epoch with
    the lowest loss on it (class weights as in training). A head stops after `patience` epochs without a gain
    on any fold; with 0 it trains all epochs, and the last one is the result.

    A head whose loss is not finite, or that does not fit into memory, has a `failure` instead of results.

    Raises ValueError: a job is left with one class only.
    """

    def judge(stack: Stack) -> list[Judged]:
        try:
            return stack.judge(patience)
        except MemoryError:
            failure = f"out of memory: set tune.memory below {material.memory} (MiB)"
            return [Judged({}, {}, failure)] * len(stack.lanes)

    return _trained(jobs, material, judge)


def _trained(jobs: Sequence[Job], material: Material, train: Callable[[Stack], list[T]]) -> list[T]:
    """What `train` returns for each job, in their order."""
    found: dict[int, T] = {}
    for features in sorted({job.recipe.features for job in jobs}):
        with np.errstate(all="ignore"):  # numbers that are not finite become a failure
            table = Table(features, material)
            for places in plan(jobs, features, material):
                results = train(Stack([jobs[place] for place in places], material, table))
                found.update(zip(places, results, strict=True))
    return [found[place] for place in range(len(jobs))]


def plan(jobs: Sequence[Job], features: str, material: Material) -> list[list[int]]:
    """The places of the jobs of each stack on these features.

    The jobs of a stack have one recipe and equally many held-out folds. A stack on bags is a single job.
    """
    groups: dict[tuple[Recipe, int], list[int]] = {}
    for place, job in enumerate(jobs):
        if job.recipe.features == features:
            groups.setdefault((job.recipe, len(job.held_out)), []).append(place)
    stacks = []
    for (recipe, _), places in groups.items():
        size = parameters(recipe, material.values[features].shape[1])
        lanes = 1 if material.items.size is not None else max(_WEIGHTS // size, 1)
        stacks += [places[start : start + lanes] for start in range(0, len(places), lanes)]
    return stacks


class Lane:
    """One head: its training items, the order in which it sees them, and its random numbers."""

    def __init__(self, job: Job, items: TrainingItems, seed: int) -> None:
        """The lane of a job; a ValueError if one class only is left to train on."""
        self.job, self.items, self.held_out = job, items, tuple(sorted(job.held_out))
        inside = np.flatnonzero(~np.isin(items.fold, self.held_out))
        self.shown = np.repeat(inside, items.copies[inside])
        positive = float((items.label[self.shown] == 1).sum())
        negative = float((items.label[self.shown] == 0).sum())
        if not positive or not negative:
            raise ValueError(f"without the folds {list(self.held_out)} only one class is left to train on")
        # On average, items weigh 1.
        heavier = (negative / positive) ** job.recipe.balance
        mean = (positive * heavier + negative) / (positive + negative)
        self.weights = heavier / mean, 1 / mean  # of a positive and of a negative item
        self.judged = [np.flatnonzero(items.fold == fold) for fold in self.held_out]
        # Folds count from 1, so that a 0 separates what follows them.
        folds = [fold + 1 for fold in self.held_out]
        self.order_of = np.random.Generator(np.random.Philox([seed, job.recipe.views, *folds]))
        own = [seed, job.trial, *folds, *([0, job.start] if job.start else [])]
        self.random = np.random.Generator(np.random.Philox(own))
        self.dropout = np.random.PCG64(np.random.SeedSequence(own, spawn_key=(1,)))

    def draw(self, count: int, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw the next `count` items, at most `images` of each, and a view of each image.

        Returns:
            int64 (count, images), rows of views; int64 (count,), how many of these an item has (the first
            fills the rest); int8 (count,), labels.
        """
        items, rounds = self.items, -(-count // len(self.shown))
        # In random order, each item as often as the others.
        order = np.concatenate([self.order_of.permutation(self.shown) for _ in range(rounds)])[:count]
        copies = items.copies[order]
        if items.size is None:
            image, kept = order[:, None], np.ones(count, np.int64)
        else:
            size = items.size[order]
            lots = self.order_of.random((count, max(int(size.max()), images)))
            lots[np.arange(lots.shape[1]) >= size[:, None]] = 2  # sorts behind all images
            chosen = np.argsort(lots, axis=1, kind="stable")[:, :images]
            kept = np.minimum(size, images)
            chosen = np.where(np.arange(images) < kept[:, None], chosen, chosen[:, :1])
            image = (np.cumsum(items.size) - items.size)[order, None] + chosen
        views = np.minimum(self.job.recipe.views * copies[:, None], items.views[image])
        view = (self.order_of.random(image.shape) * (views + 1)).astype(np.int64)
        return items.row[image] + view, kept, items.label[order]


class Table:
    """The features that stacks read, as float32."""

    def __init__(self, features: str, material: Material) -> None:
        """The features of this name, in memory if `Material.memory` allows it."""
        items, self.values = material.items, material.values[features]
        self._block = material.memory * 2**14  # bytes of a block: 1/64 of the memory
        self._memory: np.ndarray | None = None
        views = np.concatenate([np.arange(r, r + v + 1) for r, v in zip(items.row, items.views, strict=True)])
        used = np.unique(views)
        if len(used) * self.values.shape[1] * 4 <= material.memory * 2**19:
            self._place = np.zeros(len(self.values), np.int64)
            self._place[used] = np.arange(len(used))
            self._memory = rows_of(self.values, used).astype(np.float32)
        places = (np.flatnonzero(items.fold == fold) for fold in range(int(items.fold.max()) + 1))
        self._sums = [_sums(self.values, items.row[items.images(each)]) for each in places]

    def standardisation(self, held_out: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and 1 / deviation of each channel, over the plain views outside these folds.

        Both float32 (channels,).
        """
        inside = [each for fold, each in enumerate(self._sums) if fold not in held_out]
        total, square, count = (np.sum(each, axis=0) for each in zip(*inside, strict=True))
        mean = total / count
        deviation = np.sqrt(np.maximum(square / count - mean**2, 0))
        return mean.astype(np.float32), (1 / padded_deviation(deviation)).astype(np.float32)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The features of some views, float32 (..., channels)."""
        if self._memory is None:
            return rows_of(self.values, rows).astype(np.float32)
        return np.asarray(self._memory.take(self._place[rows], axis=0))

    def read_steps(self, steps: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The features of the views (rows, int64) of each step; from disk for several steps at once."""
        size = 4 * self.values.shape[1] * steps[0].size
        count = 1 if self._memory is not None else max(self._block // size, 1)
        for start in range(0, len(steps), count):
            part = steps[start : start + count]
            found = self.read(np.concatenate([rows.ravel() for rows in part]))
            ends = np.cumsum([rows.size for rows in part])
            for rows, x in zip(part, np.split(found, ends[:-1]), strict=True):
                yield x.reshape(*rows.shape, -1)


class Stack:
    """Heads of one recipe, one a lane."""

    def __init__(self, jobs: Sequence[Job], material: Material, table: Table) -> None:
        """Heads with their first weights (Glorot and Bengio 2010)."""
        self.recipe, self.items, self.table = jobs[0].recipe, material.items, table
        self.bag = material.bag
        self.steps = steps_of_epoch(self.items, len(jobs[0].held_out), self.recipe.batch)
        self.lanes = [Lane(job, self.items, material.seed) for job in jobs]
        moments = [table.standardisation(lane.held_out) for lane in self.lanes]
        self.mean, self.scale = (np.stack(each)[:, None] for each in zip(*moments, strict=True))
        sizes = layer_sizes(self.recipe.depth, self.recipe.width, table.values.shape[1])
        attention = self.items.size is not None and self.recipe.depth > 0
        self.network = Network(len(jobs), sizes, attention, self.recipe.activation)
        for number, kernel in enumerate(self.network.weights[::2]):
            rows, columns = kernel.shape[1:]
            gates = 2 if number == len(sizes) else 1  # two kernels side by side
            limit = np.sqrt(6 / (rows + columns / gates))
            for weights, lane in zip(kernel, self.lanes, strict=True):
                weights[:] = lane.random.uniform(-limit, limit, (rows, columns))

    def train(self) -> list[Head]:
        """The head of each lane."""
        lanes = {lane: place for place, lane in enumerate(self.lanes)}
        heads: dict[int, Head] = {}
        for epoch in range(self.recipe.epochs + 1):
            if epoch:
                self._epoch(epoch - 1)
            ends = [self.recipe.epochs if lane.job.epochs is None else lane.job.epochs for lane in self.lanes]
            heads |= {lanes[lane]: self._head(n) for n, lane in enumerate(self.lanes) if ends[n] == epoch}
            if not self._keep(np.array(ends) > epoch):
                break
        return [heads[place] for place in range(len(lanes))]

    def judge(self, patience: int) -> list[Judged]:
        """The results of each lane."""
        every = list(self.lanes)
        found = {lane: Judged({}, {}) for lane in every}
        least: dict[tuple[Lane, int], float] = {}
        for epoch in range(1, self.recipe.epochs + 1):
            self._epoch(epoch - 1)
            if not patience and epoch < self.recipe.epochs:
                continue
            going = np.ones(len(self.lanes), bool)
            for number, lane in enumerate(self.lanes):
                mine = found[lane]
                for fold, (loss, logits) in self._judge(number).items():
                    if not np.isfinite(loss):
                        reason = f"loss not finite in epoch {epoch} without folds {list(lane.held_out)}"
                        mine = found[lane] = Judged({}, {}, reason)
                        break
                    if not patience or loss < least.get((lane, fold), np.inf):
                        least[lane, fold] = loss
                        mine.epoch[fold], mine.score[fold] = epoch, logits
                waited = epoch - max(mine.epoch.values(), default=0)
                going[number] = not mine.failure and (not patience or waited < patience)
            if not self._keep(going):
                break
        return [found[lane] for lane in every]

    def _keep(self, going: np.ndarray) -> bool:
        """Drop the lanes that are finished; whether any is left."""
        if not going.all():
            self.lanes = [lane for lane, goes in zip(self.lanes, going, strict=True) if goes]
            self.mean, self.scale = self.mean[going], self.scale[going]
            self.network.keep(going)
        return bool(self.lanes)

    def _epoch(self, epoch: int) -> None:
        """Train all lanes for one epoch."""
        recipe, count = self.recipe, self.steps * self.recipe.batch
        drawn = [lane.draw(count, self.bag) for lane in self.lanes]
        rows, sizes, labels = (_by_step(np.stack(each), recipe.batch) for each in zip(*drawn, strict=True))
        shares = np.ones((self.steps, len(self.lanes), 1), np.float32)
        if recipe.mixup:
            for number, lane in enumerate(self.lanes):
                shares[:, number, 0] = lane.random.beta(recipe.mixup, recipe.mixup, self.steps)
        if self.items.size is not None:
            kept = np.arange(rows.shape[-1]) < sizes[..., None]
            wanted = [each[mine][None] for each, mine in zip(rows, kept, strict=True)]
        else:
            wanted = list(rows[..., 0])
        rate = recipe.learning_rate * pace(recipe, epoch)
        for step, x in enumerate(self.table.read_steps(wanted)):
            bags = None if self.items.size is None else Bags.of(sizes[step, 0])
            self._step(x, bags, labels[step] == 1, shares[step], rate)

    def _step(
        self, x: np.ndarray, bags: Bags | None, positive: np.ndarray, share: np.ndarray, rate: float
    ) -> None:
        """Train all lanes for one step on float32 (lanes, rows, channels), at a learning rate.

        The loss of an item is a softplus(logit) - b logit: cross-entropy of weight a with the label b / a.
        `positive` is bool (lanes, items); `share`, float32 (lanes, 1), what an item keeps of itself in mixup.
        """
        recipe, network = self.recipe, self.network

        def mix(signal: np.ndarray) -> np.ndarray:
            """Mixup (Zhang et al. 2018) of each item with its mirror image in the batch."""
            mine = share if signal.ndim == 2 else share[..., None]
            return np.asarray(mine * signal + (1 - mine) * signal[:, ::-1])

        # The first product is linear: behind it, mixing is what it would be before. Bags mix their logits.
        inside = mix if recipe.mixup and bags is None else None
        outside = mix if recipe.mixup and bags is not None else np.asarray
        dropout = self._dropout if recipe.dropout else None
        logits, tape = network.forward(self._standardised(x), bags, inside, dropout)
        class_weights = np.array([lane.weights for lane in self.lanes], np.float32)
        weight = np.where(positive, class_weights[:, :1], class_weights[:, 1:])
        low, high = np.float32(recipe.smoothing / 2), np.float32(1 - recipe.smoothing / 2)
        aimed = weight * np.where(positive, high, low)
        if recipe.mixup:
            weight, aimed = mix(weight), mix(aimed)
        error = (weight * sigmoid(outside(logits)) - aimed) / np.float32(recipe.batch)
        network.backward(outside(error), tape, inside)
        network.step(rate, recipe.weight_decay)

    def _standardised(self, x: np.ndarray, lanes: slice = slice(None)) -> np.ndarray:
        """Features of some lanes, standardised in place."""
        x -= self.mean[lanes]
        x *= self.scale[lanes]
        return x

    def _dropout(self, shape: tuple[int, ...]) -> np.ndarray:
        """Factors of dropout, float32: 0, or 1 over the share that is kept. It is a multiple of 1 / 65536."""
        count = shape[1] * shape[2]
        bits = np.stack([lane.dropout.random_raw(-(-count // 4)) for lane in self.lanes])
        kept = min(max(round((1 - self.recipe.dropout) * 65536), 1), 65535)
        factors = (bits.view(np.uint16)[:, :count] < kept) * np.float32(65536 / kept)
        return np.asarray(factors.reshape(shape))

    def _judge(self, number: int) -> dict[int, tuple[float, np.ndarray]]:
        """Mean loss and logits of one lane on each of its held-out folds that has items."""
        lane, items, lanes = self.lanes[number], self.items, slice(number, number + 1)
        found = {}
        for fold, places in zip(lane.held_out, lane.judged, strict=True):
            if not len(places):
                continue
            logits = []
            parts = min(-(-len(items.images(places)) // JUDGED), len(places))
            for part in np.array_split(places, parts):
                x = self._standardised(self.table.read(items.row[items.images(part)])[None], lanes)
                bags = None if items.size is None else Bags.of(items.size[part])
                logits.append(self.network.forward(x, bags, lanes=lanes)[0][0])
            logit, positive = np.concatenate(logits), items.label[places] == 1
            loss = cross_entropy(logit, positive) * np.where(positive, *lane.weights)
            found[fold] = float(loss.mean(dtype=np.float64)), logit
        return found

    def _head(self, lane: int) -> Head:
        """The head of a lane, for features as they are: (x - m) s @ k + b = x @ (s k) + (b - m s k)."""
        weights = [weight[lane].copy() for weight in self.network.weights]
        end = 2 * self.recipe.depth + 2
        kernels, biases = weights[:end:2], [bias[0] for bias in weights[1:end:2]]
        attention = weights[end:]
        kernels[0] *= self.scale[lane].T
        biases[0] -= self.mean[lane, 0] @ kernels[0]
        if not all(np.isfinite(weight).all() for weight in weights):
            raise FloatingPointError(f"trial {self.lanes[lane].job.trial} has weights that are not finite")
        if attention:
            attention[1] = attention[1][0]
        recipe = self.recipe
        return Head(recipe.features, tuple(kernels), tuple(biases), recipe.activation, tuple(attention))


def _by_step(array: np.ndarray, size: int) -> np.ndarray:
    """(lanes, steps x size, ...) -> (steps, lanes, size, ...)."""
    return np.swapaxes(array.reshape(len(array), -1, size, *array.shape[2:]), 0, 1)


def pace(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch (from 0), as a share of the recipe's."""
    progress = (epoch + 0.5) / max(recipe.epochs, 1)
    if recipe.schedule == "cosine":
        return float(0.5 * (1 + np.cos(np.pi * min(progress, 0.99))))  # Loshchilov and Hutter 2017
    return 1.0 - min(progress, 0.99) if recipe.schedule == "linear" else 1.0


def steps_of_epoch(items: TrainingItems, held_out: int, batch: int) -> int:
    """Steps of an epoch: the same for all heads with so many held-out folds, whichever these are."""
    folds = int(items.fold.max()) + 1
    return max(round(int(items.copies.sum()) * (folds - held_out) / folds / batch), 1)


def _sums(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Sum and sum of squares of each channel over some rows, float64 (channels,), and the number of rows."""
    total, square = np.zeros((2, values.shape[1]))
    for start in range(0, len(rows), 4096):
        part = rows_of(values, rows[start : start + 4096]).astype(np.float64)
        total += part.sum(axis=0)
        square += (part * part).sum(axis=0)
    return total, square, len(rows)
