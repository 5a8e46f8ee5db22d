"""The arithmetic of a stack of heads (see `aplsmear.heads.stack`), as TensorFlow graphs that fit stacks of
any size.

Signals have the shape (lanes, models, items, units). Gradients are written out, since the first layer of all
models of a lane is one product, and since the learning rate is a part of the weights; those of heads on bags,
whose attention sees all images of an item together, are TensorFlow's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from aplsmear.heads.head import ACTIVATIONS

EPSILON = 1e-7  # of Adam
DECAY_EVERY = 8  # steps: weights decay for so many at once, which saves a pass over all weights at most steps


class Knobs(NamedTuple):
    """Hyper-parameters, (lanes, models) each."""

    rate: Any  # float32: learning rate
    decay: Any  # float32
    dropout: Any  # float32
    smoothing: Any  # float32
    positive: Any  # float32: weight of an item of the positive class
    negative: Any  # float32
    activation: Any  # int32: place in ACTIVATIONS


class Block(NamedTuple):
    """Some steps: the items of each."""

    x: Any  # float32 (rows, channels): features, each row as the lane that uses it standardises it
    index: Any  # int32 (steps, lanes, items): rows of x
    target: Any  # float32 (steps, lanes, items)


class Bags(NamedTuple):
    """Some steps: the images of the items of each."""

    x: Any  # float32 (rows, channels): features, each row as the lane that uses it standardises it
    index: Any  # int32 (steps, lanes, items x images): rows of x
    size: Any  # int32 (steps, lanes, items): so many images of each item count, the first ones
    target: Any  # float32 (steps, lanes, items)


@lru_cache(maxsize=16)
def train_graph(depth: int) -> Any:
    """Trains a stack of heads with so many hidden layers for some steps.

    Takes the weights (kernel and bias of each layer) and both moments of Adam, lists of variables that it
    changes; a `Block`; for each step the share that an item keeps of itself in mixup, float32 (steps, lanes,
    models); `Knobs`; and int32 (2,), a seed and the number of steps taken before.
    """
    import tensorflow as tf

    def train(state: list[list[Any]], block: Block, shares: Any, knobs: Knobs, rng: Any) -> Any:
        weights, first_moment, second_moment = state
        rate, dropout = knobs.rate[..., None, None], knobs.dropout[..., None, None]
        models, width = tf.shape(weights[1])[1], tf.shape(weights[1])[3]
        shrink = (1 - rate * knobs.decay[..., None, None]) ** DECAY_EVERY
        columns = _columns(shrink, width)
        mixing, dropping = tf.reduce_any(shares < 1), tf.reduce_any(dropout > 0)

        def step(number: Any) -> Any:
            mix = _mixer(mixing, shares[number][:, :, None, None])
            batch = tf.gather(block.x, block.index[number])
            signal = mix(_first(batch, weights, rate))
            inputs, slopes = [], []
            for layer in range(1, depth + 1):
                signal, slope = _activated(signal, knobs.activation)
                mask = _mask(dropping, signal, dropout, tf.stack([rng[0] + layer, rng[1] + number]))
                inputs.append(signal * mask)
                slopes.append(slope * mask)
                signal = (tf.matmul(inputs[-1], weights[2 * layer]) + weights[2 * layer + 1]) * rate
            back = _error(signal, block.target[number], knobs, mix)
            gradients: list[Any] = []
            for layer in range(depth, 0, -1):
                gradients = [tf.matmul(inputs[layer - 1], back, transpose_a=True), _summed(back), *gradients]
                back = tf.matmul(back * rate, weights[2 * layer], transpose_b=True) * slopes[layer - 1]
            back = mix(back)
            side_by_side = tf.reshape(
                tf.transpose(back, [0, 2, 1, 3]), [-1, tf.shape(back)[2], models * width]
            )
            gradients = [tf.matmul(batch, side_by_side, transpose_a=True), _summed(back), *gradients]
            taken = rng[1] + number
            time = tf.cast(taken + 1, tf.float32)
            tf.cond(taken % DECAY_EVERY == 0, lambda: _decay(weights, shrink, columns), lambda: 0)
            for place, gradient in enumerate(gradients):
                _adam(weights[place], first_moment[place], second_moment[place], gradient, time)
            return number + 1

        steps = tf.shape(block.index)[0]
        return tf.while_loop(lambda number: number < steps, step, (0,))

    state = [_variables(_layers(depth)) for _ in range(3)]
    rng = tf.TensorSpec([2], tf.int32)
    return tf.function(train).get_concrete_function(state, _block(), _numbers(3), _knobs(), rng)


@lru_cache(maxsize=16)
def judge_graph(depth: int) -> Any:
    """Scores items by a stack of heads with so many hidden layers.

    Takes the weights; a `Block`; which fold an item is of, one-hot float32 (steps, lanes, items, folds); and
    `Knobs`. Returns the summed loss of each fold, float32 (steps, lanes, models, folds), and logits, float32
    (steps, lanes, models, items).
    """
    import tensorflow as tf

    def judge(weights: list[Any], block: Block, folds: Any, knobs: Knobs) -> Any:
        rate = knobs.rate[..., None, None]

        def one(number: Any) -> Any:
            signal = _first(tf.gather(block.x, block.index[number]), weights, rate)
            for layer in range(1, depth + 1):
                signal = _activated(signal, knobs.activation)[0]
                signal = (tf.matmul(signal, weights[2 * layer]) + weights[2 * layer + 1]) * rate
            logit = signal[..., 0]
            loss = _losses(logit, block.target[number][:, None], knobs)
            return tf.matmul(loss, folds[number]), logit

        steps = tf.range(tf.shape(block.index)[0])
        return tf.map_fn(one, steps, fn_output_signature=(tf.float32, tf.float32))

    variables = _variables(_layers(depth))
    return tf.function(judge).get_concrete_function(variables, _block(), _numbers(4), _knobs())


@lru_cache(maxsize=16)
def train_bags_graph(depth: int) -> Any:
    """Trains a stack of heads on bags for some steps: as `train_graph`, with `Bags` for a `Block`.

    Behind the weights of the layers come, with hidden layers, those of the attention: kernel and bias of the
    gates, the first half for tanh and the second for the sigmoid, and the vector.
    """
    import tensorflow as tf

    def train(state: list[list[Any]], bags: Bags, shares: Any, knobs: Knobs, rng: Any) -> Any:
        weights, first_moment, second_moment = state
        rate, dropout = knobs.rate[..., None, None], knobs.dropout[..., None, None]
        width = tf.shape(weights[1])[3]
        shrink = (1 - rate * knobs.decay[..., None, None]) ** DECAY_EVERY
        mixing, dropping = tf.reduce_any(shares < 1), tf.reduce_any(dropout > 0)

        def step(number: Any) -> Any:
            mix = _mixer(mixing, shares[number][:, :, None, None])
            taken = rng[1] + number
            values = [weight.read_value() for weight in weights]

            def mask(signal: Any, layer: int) -> Any:
                return _mask(dropping, signal, dropout, tf.stack([rng[0] + layer, taken]))

            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                signal = _bag_logits(bags, number, values, depth, knobs, mask)[..., None]
            back = mix(_error(mix(signal), bags.target[number], knobs, mix))
            gradients = tape.gradient(signal, values, output_gradients=back)
            time = tf.cast(taken + 1, tf.float32)
            columns = _columns(shrink, width)
            tf.cond(taken % DECAY_EVERY == 0, lambda: _decay(weights, shrink, columns), lambda: 0)
            for place, gradient in enumerate(gradients):
                scale = (
                    rate if place else _columns(rate, width)
                )  # Adam's epsilon goes by the weights themselves
                _adam(weights[place], first_moment[place], second_moment[place], gradient / scale, time)
            return number + 1

        steps = tf.shape(bags.index)[0]
        return tf.while_loop(lambda number: number < steps, step, (0,))

    state = [_variables(_layers(depth) + _attention(depth)) for _ in range(3)]
    rng = tf.TensorSpec([2], tf.int32)
    return tf.function(train).get_concrete_function(state, _bags(), _numbers(3), _knobs(), rng)


@lru_cache(maxsize=16)
def judge_bags_graph(depth: int) -> Any:
    """Scores items by a stack of heads on bags: as `judge_graph`, with `Bags` for a `Block`."""
    import tensorflow as tf

    def judge(weights: list[Any], bags: Bags, folds: Any, knobs: Knobs) -> Any:
        def one(number: Any) -> Any:
            logit = _bag_logits(bags, number, weights, depth, knobs, None)
            loss = _losses(logit, bags.target[number][:, None], knobs)
            return tf.matmul(loss, folds[number]), logit

        steps = tf.range(tf.shape(bags.index)[0])
        return tf.map_fn(one, steps, fn_output_signature=(tf.float32, tf.float32))

    variables = _variables(_layers(depth) + _attention(depth))
    return tf.function(judge).get_concrete_function(variables, _bags(), _numbers(4), _knobs())


@lru_cache(maxsize=1)
def standardise_graph() -> Any:
    """Standardises float16 (steps, lanes or 1, items, channels) by means and scales (lanes, 1, channels).

    Returns float32 (steps x lanes x items, channels).
    """
    import tensorflow as tf

    def standardise(x: Any, mean: Any, scale: Any) -> Any:
        return tf.reshape((tf.cast(x, tf.float32) - mean) * scale, [-1, tf.shape(x)[3]])

    return tf.function(standardise).get_concrete_function(_numbers(4, "float16"), _numbers(3), _numbers(3))


def _layers(depth: int) -> list[int]:
    """Dimensions of kernels and biases: the first kernel is (lanes, channels, models x width)."""
    return [3, 4] + [4, 4] * depth


def _attention(depth: int) -> list[int]:
    """Dimensions of the weights of an attention over the last hidden layer, if there is one."""
    return [4, 4, 4] if depth else []


def _variables(ranks: list[int]) -> list[Any]:
    """Weights of a stack of no size."""
    import tensorflow as tf

    return [tf.Variable(tf.zeros([0] * rank), shape=tf.TensorShape([None] * rank)) for rank in ranks]


def _numbers(rank: int, kind: str = "float32") -> Any:
    import tensorflow as tf

    return tf.TensorSpec([None] * rank, kind)


def _block() -> Block:
    return Block(_numbers(2), _numbers(3, "int32"), _numbers(3))


def _bags() -> Bags:
    return Bags(_numbers(2), _numbers(3, "int32"), _numbers(3, "int32"), _numbers(3))


def _knobs() -> Knobs:
    real, whole = _numbers(2), _numbers(2, "int32")
    return Knobs(real, real, real, real, real, real, activation=whole)


def _first(batch: Any, weights: list[Any], rate: Any) -> Any:
    """The first layer: (lanes, items, channels) -> signal."""
    import tensorflow as tf

    lanes, models, width = (tf.shape(weights[1])[axis] for axis in (0, 1, 3))
    signal = tf.reshape(tf.matmul(batch, weights[0]), [lanes, -1, models, width])
    return (tf.transpose(signal, [0, 2, 1, 3]) + weights[1]) * rate


def _bag_logits(
    bags: Bags,
    number: Any,
    weights: list[Any],
    depth: int,
    knobs: Knobs,
    mask: Callable[[Any, int], Any] | None,
) -> Any:
    """Logits of the items of a step, float32 (lanes, models, items): of their images, weighed by attention.

    The last layer is linear, so that this is the logit of the weighed embedding (Ilse et al. 2018).
    """
    import tensorflow as tf

    rate = knobs.rate[..., None, None]
    signal = _first(tf.gather(bags.x, bags.index[number]), weights, rate)
    size = bags.size[number]
    images = tf.shape(bags.index)[2] // tf.shape(size)[1]
    counts = tf.sequence_mask(size, images)[:, None]
    by_item = tf.concat([tf.shape(signal)[:2], tf.shape(counts)[2:]], axis=0)
    attention = tf.cast(counts, tf.float32) / tf.cast(size, tf.float32)[:, None, :, None]
    for layer in range(1, depth + 1):
        signal = _activated(signal, knobs.activation)[0]
        signal = signal * mask(signal, layer) if mask else signal
        if layer == depth:
            gates = (tf.matmul(signal, weights[-3]) + weights[-2]) * rate
            tanh, sigmoid = tf.split(gates, 2, axis=3)
            raw = tf.matmul(tf.tanh(tanh) * tf.sigmoid(sigmoid), weights[-1]) * rate
            attention = tf.nn.softmax(tf.where(counts, tf.reshape(raw, by_item), -np.inf))
        signal = (tf.matmul(signal, weights[2 * layer]) + weights[2 * layer + 1]) * rate
    return tf.reduce_sum(attention * tf.reshape(signal, by_item), axis=3)


def _losses(logit: Any, label: Any, knobs: Knobs) -> Any:
    """The weighed cross-entropy of logits (lanes, models, items) and labels (lanes, 1, items)."""
    import tensorflow as tf

    weight = tf.where(label > 0.5, knobs.positive[..., None], knobs.negative[..., None])
    return weight * (tf.nn.softplus(logit) - label * logit)


def _columns(each: Any, width: Any) -> Any:
    """A number of each model, (lanes, models, 1, 1), for each column of the first kernel."""
    import tensorflow as tf

    return tf.repeat(each[:, :, 0, 0], width, axis=1)[:, None]


def _mixer(mixing: Any, share: Any) -> Callable[[Any], Any]:
    """Mixup (Zhang et al. 2018) of each item with its mirror image in the batch.

    Done after the first layer, which is linear, it is what it would be if done to the features. It is its own
    adjoint.
    """
    import tensorflow as tf

    def mix(signal: Any) -> Any:
        return tf.cond(
            mixing,
            lambda: share * signal + (1 - share) * tf.reverse(signal, [2]),
            lambda: tf.identity(signal),
        )

    return mix


def _mask(dropping: Any, signal: Any, dropout: Any, seed: Any) -> Any:
    """What dropout multiplies a signal by."""
    import tensorflow as tf

    def drawn() -> Any:
        kept = tf.random.stateless_uniform(tf.shape(signal), seed) < 1 - dropout
        return tf.where(kept, 1 / (1 - dropout), 0.0)

    return tf.cond(dropping, drawn, lambda: tf.ones_like(dropout))


def _error(signal: Any, target: Any, knobs: Knobs, mix: Callable[[Any], Any]) -> Any:
    """The gradient of the mean loss by the logits.

    The loss of an item is a softplus(o) - b o: cross-entropy with weight a for the target b / a.
    """
    import tensorflow as tf

    label, smoothing = target[:, None, :, None], knobs.smoothing[..., None, None]
    weight = tf.where(label > 0.5, knobs.positive[..., None, None], knobs.negative[..., None, None])
    aimed = weight * (label * (1 - smoothing) + smoothing / 2)
    return (mix(weight) * tf.sigmoid(signal) - mix(aimed)) / tf.cast(tf.shape(target)[1], tf.float32)


def _summed(back: Any) -> Any:
    import tensorflow as tf

    return tf.reduce_sum(back, axis=2, keepdims=True)


def _decay(weights: list[Any], shrink: Any, columns: Any) -> int:
    """Shrink the kernels (biases do not decay)."""
    for place in range(0, len(weights), 2):
        weights[place].assign(weights[place] * (shrink if place else columns))
    return 0


def _adam(weight: Any, first_moment: Any, second_moment: Any, gradient: Any, time: Any) -> None:
    """One step of Adam (Kingma and Ba 2015) with rate 1; decay apart, this is AdamW (Loshchilov and Hutter
    2019)."""
    import tensorflow as tf

    tf.raw_ops.ResourceApplyAdam(
        var=weight.handle,
        m=first_moment.handle,
        v=second_moment.handle,
        beta1_power=0.9**time,
        beta2_power=0.999**time,
        lr=1.0,
        beta1=0.9,
        beta2=0.999,
        epsilon=EPSILON,
        grad=gradient,
    )


def _activated(signal: Any, codes: Any) -> tuple[Any, Any]:
    """A signal after each model's activation, and its slope."""
    import tensorflow as tf

    def gelu() -> tuple[Any, Any]:
        normal = 0.5 * (1 + tf.math.erf(signal * np.float32(np.sqrt(0.5))))
        density = tf.exp(-0.5 * signal * signal) * np.float32(1 / np.sqrt(2 * np.pi))
        return signal * normal, normal + signal * density

    def tanh() -> tuple[Any, Any]:
        value = tf.tanh(signal)
        return value, 1 - value * value

    found = (tf.nn.relu(signal), tf.cast(signal > 0, tf.float32))
    for name, activation in (("gelu", gelu), ("tanh", tanh)):
        found = _where(codes[..., None, None] == ACTIVATIONS.index(name), activation, found)
    return found


def _where(mine: Any, activation: Callable[[], tuple[Any, Any]], others: tuple[Any, Any]) -> tuple[Any, Any]:
    """An activation for the models that have it, computed only if there is one."""
    import tensorflow as tf

    def chosen() -> tuple[Any, Any]:
        value, slope = activation()
        return tf.where(mine, value, others[0]), tf.where(mine, slope, others[1])

    found: tuple[Any, Any] = tf.cond(tf.reduce_any(mine), chosen, lambda: others)
    return found
