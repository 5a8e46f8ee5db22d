"""Training the uppermost blocks of a backbone together with its head.

The deeper a block, the slower it learns (Howard & Ruder 2018). What the frozen part gives for a view is
computed once and kept on disk, so that an epoch costs the uppermost blocks only. With `online` the whole
network runs instead, and every view is turned, mirrored and lit anew each time that it is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc
from aplsmear.evaluation.splits import HeldOut
from aplsmear.files import new_array, whole, write_arrays
from aplsmear.finetune.devices import machine_strategy, precision_of
from aplsmear.finetune.network import HEAD, Divided, join, set_head
from aplsmear.heads.head import Head, Recipe, TrainingItems
from aplsmear.images.reading import decode, fitting
from aplsmear.images.view_store import View
from aplsmear.params import Finetune, Precision

SCORED = 256  # views of one forward pass
ALONE = 10**6  # passes of the head alone count from here, so that they show other views than epochs do


class FinetuneError(UserError, ValueError):
    """A model that cannot be trained on as asked."""


@dataclass(frozen=True)
class Run:
    """One model to train, from a head that was trained on the same patients."""

    name: str
    recipe: Recipe  # of the head: its views, balance and smoothing hold here too
    held_out: HeldOut
    judged: int | None  # the fold that it is judged on after every epoch
    epochs: int  # at most


@dataclass(frozen=True)
class Kinds:
    """What the head tells apart: kinds of negative items, which come first, and of positive ones."""

    of: np.ndarray  # int64 (items,)
    count: tuple[int, int]  # of negative and of positive kinds
    patient: np.ndarray  # int64 (items,): whose they are, as a number


@dataclass(frozen=True)
class Course:
    """How a run went."""

    loss: list[float]  # of training, one an epoch
    auroc: list[float]  # on the judged fold, one an epoch from epoch 0 on; none without one
    seconds: float

    @property
    def best_epoch(self) -> int:
        """The first of the best."""
        return int(np.argmax(self.auroc))


@dataclass(frozen=True)
class Store:
    """What the part that trains reads of each view: activations of the frozen part, or images."""

    place: np.ndarray  # int64 (views of the level,): the row of each view in `arrays`, or -1
    arrays: list[np.ndarray]  # (rows, ...): float16 activations or uint8 images; memory-mapped
    # views -> float16 (views, channels), for a head that trains alone
    features: Callable[[np.ndarray], np.ndarray] | None = None

    def read(self, views: np.ndarray) -> tuple[np.ndarray, ...]:
        """What some views give, float32 or uint8."""
        found = (each[self.place[views]] for each in self.arrays)
        return tuple(each if each.dtype == np.uint8 else each.astype(np.float32) for each in found)


class Trainer:
    """A network that trains: one run after another, each from a fresh start or from its own last epoch."""

    def __init__(
        self, network: Callable[[], Divided], settings: Finetune, light: float = 0.0, strategy: Any = None
    ) -> None:
        """Build and compile.

        Args:
            network: makes it; called within the strategy.
            settings: of the training.
            light: how much online augmentation changes the brightness, relative, either way.
            strategy: tf.distribute.Strategy; None: what `machine_strategy` finds.
        """
        import tensorflow as tf
        from keras import Model, losses, optimizers
        from keras.utils import clear_session

        self.settings, self.light = settings, light
        self.strategy = strategy or machine_strategy()
        clear_session()  # so that names do not depend on what was built before
        with self.strategy.scope(), precision_of(settings.precision):
            self.network = network()
            self.model, scorer = self.network.sorter, self.network.top
            if settings.online:
                image = self.network.trunk.input
                given = self.network.trunk(image, training=False)
                self.model, scorer = Model(image, self.model(given)), Model(image, scorer(given))
            depth = self.network.depth
            blocks = sorted(set(depth.values()) - {HEAD})
            by_block = {each: optimizers.Adam(settings.rate * settings.rate_decay**each) for each in blocks}
            by_block[HEAD] = optimizers.Adam(settings.head_rate)

            def of_block(weight: Any) -> Any:
                return by_block[depth[weight.path]]

            optimizer = optimizers.MultiOptimizer(of_block)
            loss = losses.CategoricalCrossentropy(from_logits=True)
            alone = optimizers.AdamW(settings.head.rate, weight_decay=settings.head.weight_decay)
            for model, rates in ((self.model, optimizer), (self.network.members, alone)):
                if model is not None:
                    model.compile(rates, loss, jit_compile=False)
                    model.optimizer.build(model.trainable_variables)
        self._fresh = [each.numpy() for each in self._state()]
        self._fresh_members = [each.numpy() for each in self._state_of_members()]
        self._whole = tf.function(lambda images: self.network.whole(images, training=False))
        self._forward = tf.function(lambda given: scorer(given, training=False))

    def start(self, head: Head, mean: np.ndarray, scale: np.ndarray) -> None:
        """The frozen model: the backbone as it came and this head on it, see `set_head`."""
        _assign(self._state(), self._fresh)
        _assign(self._state_of_members(), self._fresh_members)
        set_head(self.network, head, mean, scale)
        self._head = head

    def train(
        self, run: Run, items: TrainingItems, kinds: Kinds, store: Store, seed: int, checkpoint: Path
    ) -> Iterator[Course]:
        """Train on from `start`, or from the last epoch in `checkpoint`.

        Args:
            run: what to train.
            items: those outside its held-out folds train.
            kinds: of the items.
            store: of their views.
            seed: of their order.
            checkpoint: a file; after each epoch all that training goes on from is there.

        Yields:
            The course so far, after every epoch and at least once. The same bits, cut off or not.
        """
        course = self._resume(checkpoint) or Course([], self._judged(run, items, store), 0.0)
        yield course
        while not self._done(run, course):
            started = time.perf_counter()
            first = not course.loss and self.settings.head.epochs
            train = self._members if first else self._epoch
            loss = train(run, items, kinds, store, seed, len(course.loss))
            if not np.isfinite(loss):
                raise FinetuneError(
                    f"{run.name}: the loss is no number in epoch {len(course.loss) + 1}: "
                    "lower finetune.rate and finetune.head_rate"
                )
            course = Course(
                [*course.loss, loss],
                [*course.auroc, *self._judged(run, items, store)],
                course.seconds + time.perf_counter() - started,
            )
            self._keep(checkpoint, course)
            yield course

    def weights(self) -> list[np.ndarray]:
        """Those of the part that trains."""
        return [each.numpy() for each in self.network.top.weights]

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Those of `weights`."""
        self.network.top.set_weights(weights)

    def logits(self, views: np.ndarray, store: Store) -> np.ndarray:
        """float32 (views,)."""
        found = np.zeros(len(views), np.float32)
        for start in range(0, len(views), SCORED):
            part = views[start : start + SCORED]
            given = store.read(np.resize(part, SCORED))  # one shape, one graph
            found[start : start + SCORED] = self._forward(_bare(given)).numpy()[: len(part), 0]
        return found

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Of uint8 (batch, size, size, 3): float32 (batch,)."""
        return np.asarray(self._whole(images).numpy()[:, 0])

    def _judged(self, run: Run, items: TrainingItems, store: Store) -> list[float]:
        if run.judged is None:
            return []
        here = np.flatnonzero(items.fold == run.judged)
        return [auroc(items.label[here], self.logits(items.row[here], store))]

    def _done(self, run: Run, course: Course) -> bool:
        patience = self.settings.patience
        tired = run.judged is not None and len(course.auroc) - 1 - course.best_epoch >= patience > 0
        return len(course.loss) >= run.epochs or tired

    def _members(
        self, run: Run, items: TrainingItems, kinds: Kinds, store: Store, seed: int, _: int
    ) -> float:
        """Train the members on features for all of their epochs, ever slower, and put their mean with the
        head in its place; the mean loss of the last."""
        network, settings = self.network.members, self.settings.head
        if store.features is None:
            raise FinetuneError(f"{run.name}: there are no features for the head to train on alone")
        for epoch in range(settings.epochs):
            view, target, weight = epoch_items(run, items, kinds, self.settings, seed, ALONE + epoch)
            network.optimizer.learning_rate = (
                settings.rate * (1 + np.cos(np.pi * epoch / settings.epochs)) / 2
            )
            shown = len(view) - len(view) % self.settings.batch or len(view)
            history = network.fit(
                store.features(view[:shown]).astype(np.float32),
                np.repeat(target[:shown, None], settings.members, axis=1),
                sample_weight=np.repeat(weight[:shown, None], settings.members, axis=1),
                batch_size=self.settings.batch,
                shuffle=False,
                verbose=0,
            )
        join(self.network, self._head)
        return float(history.history["loss"][0])

    def _epoch(
        self, run: Run, items: TrainingItems, kinds: Kinds, store: Store, seed: int, epoch: int
    ) -> float:
        """Train for one epoch; the mean loss."""
        import tensorflow as tf

        view, target, weight = epoch_items(run, items, kinds, self.settings, seed, epoch)
        batch = min(self.settings.batch, len(view))
        steps = len(view) // batch

        def batches() -> Iterator[Any]:
            # Made here: with several devices, TensorFlow starts this more than once.
            rng = np.random.Generator(np.random.Philox([1, *_entropy(run, seed, epoch)]))
            for step in range(steps):
                here = slice(step * batch, (step + 1) * batch)
                given = store.read(view[here])
                if self.settings.online:
                    given = (shown_anew(given[0], self.light, rng),)
                yield _bare(given), target[here], weight[here]

        types = [np.uint8 if each.dtype == np.uint8 else np.float32 for each in store.arrays]
        given = tuple(
            tf.TensorSpec((batch, *each.shape[1:]), kind)
            for each, kind in zip(store.arrays, types, strict=True)
        )
        rows = tf.TensorSpec((batch, target.shape[1]), tf.float32), tf.TensorSpec((batch,), tf.float32)
        data = tf.data.Dataset.from_generator(batches, output_signature=(_bare(given), *rows))
        history = self.model.fit(data.prefetch(2), steps_per_epoch=steps, shuffle=False, verbose=0)
        return float(history.history["loss"][0])

    def _state(self) -> list[Any]:
        """All that training goes on from after an epoch: weights, the state of dropout, the optimiser's."""
        return [*self.network.top.variables, *self.model.optimizer.variables]

    def _state_of_members(self) -> list[Any]:
        """Theirs; no later epoch goes on from it."""
        members = self.network.members
        return [*members.variables, *members.optimizer.variables] if members is not None else []

    def _resume(self, checkpoint: Path) -> Course | None:
        if not checkpoint.is_file():
            return None
        with np.load(checkpoint, allow_pickle=False) as kept:
            _assign(self._state(), [kept[f"state.{number}"] for number in range(len(self._fresh))])
            return Course(kept["loss"].tolist(), kept["auroc"].tolist(), float(kept["seconds"]))

    def _keep(self, checkpoint: Path, course: Course) -> None:
        arrays: dict[str, Any] = {f"state.{n}": each.numpy() for n, each in enumerate(self._state())}
        arrays |= {"loss": course.loss, "auroc": course.auroc, "seconds": course.seconds}
        write_arrays(checkpoint, arrays)


def check_precision(precision: Precision) -> None:
    """Raise FinetuneError if half precision is asked for where there is no GPU: a CPU lacks its kernels."""
    import tensorflow as tf

    if precision == "on" and not tf.config.list_logical_devices("GPU"):
        raise FinetuneError(
            "finetune.precision: half precision takes a GPU, and TensorFlow sees none: set it to auto or off"
        )


def epoch_items(
    run: Run, items: TrainingItems, kinds: Kinds, settings: Finetune, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an epoch shows, in order: view rows int64 (shown,), targets float32 (shown, kinds), weights
    float32 (shown,): the rarer a kind, the heavier, as far as the recipe's balance says, and within a kind
    the fewer its patient has, as far as `finetune.patient_weight` says.

    Raises:
        FinetuneError: one class only is left to train on.
    """
    random = np.random.Generator(np.random.Philox([0, *_entropy(run, seed, epoch)]))
    inside = np.flatnonzero(~np.isin(items.fold, sorted(run.held_out)))
    if len(np.unique(items.label[inside])) < 2:
        raise FinetuneError(f"{run.name}: without folds {sorted(run.held_out)} only one class is left")
    shown = random.permutation(np.repeat(inside, items.copies[inside]))
    seen = np.minimum(settings.views * items.copies[shown], items.views[shown])
    view = items.row[shown] + (random.random(len(shown)) * (seen + 1)).astype(np.int64)
    kind = kinds.of[shown]
    count = np.bincount(kind, minlength=sum(kinds.count))
    _, owner, owned = np.unique(
        np.stack([kind, kinds.patient[shown]]), axis=1, return_inverse=True, return_counts=True
    )
    share = owned[owner] ** -settings.patient_weight
    share /= (np.bincount(kind, share) / np.maximum(count, 1))[kind]  # a kind as a whole weighs as before
    weight = share * np.maximum(count, 1.0)[kind] ** -run.recipe.balance
    smoothing = run.recipe.smoothing
    target = np.eye(len(count))[kind] * (1 - smoothing) + smoothing / len(count)
    return view, target.astype(np.float32), (weight / weight.mean()).astype(np.float32)


def shown_anew(images: np.ndarray, light: float, rng: np.random.Generator) -> np.ndarray:
    """Each image in one of its eight positions and in another light: online augmentation.

    Args:
        images: uint8 (batch, size, size, 3).
        light: relative, either way.
        rng: what chance is drawn from.
    """
    turns = rng.integers(0, 4, len(images))
    mirrored = rng.integers(0, 2, len(images))
    factor = rng.uniform(1 - light, 1 + light, len(images)).astype(np.float32)
    out = np.empty_like(images)
    for number, image in enumerate(images):
        turned = np.rot90(image, turns[number])
        turned = turned[:, ::-1] if mirrored[number] else turned
        out[number] = np.clip(turned * factor[number] + 0.5, 0, 255).astype(np.uint8)
    return out


def make_store(
    folder: Path, views: Iterator[list[View]], wanted: np.ndarray, network: Divided, size: int, online: bool
) -> Store:
    """Compute and keep what the part that trains reads; what an earlier process kept whole is taken as it is.

    Args:
        folder: gets one .npy file an array.
        views: all of the level, in their order, in batches.
        wanted: bool (views,): those that will be read.
        network: whose `trunk` is asked.
        size: pixels of an image.
        online: keep images, not activations.

    Raises:
        FinetuneError: an activation is no number that float16 can hold.
    """
    import tensorflow as tf

    place = np.where(wanted, np.cumsum(wanted) - 1, -1)
    shapes = [(size, size, 3)] if online else [tuple(each.shape[1:]) for each in network.trunk.outputs]
    kind = np.uint8 if online else np.float16
    paths = [folder / f"{number}.npy" for number in range(len(shapes))]
    forward = tf.function(lambda images: network.trunk(images, training=False))
    if not all(path.is_file() for path in paths):
        with ExitStack() as stack:
            arrays = [
                new_array(stack.enter_context(whole(path)), kind, (int(wanted.sum()), *shape))
                for path, shape in zip(paths, shapes, strict=True)
            ]
            first = 0
            for batch in views:
                here = np.flatnonzero(wanted[first : first + len(batch)])
                rows = place[first + here]
                first += len(batch)
                if len(rows):
                    images = np.zeros((len(batch), size, size, 3), np.uint8)  # mostly of one shape: one graph
                    for number, row in enumerate(here):
                        images[number] = fitting(decode(batch[row].image), size)
                    given = [images] if online else [each.numpy() for each in _listed(forward(images))]
                    for array, each in zip(arrays, given, strict=True):
                        array[rows] = _narrow(each[: len(rows)], kind)
            for array in arrays:
                array.flush()
    return Store(place, [np.load(path, mmap_mode="r") for path in paths])


def middles_of(path: Path, store: Store, network: Divided) -> np.ndarray:
    """Compute and keep the features of the middle of all that a store holds; see `make_store`.

    Args:
        path: of a .npy file.
        store: of `make_store`.
        network: of which it was made; as it came, not trained on.

    Returns:
        float16 (rows of the store, channels), memory-mapped.
    """
    import tensorflow as tf

    def middles(given: Any) -> Any:
        below = network.trunk(given, training=False) if store.arrays[0].dtype == np.uint8 else given
        return network.middles(below, training=False)

    forward, views = tf.function(middles), np.flatnonzero(store.place >= 0)
    if not path.is_file():
        with whole(path) as part:
            array = new_array(part, np.float16, (len(views), network.middles.output_shape[1]))
            for start in range(0, len(views), SCORED):
                here = views[start : start + SCORED]
                found = forward(_bare(store.read(np.resize(here, SCORED)))).numpy()
                array[start : start + SCORED] = _narrow(found[: len(here)], np.float16)
            array.flush()
    return np.asanyarray(np.load(path, mmap_mode="r"))


def _assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _narrow(values: np.ndarray, kind: Any) -> np.ndarray:
    if kind == np.float16 and not bool((np.abs(values) <= np.finfo(np.float16).max).all()):
        raise FinetuneError(
            f"activations of the frozen part are beyond float16 (largest: {np.abs(values).max():.3g}): "
            "choose another number of finetune.blocks"
        )
    return values.astype(kind)


def _entropy(run: Run, seed: int, epoch: int) -> list[int]:
    return [seed, epoch, *(fold + 1 for fold in sorted(run.held_out))]


def _bare(given: Sequence[Any]) -> Any:
    """Keras wants one input bare, several in a tuple."""
    return tuple(given) if len(given) > 1 else given[0]


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, list | tuple) else [found]
