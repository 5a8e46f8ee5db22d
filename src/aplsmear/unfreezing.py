"""A backbone with a head on it, divided where training starts.

Below the division the network stays frozen: what it gives for a view never changes, so that it is computed
once and kept. Above it lie the top *blocks* and the head, which train. A block is the shortest run of layers
that mixes channels between two places where the network is a single path: a depthwise and a pointwise
convolution of MobileNet, a residual unit of ResNet, a layer of DenseNet, for whatever network Keras has.

Batch normalisation stays as it is, in inference mode, also where blocks train: its means and variances are
those of the weights that came with the backbone. Statistics of small batches that hold a few patients' stain
would replace them by worse ones, and would make a score depend on what else is in the batch. (It is not
trainable at all: that alone keeps Keras from updating them, whatever `training` says.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aplsmear.backbones import cut_network
from aplsmear.heads import Head, Recipe, layer_sizes
from aplsmear.params import JOINT, Backbone, Level

HEAD = -1  # in place of a block's depth


@dataclass(frozen=True)
class Divided:
    """A network in two parts, and the same one whole; they share their weights."""

    trunk: Any  # keras.Model: uint8 (batch, size, size, 3) -> a map, and the means of maps below it; frozen
    top: Any  # keras.Model: what `trunk` gives -> logit (batch, 1), float32; trains
    whole: Any  # keras.Model: uint8 (batch, size, size, 3) -> probability (batch, 1)
    maps: Any  # keras.Model: what `trunk` gives -> the deepest map, and the means of the others
    judge: Any  # keras.Model: what `maps` gives -> logit
    depth: dict[str, int]  # path of a weight that trains -> block below the uppermost one; HEAD
    head: list[str]  # names of the head's layers: its standardisation, then its products


def divide(
    settings: Backbone, level: Level, layer: str, recipe: Recipe, channels: int, blocks: int, seed: int
) -> Divided:
    """Put a head on its backbone and divide the two below the uppermost blocks.

    Args:
        settings: of the backbone.
        level: whose input size to use.
        layer: one of ``settings.layer``.
        recipe: of the head; its weights come by `set_head`.
        channels: of the layer's features.
        blocks: how many train, from 1; more than there are: all.
        seed: of untrained filters and of dropout.

    Raises:
        BackboneError: as `aplsmear.backbones.cut_network`.
    """
    import keras

    cut, preprocess = cut_network(settings, level, seed)
    size = settings.input_size[level]
    parts = layer.split(JOINT)
    upto = keras.Model(cut.input, [cut.output[part] for part in parts])
    order = {operation.name: place for place, operation in enumerate(upto.operations)}
    deepest = max(parts, key=order.__getitem__)
    ends = [*block_ends(upto), deepest]
    start = ends[-1 - blocks] if blocks < len(ends) else None
    place = order[start] if start else -1
    division = upto.get_layer(start).output if start else upto.input
    depth = _depths(upto, ends, place)
    below = [part for part in parts if order[part] <= place]
    above = [part for part in parts if order[part] > place]
    bottom = keras.Model(upto.input, [division, *(cut.output[part] for part in below)], name="trunk")
    upper = keras.Model(division, [cut.output[part] for part in above], name="blocks")
    bottom.trainable, upper.trainable = False, True
    for each in upper.layers:
        each.trainable = not isinstance(each, keras.layers.BatchNormalization)

    image = keras.Input((size, size, 3), dtype="uint8", name="image")
    given, *lower = bottom(preprocess(keras.ops.cast(image, "float32")), training=False)
    trunk = keras.Model(image, _plain([given, *map(_mean, lower)]))
    inputs = [keras.Input(each.shape[1:]) for each in trunk.outputs]
    raised = dict(zip(above, upper(inputs[0], training=False), strict=True))
    pooled = dict(zip(below, inputs[1:], strict=True))
    pooled |= {part: _mean(each) for part, each in raised.items() if part != deepest}
    others = [part for part in parts if part != deepest]
    maps = keras.Model(_plain(inputs), _plain([raised[deepest], *(pooled[part] for part in others)]))

    seen = [keras.Input(each.shape[1:], dtype=each.dtype) for each in maps.outputs]
    means = dict(zip(others, seen[1:], strict=True)) | {deepest: _mean(seen[0])}
    vector = keras.ops.concatenate([means[part] for part in parts], axis=1) if others else means[deepest]
    logit, names = _head_on(vector, recipe, channels, seed)
    judge = keras.Model(_plain(seen), logit, name="head")
    depth |= {each.path: HEAD for each in judge.trainable_variables}
    top = keras.Model(_plain(inputs), judge(maps(_plain(inputs))))
    whole = keras.Model(image, keras.ops.sigmoid(top(trunk(image, training=False), training=False)))
    return Divided(trunk, top, whole, maps, judge, depth, names)


def block_ends(network: Any) -> list[str]:
    """The layers after which a network can be divided, from its input on; the end of the last block is left
    out.

    Args:
        network: keras.Model, functional.
    """
    from keras import layers

    mixing = (layers.Conv2D, layers.SeparableConv2D, layers.Dense)
    operations = list(network.operations)
    place = {id(each.output): number for number, each in enumerate(operations)}
    reach = list(range(len(operations)))  # of each, the last that reads it
    for number, each in enumerate(operations):
        if not isinstance(each, layers.InputLayer):
            inputs = each.input if isinstance(each.input, list | tuple) else [each.input]
            for tensor in inputs:
                reach[place[id(tensor)]] = max(reach[place[id(tensor)]], number)
    ends: list[str] = []
    end, mixed, furthest = "", False, 0
    for number, each in enumerate(operations):
        if mixed and end and isinstance(each, (*mixing, layers.DepthwiseConv2D)):
            ends.append(end)
            end, mixed = "", False
        mixed = mixed or isinstance(each, mixing)
        # Padding belongs to the convolution that follows it.
        if mixed and furthest <= number and not isinstance(each, layers.ZeroPadding2D):
            end = each.name
        furthest = max(furthest, reach[number])
    return ends


def set_head(network: Divided, head: Head, mean: np.ndarray, scale: np.ndarray) -> None:
    """Give the network a head's weights, so that it says what the head says.

    A head takes raw features. Here they are standardised first and its first product is changed to match,
    since steps of one rate suit channels of one size.

    Args:
        network: of `divide`, with a head of this shape.
        head: the weights.
        mean: float32 (channels,), of the features that train.
        scale: float32 (channels,), above 0: their deviations.
    """
    norm, *products = (network.judge.get_layer(name) for name in network.head)
    norm.set_weights([mean, scale**2])
    first = head.kernels[0] * scale[:, None]
    kernels, biases = [first, *head.kernels[1:]], [head.biases[0] + mean @ head.kernels[0], *head.biases[1:]]
    for layer, kernel, bias in zip(products, kernels, biases, strict=True):
        layer.set_weights([kernel, bias])


def _head_on(vector: Any, recipe: Recipe, channels: int, seed: int) -> tuple[Any, list[str]]:
    """The head's layers behind a feature vector: its logit, and the names of those with weights."""
    from keras import layers

    fixed = {"center": False, "scale": False, "epsilon": 0.0, "trainable": False}
    names = ["standardise"]
    signal = layers.BatchNormalization(name=names[0], dtype="float32", **fixed)(vector, training=False)
    for number, (_, width) in enumerate(layer_sizes(recipe.depth, recipe.width, channels)):
        if number:
            signal = layers.Activation(recipe.activation, dtype="float32")(signal)
            signal = layers.Dropout(recipe.dropout, seed=seed, dtype="float32")(signal)
        names.append(f"product_{number}")
        signal = layers.Dense(width, name=names[-1], dtype="float32")(signal)
    return signal, names


def _mean(feature_map: Any) -> Any:
    """Over the image: (batch, height, width, channels) -> (batch, channels), float32."""
    import keras

    return keras.ops.mean(keras.ops.cast(feature_map, "float32"), axis=(1, 2))


def _plain(tensors: list[Any]) -> Any:
    """Keras wants one tensor bare, several in a list."""
    return tensors if len(tensors) > 1 else tensors[0]


def _depths(network: Any, ends: Sequence[str], place: int) -> dict[str, int]:
    """Of each weight above a place: how many blocks lie above its own."""
    order = {operation.name: number for number, operation in enumerate(network.operations)}
    edges = [order[end] for end in ends]
    return {
        weight.path: sum(edge >= order[layer.name] for edge in edges) - 1
        for layer in network.layers
        if order[layer.name] > place
        for weight in layer.weights
    }
