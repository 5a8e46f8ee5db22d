"""Training of the uppermost blocks of a backbone together with its head.

The learning rate falls from block to block, from the top down (Howard & Ruder 2018). The output of the frozen
part is cached, so an epoch costs only the uppermost blocks. With `finetune.online` the whole network runs
instead, and each view is rotated, mirrored and brightened anew every time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc
from aplsmear.files import write_arrays
from aplsmear.finetune.cache import ViewCache, bare
from aplsmear.finetune.network import Network, join_heads, set_head
from aplsmear.finetune.sampling import EXTRA, Run, TrainingSet, augment_online, epoch_items, rng_of
from aplsmear.heads.head import Head
from aplsmear.params import Finetune, Precision


@dataclass(frozen=True)
class History:
    """Loss and AUROC of a run over its epochs."""

    loss: list[float]  # of training, one for each epoch
    auroc: list[float]  # on the judged fold, one for each epoch, from epoch 0; empty without a judged fold
    seconds: float

    @property
    def best_epoch(self) -> int:
        """The epoch with the highest AUROC; the first of several."""
        return int(np.argmax(self.auroc))


class Trainer:
    """A network for heads of one recipe, which trains one run after another, and what it reads."""

    def __init__(
        self,
        network: Callable[[], Network],
        cache: Callable[[Network], ViewCache],
        data: TrainingSet,
        settings: Finetune,
        brightness: float = 0.0,
        strategy: Any = None,
    ) -> None:
        """Build the network by a call of `network`, within the scope of the strategy, and compile it.

        `cache` returns what the network reads of the views. `brightness` is its largest relative change in
        online augmentation. The strategy is one of tf.distribute; None: all GPUs, each with a part of a
        batch, or the CPU.
        """
        import tensorflow as tf
        from keras import Model
        from keras.utils import clear_session

        self.data, self.settings, self.brightness = data, settings, brightness
        if strategy is None and len(tf.config.list_logical_devices("GPU")) > 1:
            strategy = tf.distribute.MirroredStrategy()
        clear_session()  # the names of layers must not depend on what was built before
        with (strategy or tf.distribute.get_strategy()).scope(), _precision(settings.precision):
            self.network = network()
            self.model, scorer = self.network.classifier, self.network.top
            if settings.online:
                image = self.network.backbone.trunk.input
                given = self.network.backbone.trunk(image, training=False)
                self.model, scorer = Model(image, self.model(given)), Model(image, scorer(given))
            self._compile()
        self._fresh = [each.numpy() for each in [*self._state(), *self._state_of_extra_heads()]]
        self._whole = tf.function(lambda images: self.network.whole(images, training=False))
        self._forward = tf.function(lambda given: scorer(given, training=False))
        self.views = cache(self.network)

    def train(self, run: Run, head: Head, checkpoint: Path) -> Iterator[History]:
        """Train the frozen model with this head, or continue from a checkpoint. Both give the same bits.

        The items outside the held-out folds of the run train. The checkpoint is a file that gets, after each
        epoch, all that is needed to continue.

        Yields:
            The history so far, at the start and after every epoch.

        Raises UserError: loss or scores are not finite, or only one class is left to train on.
        """
        items = self.data.items
        seen = np.sort(items.row[~np.isin(items.fold, sorted(run.held_out))])
        _assign([*self._state(), *self._state_of_extra_heads()], self._fresh)
        set_head(self.network, head, *self.views.standardisation(seen))
        history = self._resume(checkpoint) or History([], self._judge(run), 0.0)
        yield history
        while len(history.loss) < run.epochs:
            if history.auroc and len(history.auroc) - 1 - history.best_epoch >= self.settings.patience > 0:
                break
            started = time.perf_counter()
            if not history.loss and self.settings.head.epochs:
                loss = self._train_extra_heads(run, head)
            else:
                loss = self._train_epoch(run, len(history.loss))
            _check_finite("the loss", loss)
            history = History(
                [*history.loss, loss],
                [*history.auroc, *self._judge(run)],
                history.seconds + time.perf_counter() - started,
            )
            self._keep(checkpoint, history)
            yield history

    def weights(self) -> list[np.ndarray]:
        """Weights of the part that trains."""
        return [each.numpy() for each in self.network.top.weights]

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Set what `weights` returned."""
        self.network.top.set_weights(weights)

    def score(self, views: np.ndarray) -> np.ndarray:
        """Probabilities of the positive class for some views: float64 (views,).

        Raises UserError: a logit is not finite.
        """
        return np.asarray(expit(self._logits(views).astype(np.float64)))

    def score_images(self, images: np.ndarray) -> np.ndarray:
        """Probabilities of the positive class for uint8 (batch, size, size, 3): float32 (batch,)."""
        return np.asarray(self._whole(images).numpy()[:, 0])

    def _compile(self) -> None:
        """Give the network an optimiser with a rate for each block, and the extra heads one of their own."""
        from keras import losses, optimizers

        settings, network = self.settings, self.network
        of_block = {
            block: optimizers.Adam(settings.rate * settings.rate_decay**block)
            for block in sorted(set(network.backbone.depth.values()))
        }
        of_head = optimizers.Adam(settings.head_rate)
        mine = {each.path: of_head for each in network.head.trainable_variables}
        mine |= {path: of_block[block] for path, block in network.backbone.depth.items()}
        optimizer = optimizers.MultiOptimizer(lambda weight: mine[weight.path])
        extra = optimizers.AdamW(settings.head.rate, weight_decay=settings.head.weight_decay)
        loss = losses.CategoricalCrossentropy(from_logits=True)
        for model, each in ((self.model, optimizer), (network.extras, extra)):
            if model is not None:
                model.compile(each, loss, jit_compile=False)
                model.optimizer.build(model.trainable_variables)

    def _logits(self, views: np.ndarray) -> np.ndarray:
        chunks = self.views.forward(self._forward, views)
        logits = np.concatenate([np.zeros(0, np.float32), *(each[:, 0] for each in chunks)])
        _check_finite("a score", logits)
        return logits

    def _judge(self, run: Run) -> list[float]:
        if run.judged is None:
            return []
        items = self.data.items
        here = np.flatnonzero(items.fold == run.judged)
        return [auroc(items.label[here], self._logits(items.row[here]))]

    def _train_extra_heads(self, run: Run, head: Head) -> float:
        """Train the extra heads on features and join them with a head; the mean loss of the last pass."""
        extra, settings, batch = self.network.extras, self.settings.head, self.settings.batch
        for epoch in range(settings.epochs):
            view, target, weight = epoch_items(run, self.data, self.settings, EXTRA + epoch)
            pace = (1 + np.cos(np.pi * epoch / settings.epochs)) / 2
            extra.optimizer.learning_rate = settings.rate * pace
            shown = len(view) - len(view) % batch or len(view)
            fitted = extra.fit(
                self.views.extra_features(view[:shown]).astype(np.float32),
                np.repeat(target[:shown, None], settings.members, axis=1),
                sample_weight=np.repeat(weight[:shown, None], settings.members, axis=1),
                batch_size=batch,
                shuffle=False,
                verbose=0,
            )
        join_heads(self.network, head)
        return float(fitted.history["loss"][0])

    def _train_epoch(self, run: Run, epoch: int) -> float:
        """Train for one epoch; the mean loss."""
        import tensorflow as tf

        view, target, weight = epoch_items(run, self.data, self.settings, epoch)
        batch = min(self.settings.batch, len(view))
        steps = len(view) // batch

        def batches() -> Iterator[Any]:
            # The generator is made here: with several devices, TensorFlow starts this more than once.
            rng = rng_of(1, run, self.data.seed, epoch)
            for step in range(steps):
                here = slice(step * batch, (step + 1) * batch)
                given = self.views.read(view[here])
                if self.settings.online:
                    given = (augment_online(given[0], self.brightness, rng),)
                yield bare(given), target[here], weight[here]

        given = [tf.TensorSpec(each.shape, each.dtype) for each in self.views.read(view[:batch])]
        rows = tf.TensorSpec((batch, target.shape[1]), tf.float32), tf.TensorSpec((batch,), tf.float32)
        dataset = tf.data.Dataset.from_generator(batches, output_signature=(bare(given), *rows))
        fitted = self.model.fit(dataset.prefetch(2), steps_per_epoch=steps, shuffle=False, verbose=0)
        return float(fitted.history["loss"][0])

    def _state(self) -> list[Any]:
        """All that training continues from: weights, and the states of dropout and optimiser."""
        return [*self.network.top.variables, *self.model.optimizer.variables]

    def _state_of_extra_heads(self) -> list[Any]:
        """The same of the extra heads. Epochs after the first do not need it."""
        extra = self.network.extras
        return [*extra.variables, *extra.optimizer.variables] if extra is not None else []

    def _resume(self, checkpoint: Path) -> History | None:
        if not checkpoint.is_file():
            return None
        with np.load(checkpoint, allow_pickle=False) as kept:
            _assign(self._state(), [kept[f"state.{number}"] for number in range(len(self._state()))])
            return History(kept["loss"].tolist(), kept["auroc"].tolist(), float(kept["seconds"]))

    def _keep(self, checkpoint: Path, history: History) -> None:
        arrays: dict[str, Any] = {f"state.{n}": each.numpy() for n, each in enumerate(self._state())}
        arrays |= {"loss": history.loss, "auroc": history.auroc, "seconds": history.seconds}
        write_arrays(checkpoint, arrays)


def check_precision(precision: Precision) -> None:
    """Raise a UserError if half precision is asked for without a GPU; a CPU lacks kernels for it."""
    import tensorflow as tf

    if precision == "on" and not tf.config.list_logical_devices("GPU"):
        raise UserError(
            "finetune.precision: half precision needs a GPU, and TensorFlow finds none: set it to auto or off"
        )


@contextmanager
def _precision(half: Precision) -> Iterator[None]:
    """Layers that are created in the block compute in float16, with weights in float32, or in float32."""
    import keras
    import tensorflow as tf

    before = keras.config.dtype_policy()
    wanted = half == "on" or (half == "auto" and tf.config.list_logical_devices("GPU"))
    keras.config.set_dtype_policy("mixed_float16" if wanted else "float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _check_finite(name: str, values: Any) -> None:
    if not np.isfinite(values).all():
        raise UserError(
            f"training diverged ({name} is not finite): lower finetune.rate and finetune.head_rate"
        )


def _assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
