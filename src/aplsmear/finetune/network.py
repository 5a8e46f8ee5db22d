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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aplsmear.features.backbones import cut_network
from aplsmear.heads.head import Head, Recipe, layer_sizes, mean_head
from aplsmear.params import JOINT, Backbone, Level

HEAD = -1  # in place of a block's depth


@dataclass(frozen=True)
class Divided:
    """A network in two parts, and the same one whole; they share their weights."""

    trunk: Any  # keras.Model: uint8 (batch, size, size, 3) -> a map, and the means of others below; frozen
    top: Any  # keras.Model: what `trunk` gives -> logit (batch, 1), float32; trains
    whole: Any  # keras.Model: uint8 (batch, size, size, 3) -> probability (batch, 1)
    sorter: Any  # keras.Model: what `trunk` gives -> a logit for each kind (batch, kinds), float32; of `top`
    maps: Any  # keras.Model: what `trunk` gives -> the deepest map, and the means of the others
    judge: Any  # keras.Model: what `maps` gives -> logit
    head: Any  # keras.Model: features, and those of the middle behind them -> a logit for each kind
    members: Any  # keras.Model: features -> that of each head that may join (batch, members, kinds); or None
    middles: Any  # keras.Model: what `trunk` gives -> features of the middle, for members; None: of the whole
    kinds: tuple[int, int]  # of negative items, which come first, and of positive ones
    depth: dict[str, int]  # path of a weight that trains -> block below the uppermost one; HEAD


def divide(
    settings: Backbone,
    level: Level,
    layer: str,
    recipe: Recipe,
    channels: int,
    blocks: int,
    seed: int,
    kinds: tuple[int, int] = (1, 1),
    members: tuple[int, int] = (0, 0),
    middle: float = 1.0,
) -> Divided:
    """Put a head on its backbone and divide the two below the uppermost blocks.

    The head tells kinds of items apart; the odds of the positive class are those of its kinds together
    against all others. It has room for other heads, its members, which `join` puts into it.

    Args:
        settings: of the backbone.
        level: whose input size to use.
        layer: one of ``settings.layer``.
        recipe: of the head that `set_head` puts in.
        channels: of the layer's features.
        blocks: how many train, from 1; more than there are: all.
        seed: of untrained filters, of members and of dropout.
        kinds: of negative and of positive items.
        members: how many, and the units of each of their hidden layers.
        middle: the share of each side of a feature map that members see, where the cell is; 1: all of it.

    Raises:
        BackboneError: as `aplsmear.features.backbones.cut_network`.
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
    trunk = keras.Model(image, _plain([given, *(_means(each, middle) for each in lower)]))
    inputs = [keras.Input(each.shape[1:]) for each in trunk.outputs]
    raised = dict(zip(above, upper(inputs[0], training=False), strict=True))
    pooled = dict(zip(below, inputs[1:], strict=True))
    pooled |= {part: _means(each, middle) for part, each in raised.items() if part != deepest}
    others = [part for part in parts if part != deepest]
    maps = keras.Model(_plain(inputs), _plain([raised[deepest], *(pooled[part] for part in others)]))

    seen = [keras.Input(each.shape[1:], dtype=each.dtype) for each in maps.outputs]
    means = dict(zip(others, seen[1:], strict=True)) | {deepest: _means(seen[0], middle)}
    parted = [keras.ops.split(means[part], 2, axis=1) if middle < 1 else [means[part]] for part in parts]
    features = [_behind(each) for each in zip(*parted, strict=True)]
    vector = _behind(features)
    number, units = members
    wide = replace(recipe, width=recipe.width + number * units)
    head = _head_of(wide, channels * len(features), sum(kinds), seed)
    crowd = _crowd_of(replace(recipe, width=units), channels, sum(kinds), seed, number) if number else None
    negative, positive = keras.ops.split(head(vector), [kinds[0]], axis=1)
    logit = _together(positive) - _together(negative)
    judge = keras.Model(_plain(seen), logit, name="judge")
    tell = keras.Model(_plain(seen), head(vector))
    see = keras.Model(_plain(seen), features[-1]) if middle < 1 else None
    depth |= {each.path: HEAD for each in head.trainable_variables}
    top = keras.Model(_plain(inputs), judge(maps(_plain(inputs))))
    sorter = keras.Model(_plain(inputs), tell(maps(_plain(inputs))))
    whole = keras.Model(image, keras.ops.sigmoid(top(trunk(image, training=False), training=False)))
    middles = keras.Model(_plain(inputs), see(maps(_plain(inputs)))) if see else None
    return Divided(trunk, top, whole, sorter, maps, judge, head, crowd, middles, kinds, depth)


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
    since steps of one rate suit channels of one size. Units that the network's head has more say nothing yet,
    and all kinds of a class are equally likely if the head does not tell them apart.

    Args:
        network: of `divide`, with a head of this depth, and as wide or wider.
        head: the weights; its last product has one column, or one for each kind. What it has no rows for, the
            features of the middle, it does not look at.
        mean: float32 (channels,), of the features that train, and of those of the middle behind them.
        scale: float32 (channels,), above 0: their deviations.
    """
    norm, *products = (layer for layer in network.head.layers if layer.weights)
    norm.set_weights([mean, scale**2])
    head = _with_kinds(head, network.kinds)
    read = len(head.kernels[0])
    kernels = [head.kernels[0] * scale[:read, None], *head.kernels[1:]]
    biases = [head.biases[0] + mean[:read] @ head.kernels[0], *head.biases[1:]]
    for layer, kernel, bias in zip(products, kernels, biases, strict=True):
        wide, low = layer.get_weights()
        rows, columns = kernel.shape
        if layer is products[-1]:
            wide[:] = 0
        wide[rows:, :columns] = 0
        wide[:rows, :columns], low[:columns] = kernel, bias
        layer.set_weights([wide, low])
    for member in _members(network):
        (channels,) = member.input_shape[1:]
        member.get_layer("standardise").set_weights([mean[-channels:], scale[-channels:] ** 2])


def join(network: Divided, head: Head) -> None:
    """Give the network the mean of a head and of its members, as logits, so that each counts the same.

    Args:
        network: of `divide`, with members, started by `set_head`.
        head: that it was started with.
    """
    mean, variance = network.head.get_layer("standardise").get_weights()
    scale = np.sqrt(variance)
    unread = len(mean) - len(head.kernels[0])  # of the tuned head, the middle; of the others, all but that
    tuned = _with_kinds(head, network.kinds)
    each = [replace(tuned, kernels=(np.pad(tuned.kernels[0], ((0, unread), (0, 0))), *tuned.kernels[1:]))]
    for member in _members(network):
        _, *products = (layer for layer in member.layers if layer.weights)
        kernels, biases = zip(*(layer.get_weights() for layer in products), strict=True)
        raw = np.pad(kernels[0], ((unread, 0), (0, 0))) / scale[:, None]
        weights = (raw, *kernels[1:]), (biases[0] - mean @ raw, *biases[1:])
        each.append(Head(head.features, *weights, head.activation))
    set_head(network, mean_head(each), mean, scale)


def _with_kinds(head: Head, kinds: tuple[int, int]) -> Head:
    """A head that tells the classes alone, as one for which all kinds of a class are equally likely."""
    last, bias = head.kernels[-1], head.biases[-1]
    if last.shape[1] == sum(kinds):
        return head
    negative, positive = kinds
    wide = np.concatenate([np.zeros((len(last), negative)), np.repeat(last, positive, axis=1)], axis=1)
    low = np.repeat([-np.log(negative), bias[0] - np.log(positive)], kinds)
    return replace(
        head,
        kernels=(*head.kernels[:-1], wide.astype(np.float32)),
        biases=(*head.biases[:-1], low.astype(np.float32)),
    )


def _crowd_of(recipe: Recipe, channels: int, kinds: int, seed: int, number: int) -> Any:
    """keras.Model: features -> logits (batch, members, kinds). Members differ by their first weights."""
    import keras

    vector = keras.Input((channels,))
    each = [
        _head_of(recipe, channels, kinds, seed + place, f"member_{place}") for place in range(1, number + 1)
    ]
    return keras.Model(vector, keras.ops.stack([member(vector) for member in each], axis=1), name="members")


def _members(network: Divided) -> list[Any]:
    return [each for each in network.members.layers if each.weights] if network.members is not None else []


def _head_of(recipe: Recipe, channels: int, kinds: int, seed: int, name: str = "head") -> Any:
    """keras.Model: features -> a logit for each kind."""
    import keras
    from keras import layers

    vector = keras.Input((channels,))
    fixed = {"center": False, "scale": False, "epsilon": 0.0, "trainable": False}
    signal = layers.BatchNormalization(name="standardise", dtype="float32", **fixed)(vector, training=False)
    sizes = layer_sizes(recipe.depth, recipe.width, channels)
    for number, (_, width) in enumerate(sizes):
        if number:
            if recipe.activation == "gelu":  # the form of `aplsmear.heads.arithmetic`
                signal = keras.ops.gelu(signal, approximate=True)
            else:
                signal = layers.Activation(recipe.activation, dtype="float32")(signal)
            signal = layers.Dropout(recipe.dropout, seed=seed, dtype="float32")(signal)
        units = width if number < len(sizes) - 1 else kinds
        signal = layers.Dense(units, name=f"product_{number}", dtype="float32")(signal)
    return keras.Model(vector, signal, name=name)


def _together(logits: Any) -> Any:
    """Of several kinds: (batch, kinds) -> (batch, 1)."""
    import keras

    return keras.ops.logsumexp(logits, axis=1, keepdims=True)


def _means(feature_map: Any, middle: float) -> Any:
    """Over the image: (batch, height, width, channels) -> (batch, channels), float32; if the middle is not
    all of it, over the middle too: (batch, 2 channels)."""
    import keras

    feature_map = keras.ops.cast(feature_map, "float32")
    found = [keras.ops.mean(feature_map, axis=(1, 2))]
    if middle < 1:
        rims = [min(round(side * (1 - middle) / 2), (side - 1) // 2) for side in feature_map.shape[1:3]]
        within = keras.layers.Cropping2D([(rim, rim) for rim in rims], dtype="float32")(feature_map)
        found.append(keras.ops.mean(within, axis=(1, 2)))
    return _behind(found)


def _behind(features: Sequence[Any]) -> Any:
    """Features behind one another: (batch, channels) each."""
    import keras

    return keras.ops.concatenate(features, axis=1) if len(features) > 1 else features[0]


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
