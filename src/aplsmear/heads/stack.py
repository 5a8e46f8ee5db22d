"""Training many small heads as one computation.

Heads that read the same features train together as a *stack* of lanes x models. A lane is a set of held-out
folds (and a number of views): its models see the same batches, so a batch is gathered and standardised once
for all of them, and the first product of a lane is one matrix product over the columns of all its models.
Their learning rates, weight decays, dropout rates, class weights, label smoothing, mixup and activations are
vectors over (lane, model); narrower models are padded with zeros, which stay zero, since neither signal nor
gradient reaches them.

The learning rate of a model scales its weights instead of its steps (W = rate * V, and V takes steps of Adam
with rate 1, whose direction does not depend on the scale of the gradient). So one fused update serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aplsmear.files import rows_of
from aplsmear.heads.head import ACTIVATIONS, Head, Job, Recipe, TrainingItems, layer_sizes, mean_head
from aplsmear.heads.stack_graphs import Block, Knobs, judge_graph, standardise_graph, train_graph

JUDGED = 512  # items judged at a time
STEP_FLOPS = (
    2e7  # what a processor could compute in the time that TensorFlow takes to start the operations of a step
)


@dataclass(frozen=True)
class Judged:
    """How one head did on each of its held-out folds, at the epoch that was best there."""

    epoch: dict[int, int]  # fold -> epochs trained, counted from 1
    score: dict[int, np.ndarray]  # fold -> float32: logits of the fold's items, in their order
    failure: str = ""  # why there are none


@dataclass(frozen=True)
class Material:
    """What heads are trained on, and with what means."""

    values: Mapping[
        str, np.ndarray
    ]  # for each name of features, float16 (views, channels); may be memory-mapped
    items: TrainingItems  # a job sees those outside its held-out folds
    seed: int  # with trial and held-out folds, of a head's weights; with the held-out folds, of its batches
    memory: int  # MiB that a stack may take (one head alone may take more)
    bag: int = 1  # images of an item that a step sees, of those that it has; more than one for bags
    restarts: int = 1  # heads that differ by chance alone and whose mean a trained head is


def train_heads(jobs: Sequence[Job], material: Material, kind: type[Stack] | None = None) -> list[Head]:
    """Train heads for as many epochs as their jobs say, each from several starts, and take their mean.

    Args:
        jobs: what to train.
        material: what to train it on.
        kind: of stack; None: `Stack`.

    Returns:
        One head a job, in their order. The same call gives the same bits.

    Raises:
        ValueError: a job is left with one class only.
        FloatingPointError: a head came out with weights that are not finite.
    """
    heads: dict[int, Head] = {}
    table = None
    starts = range(material.restarts)
    every = [replace(job, start=job.start * len(starts) + start) for job in jobs for start in starts]
    for chosen in plan(every, material):
        stack = (kind or Stack)([every[i] for i in chosen], material, table)
        table = stack.table
        heads.update((chosen[place], head) for place, head in stack.train())
    return [mean_head([heads[i * len(starts) + start] for start in starts]) for i in range(len(jobs))]


def judge_heads(
    jobs: Sequence[Job], material: Material, patience: int, kind: type[Stack] | None = None
) -> list[Judged]:
    """Train heads and judge each after every epoch, on the plain views of each of its held-out folds apart.

    What is judged on one held-out fold depends on no item of another: for each fold, the epoch with the
    lowest loss there (class weights as in training) is kept. A head stops when no fold has gained for
    `patience` epochs. Without patience the last epoch counts, that in which a falling learning rate has
    come to rest, and the others are not judged.

    Args:
        jobs: what to train.
        material: what to train it on.
        patience: in epochs; 0 trains every head to its end.
        kind: of stack; None: `Stack`.

    Returns:
        One a job, in their order. A head whose loss is not finite, or whose stack does not fit into memory,
        has a `failure` instead of scores; the others do not notice.

    Raises:
        ValueError: a job is left with one class only.
    """
    import tensorflow as tf

    judged: dict[int, Judged] = {}
    table = None
    for chosen in plan(jobs, material):
        try:
            stack = (kind or Stack)([jobs[i] for i in chosen], material, table)
            table = stack.table
            found = stack.judge(patience)
        except (MemoryError, tf.errors.ResourceExhaustedError):
            failure = (
                f"out of memory: {len(chosen)} heads together; set tune.memory below {material.memory} (MiB)"
            )
            found = [Judged({}, {}, failure)] * len(chosen)
        judged.update(zip(chosen, found, strict=True))
    return [judged[i] for i in range(len(jobs))]


def plan(jobs: Sequence[Job], material: Material) -> list[list[int]]:
    """Which jobs train together: those of the same features, depth and batch, where that costs less than
    apart.

    Together they share the overhead of a step; apart, nobody is padded to the width of another or to the
    number of models of the fullest lane. A stack that would take more than half of the memory is divided.
    """
    memory = material.memory
    groups: dict[tuple[str, int, int, int], dict[tuple[int, int, int], list[int]]] = {}
    for number, job in enumerate(jobs):
        recipe = job.recipe
        group = groups.setdefault((recipe.features, recipe.depth, recipe.batch, len(job.held_out)), {})
        group.setdefault((recipe.views, -recipe.width, job.trial), []).append(number)
    stacks: list[list[int]] = []
    for (features, *_), units in sorted(groups.items()):
        channels = material.values[features].shape[1]
        mine: list[list[int]] = []
        for _, unit in sorted(units.items()):
            for part in _parts(unit, jobs, channels, material):
                alone = _cost([jobs[i] for i in part], channels, material.bag)[0]
                best, place = alone, -1
                for number, stack in enumerate(mine):
                    joined, size = _cost([jobs[i] for i in stack + part], channels, material.bag)
                    more = joined - _cost([jobs[i] for i in stack], channels, material.bag)[0]
                    if more < best and size <= memory * 2**19:
                        best, place = more, number
                if place < 0:
                    mine.append(part)
                else:
                    mine[place] = mine[place] + part
        stacks += mine
    return stacks


def _parts(unit: list[int], jobs: Sequence[Job], channels: int, material: Material) -> list[list[int]]:
    """The jobs of one trial, halved until they fit into memory or stand alone."""
    size = _cost([jobs[i] for i in unit], channels, material.bag)[1]
    if len(unit) == 1 or size <= material.memory * 2**19:
        return [unit]
    half = len(unit) // 2
    return _parts(unit[:half], jobs, channels, material) + _parts(unit[half:], jobs, channels, material)


def _cost(jobs: Sequence[Job], channels: int, bag: int = 1) -> tuple[float, float]:
    """Of a stack: the floating-point operations of a step, overhead included, and its bytes.

    What attention takes beside the hidden layer that it looks at is about three layers more.
    """
    lanes = _lanes(jobs)
    models = len(lanes) * max(len(lane) for lane in lanes.values())
    width = max(job.recipe.width if job.recipe.depth else 1 for job in jobs)
    batch, depth = jobs[0].recipe.batch * bag, jobs[0].recipe.depth + 3 * (bag > 1)
    weights = models * (channels + width * max(depth - 1, 0)) * width
    gathered = len(lanes) * batch * channels
    state = 16 * weights  # weights, two moments, gradient
    signals = max(batch, JUDGED) * (16 * models * width * max(depth, 1) + 10 * len(lanes) * channels)
    return STEP_FLOPS + 40.0 * gathered + (4.0 * batch + 60) * weights, float(state + signals)


def _lanes(jobs: Sequence[Job]) -> dict[tuple[tuple[int, ...], int], list[int]]:
    lanes: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, job in enumerate(jobs):
        lanes.setdefault((tuple(sorted(job.held_out)), job.recipe.views), []).append(number)
    return dict(sorted(lanes.items()))


class Lane:
    """The items of a lane and the order in which its models see them."""

    def __init__(self, held_out: tuple[int, ...], views: int, items: TrainingItems, seed: int) -> None:
        """A lane that misses these folds and sees at most so many augmented views of an image."""
        self.items, self.views, self.held_out = items, views, held_out
        inside = np.flatnonzero(~np.isin(items.fold, held_out))
        self.shown = np.repeat(inside, items.copies[inside])
        self.positive = float((items.label[self.shown] == 1).sum())
        self.negative = float((items.label[self.shown] == 0).sum())
        if not self.positive or not self.negative:
            raise ValueError(f"without the folds {list(held_out)} only one class is left to train on")
        self.judged = np.concatenate(
            [np.flatnonzero(items.fold == fold) for fold in held_out] or [inside[:0]]
        )
        self.random = np.random.Generator(np.random.Philox([seed, views, *(fold + 1 for fold in held_out)]))

    def order(self, count: int) -> np.ndarray:
        """The next so many items, in random order without repeats until all have been seen."""
        rounds = -(-count // len(self.shown))
        return np.concatenate([self.random.permutation(self.shown) for _ in range(rounds)])[:count]

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """View rows and labels of the next so many items."""
        order = self.order(count)
        seen = np.minimum(self.views * self.items.copies[order], self.items.views[order])
        view = (self.random.random(count) * (seen + 1)).astype(np.int64)
        return self.items.row[order] + view, self.items.label[order]

    def weights(self, recipe: Recipe) -> tuple[float, float]:
        """What an item of the positive and of the negative class weighs; on average, items weigh 1."""
        heavier = (self.negative / self.positive) ** recipe.balance
        mean = (self.positive * heavier + self.negative) / (self.positive + self.negative)
        return heavier / mean, 1 / mean


class Stack:
    """Jobs of one plan: their lanes, hyper-parameters and weights."""

    def __init__(self, jobs: Sequence[Job], material: Material, table: Table | None) -> None:
        """Heads at their start; `table` is an earlier stack's, used again where it fits."""
        lanes = _lanes(jobs)
        items, seed = material.items, material.seed
        self.jobs, self.bag = jobs, material.bag
        self.recipe = jobs[0].recipe  # what all have in common: features, depth, batch
        self.channels = material.values[self.recipe.features].shape[1]
        self.lanes = [Lane(held_out, views, items, seed) for held_out, views in lanes]
        models = max(len(lane) for lane in lanes.values())
        self.place = np.full((len(lanes), models), -1)  # of each slot: its job, or -1
        for number, mine in enumerate(lanes.values()):
            self.place[number, : len(mine)] = mine
        self.width = max(job.recipe.width for job in jobs) if self.recipe.depth else 1
        self.steps = steps_of_epoch(items, len(jobs[0].held_out), self.recipe.batch)
        self.randoms = [np.random.Generator(np.random.Philox(_job_seed(job, seed))) for job in jobs]
        self.rng = int(np.random.SeedSequence([seed, *(job.trial for job in jobs)]).generate_state(1)[0] >> 2)
        self.knobs = self._knobs()
        held_out = [lane.held_out for lane in self.lanes]
        made_of = self.recipe.features, tuple(dict.fromkeys(held_out))
        self.table = table if table and table.made_of == made_of else Table(*made_of, material)
        self.sets = self.table.sets(held_out)
        self.state = self._start()
        self.taken = 0

    def train(self) -> Iterator[tuple[int, Head]]:
        """Each job's place and head."""
        last = {
            place: job.recipe.epochs if job.epochs is None else job.epochs
            for place, job in enumerate(self.jobs)
        }
        for epoch in range(max(last.values()) + 1):
            if epoch:
                self._epoch(epoch - 1)
            done = np.isin(self.place, [place for place, end in last.items() if end == epoch])
            for lane, slot in np.argwhere(done):
                yield int(self.place[lane, slot]), self._head(lane, slot)
            if done.any():
                self._drop(done)

    def judge(self, patience: int) -> list[Judged]:
        """Each job on its held-out folds."""
        found = [Judged({}, {}) for _ in self.jobs]
        least = {(place, fold): np.inf for place, job in enumerate(self.jobs) for fold in job.held_out}
        for epoch in range(max(job.recipe.epochs for job in self.jobs)):
            self._epoch(epoch)
            alive = self.place[self.place >= 0]
            if not patience and epoch + 1 not in {self.jobs[place].recipe.epochs for place in alive}:
                continue
            losses, logits = self._judge()
            done = np.zeros(self.place.shape, bool)
            for lane, slot in np.argwhere(self.place >= 0):
                place = int(self.place[lane, slot])
                here = self.lanes[lane]
                start = 0
                for number, fold in enumerate(here.held_out):
                    count = int((here.items.fold == fold).sum())
                    loss = losses[lane, slot, number]
                    if count and (loss < least[place, fold] or not patience):
                        least[place, fold] = loss
                        found[place].epoch[fold] = epoch + 1
                        found[place].score[fold] = logits[lane, slot, start : start + count].copy()
                    start += count
                if not np.isfinite(losses[lane, slot]).all():
                    reason = f"loss not finite in epoch {epoch + 1} without folds {list(here.held_out)}"
                    found[place] = Judged({}, {}, reason)
                    done[lane, slot] = True
                waited = epoch + 1 - max(found[place].epoch.values(), default=0)
                done[lane, slot] |= epoch + 1 == self.jobs[place].recipe.epochs or (0 < patience <= waited)
            if done.any():
                self._drop(done)
            if not self.place.size:
                break
        return found

    def _vector(self, of: Callable[[Recipe], float], padding: float = 0.0) -> np.ndarray:
        """One number of each slot's recipe: float32 (lanes, models)."""
        return np.array(
            [[of(self.jobs[i].recipe) if i >= 0 else padding for i in lane] for lane in self.place],
            np.float32,
        )

    def _knobs(self) -> Knobs:
        weights = np.zeros((2, *self.place.shape), np.float32)
        for lane, slot in np.argwhere(self.place >= 0):
            weights[:, lane, slot] = self.lanes[lane].weights(self.jobs[self.place[lane, slot]].recipe)
        return Knobs(
            rate=np.ones(self.place.shape, np.float32),
            decay=self._vector(lambda recipe: recipe.weight_decay),
            dropout=self._vector(lambda recipe: recipe.dropout if recipe.depth else 0.0),
            smoothing=self._vector(lambda recipe: recipe.smoothing),
            positive=weights[0],
            negative=weights[1],
            activation=self._vector(lambda recipe: ACTIVATIONS.index(recipe.activation)).astype(np.int32),
        )

    def _start(self) -> list[list[Any]]:
        """First weights and both moments of Adam for each of them."""
        import tensorflow as tf

        weights = self._weights()
        return [
            [tf.Variable(each, shape=tf.TensorShape([None] * each.ndim)) for each in group]
            for group in (weights, [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights])
        ]

    def _weights(self) -> list[np.ndarray]:
        """Kernel and bias of each layer."""
        lanes, models = self.place.shape
        sizes = layer_sizes(self.recipe.depth, self.width, self.channels)
        weights: list[np.ndarray] = []
        for layer, (rows, columns) in enumerate(sizes):
            kernel = np.zeros((lanes, models, rows, columns), np.float32)
            for lane, slot in np.argwhere(self.place >= 0):
                place = self.place[lane, slot]
                own = self.jobs[place].recipe
                size = layer_sizes(own.depth, own.width, self.channels)[layer]
                limit = np.sqrt(6 / sum(size))  # Glorot and Bengio 2010
                kernel[lane, slot, : size[0], : size[1]] = self.randoms[place].uniform(-limit, limit, size)
            side_by_side = np.swapaxes(kernel, 1, 2).reshape(lanes, rows, models * columns)
            weights += [kernel if layer else side_by_side, np.zeros((lanes, models, 1, columns), np.float32)]
        return weights

    def _epoch(self, epoch: int) -> None:
        """Train all models for one epoch."""
        self._pace(epoch)
        batch, lanes = self.recipe.batch, len(self.lanes)
        rows = np.zeros((self.steps, lanes, batch), np.int64)
        target = np.zeros((self.steps, lanes, batch), np.float32)
        for number, lane in enumerate(self.lanes):
            row, label = lane.draw(self.steps * batch)
            rows[:, number] = row.reshape(self.steps, batch)
            target[:, number] = label.reshape(self.steps, batch)
        share = self._shares()
        train = train_graph(self.recipe.depth)
        for steps, x, index in self.table.blocks(rows, self.sets):
            block = Block(x, index, target[steps])
            train(self.state, block, share[steps], self.knobs, np.array([self.rng, self.taken], np.int32))
            self.taken += len(index)

    def _shares(self) -> np.ndarray:
        """What an item keeps of itself in mixup: float32 (steps, lanes, models)."""
        share = np.ones((self.steps, *self.place.shape), np.float32)
        for lane, slot in np.argwhere(self.place >= 0):
            mixup = self.jobs[self.place[lane, slot]].recipe.mixup
            if mixup:
                share[:, lane, slot] = self.randoms[self.place[lane, slot]].beta(mixup, mixup, self.steps)
        return share

    def _pace(self, epoch: int) -> None:
        """Set the learning rates of an epoch; the scaled weights change so that the weights do not."""
        rate = self._vector(lambda recipe: recipe.learning_rate * pace(recipe, epoch), 1.0)
        change = self.knobs.rate / rate
        if (change != 1).any():
            for layer, weight in enumerate(self.state[0]):
                weight.assign(weight * (self._columns(change) if not layer else change[..., None, None]))
        self.knobs = self.knobs._replace(rate=rate)

    def _columns(self, vector: np.ndarray) -> np.ndarray:
        """(lanes, models) -> (lanes, 1, columns of the first layer)."""
        return np.repeat(vector, self.width, axis=1)[:, None]

    def _judge(self) -> tuple[np.ndarray, np.ndarray]:
        """Loss on each held-out fold (lanes, models, folds), and logits (lanes, models, judged items)."""
        longest = max(len(lane.judged) for lane in self.lanes)
        chunks = max(-(-longest // JUDGED), 1)
        folds = max(len(lane.held_out) for lane in self.lanes)
        rows = np.zeros((len(self.lanes), chunks * JUDGED), np.int64)
        target = np.zeros(rows.shape, np.float32)
        fold = np.zeros((*rows.shape, folds), np.float32)
        for number, lane in enumerate(self.lanes):
            count = len(lane.judged)
            rows[number] = lane.items.row[lane.judged[0] if count else 0]
            rows[number, :count] = lane.items.row[lane.judged]
            target[number, :count] = lane.items.label[lane.judged]
            for place, held_out in enumerate(lane.held_out):
                fold[number, :count, place] = lane.items.fold[lane.judged] == held_out
        stepped = [by_step(each, JUDGED) for each in (rows, target, fold)]
        total = np.zeros((*self.place.shape, folds), np.float64)
        logits = []
        for steps, x, index in self.table.blocks(stepped[0], self.sets):
            block = Block(x, index, stepped[1][steps])
            loss, logit = judge_graph(self.recipe.depth)(self.state[0], block, stepped[2][steps], self.knobs)
            total += loss.numpy().sum(axis=0, dtype=np.float64)
            logits += list(logit.numpy())
        counts = fold.sum(axis=1)[:, None]
        return total / np.maximum(counts, 1), np.concatenate(logits, axis=2)

    def _head(self, lane: int, slot: int) -> Head:
        """A head without padding that takes raw features: (x - m) s @ k + b = x @ (s k) + (b - m s k)."""
        job = self.jobs[self.place[lane, slot]]
        rate = self.knobs.rate[lane, slot]
        columns = slice(slot * self.width, (slot + 1) * self.width)
        kernels, biases = [], []
        for layer, (rows, width) in enumerate(layer_sizes(job.recipe.depth, job.recipe.width, self.channels)):
            kernel, bias = self.state[0][2 * layer], self.state[0][2 * layer + 1]
            mine = kernel[lane, :, columns] if not layer else kernel[lane, slot]
            kernels.append(rate * mine.numpy()[:rows, :width])
            biases.append(rate * bias[lane, slot, 0].numpy()[:width])
        mean, scale = self.table.mean[self.sets[lane], 0], self.table.scale[self.sets[lane], 0]
        kernels[0] = scale[:, None] * kernels[0]
        biases[0] = biases[0] - mean @ kernels[0]
        if not all(np.isfinite(each).all() for each in kernels + biases):
            raise FloatingPointError(f"trial {job.trial} came out with weights that are not finite")
        return Head(job.recipe.features, tuple(kernels), tuple(biases), job.recipe.activation)

    def _drop(self, done: np.ndarray) -> None:
        """Take finished models out of the stack, once enough of it would be computed for nothing."""
        import tensorflow as tf

        self.place = np.where(done, -1, self.place)
        alive = self.place >= 0
        lanes = np.flatnonzero(alive.any(axis=1))
        models = int(alive.sum(axis=1).max(initial=0))
        if len(lanes) * models > 0.8 * alive.size:
            return
        slots = np.argsort(~alive[lanes], axis=1, kind="stable")[:, :models]
        self.place = self.place[lanes[:, None], slots]
        self.knobs = Knobs(*(knob[lanes[:, None], slots] for knob in self.knobs))
        self.sets = self.sets[lanes]
        self.lanes = [self.lanes[lane] for lane in lanes]
        columns = (slots[:, :, None] * self.width + np.arange(self.width)).reshape(
            len(lanes), models * self.width
        )
        for group in self.state:
            group[0].assign(tf.gather(tf.gather(group[0], lanes), columns, axis=2, batch_dims=1))
            for weight in group[1:]:
                weight.assign(tf.gather(tf.gather(weight, lanes), slots, batch_dims=1))


class Table:
    """The features that stacks read, standardised for each held-out set: all in memory, or block by block."""

    def __init__(self, features: str, held_out: Sequence[tuple[int, ...]], material: Material) -> None:
        """The features of this name, for each of the held-out sets."""
        items, self.values = material.items, material.values[features]
        self.made_of = features, tuple(held_out)
        self.mean, self.scale = _standardisation(self.values, items, held_out)
        self.block = material.memory * 2**14  # bytes of a block: 1/64 of the memory
        self.used = np.unique(
            np.concatenate([np.arange(r, r + v + 1) for r, v in zip(items.row, items.views, strict=True)])
        )
        self.x: Any = None
        if len(held_out) * len(self.used) * self.values.shape[1] * 4 <= material.memory * 2**16:
            here = rows_of(self.values, self.used)[None, None]
            self.x = standardise_graph()(here, self.mean, self.scale)

    def sets(self, held_out: Sequence[tuple[int, ...]]) -> np.ndarray:
        """The places of held-out sets in this table."""
        return np.array([self.made_of[1].index(each) for each in held_out], np.int64)

    def blocks(self, rows: np.ndarray, sets: np.ndarray) -> Iterator[tuple[slice, Any, np.ndarray]]:
        """Steps of (steps, lanes, items) rows, the features they need, and where in these each row is.

        Args:
            rows: int64 (steps, lanes, items).
            sets: the place of each lane's held-out set.
        """
        if self.x is not None:
            index = np.searchsorted(self.used, rows) + (sets * len(self.used))[:, None]
            yield slice(None), self.x, index.astype(np.int32)
            return
        each = max(self.block // (rows[0].size * self.values.shape[1] * 4), 1)
        for start in range(0, len(rows), each):
            part = rows[start : start + each]
            found = standardise_graph()(rows_of(self.values, part), self.mean[sets], self.scale[sets])
            yield slice(start, start + each), found, np.arange(part.size, dtype=np.int32).reshape(part.shape)


def by_step(array: np.ndarray, size: int) -> np.ndarray:
    """(lanes, steps x size, ...) -> (steps, lanes, size, ...)."""
    return np.swapaxes(array.reshape(len(array), -1, size, *array.shape[2:]), 0, 1)


def pace(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch (from 0), as a share of the recipe's."""
    progress = (epoch + 0.5) / max(recipe.epochs, 1)
    if recipe.schedule == "cosine":
        return float(0.5 * (1 + np.cos(np.pi * min(progress, 0.99))))  # Loshchilov and Hutter 2017
    return 1.0 - min(progress, 0.99) if recipe.schedule == "linear" else 1.0


def steps_of_epoch(items: TrainingItems, held_out: int, batch: int) -> int:
    """Steps of an epoch: the same for all heads that miss as many folds, so that they can train side by
    side."""
    folds = int(items.fold.max()) + 1
    return max(round(int(items.copies.sum()) * (folds - held_out) / folds / batch), 1)


def _job_seed(job: Job, seed: int) -> list[int]:
    # Folds are counted from 1, so that what stands behind a 0 cannot be taken for one.
    return [
        seed,
        job.trial,
        *(fold + 1 for fold in sorted(job.held_out)),
        *[0, job.start][: 2 * (job.start > 0)],
    ]


def _standardisation(
    values: np.ndarray, items: TrainingItems, held_out: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1/deviation of channels over the plain views outside held-out sets: (sets, 1, channels)."""
    fold_of = items.image_fold
    folds = np.unique(fold_of)
    total, square = np.zeros((2, len(folds), values.shape[1]))
    for number, fold in enumerate(folds):
        rows = items.row[fold_of == fold]
        for start in range(0, len(rows), 4096):
            part = rows_of(values, rows[start : start + 4096]).astype(np.float64)
            total[number] += part.sum(axis=0)
            square[number] += (part**2).sum(axis=0)
    count = np.array([(fold_of == fold).sum() for fold in folds], np.float64)
    means, scales = [], []
    for unseen in held_out:
        seen = ~np.isin(folds, unseen)
        mean = total[seen].sum(axis=0) / count[seen].sum()
        with np.errstate(invalid="ignore"):  # features that are not finite come out as a loss that is not
            deviation = np.sqrt(np.maximum(square[seen].sum(axis=0) / count[seen].sum() - mean**2, 0))
        # A channel that hardly moves is not blown up to the size of the others.
        scales.append(1 / (deviation + 0.05 * deviation.mean() + 1e-6))
        means.append(mean)
    return np.stack(means)[:, None].astype(np.float32), np.stack(scales)[:, None].astype(np.float32)
