"""The network that is finetuned: a backbone with a head, divided into a frozen part and a part that trains.

The frozen part gives the same output for a view in every epoch, so this output is computed once and cached.
The part that trains has the uppermost *blocks* and the head. A block is the shortest run of layers that mixes
channels and lies between two places where the network is a single path: a depthwise and a pointwise
convolution of MobileNet, a residual unit of ResNet, a layer of DenseNet, a block of a vision transformer.
This works for any Keras network.

Batch normalisation keeps the means and variances of the pretrained weights, also in blocks that train.
Statistics of small batches from a few patients would be worse, and a score would depend on the other images
of its batch. (These layers are not trainable: with this alone Keras does not update them.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aplsmear.features.backbones import cut_network
from aplsmear.heads.head import Head, Recipe, layer_sizes, mean_head
from aplsmear.params import JOINT, Backbone, Level


@dataclass(frozen=True)
class HeadDesign:
    """The shape of the head, and of the extra heads that `join_heads` can average with it."""

    recipe: Recipe  # of the tuned head
    channels: int  # of the features
    subclasses: tuple[int, int] = (1, 1)  # number of negative ones, which come first, and of positive ones
    extra_heads: int = 0
    extra_units: int = 0  # units of each hidden layer of an extra head
    centre_crop: float = 1.0  # share of each side of a map that extra heads see; 1: the whole map


@dataclass(frozen=True)
class DividedBackbone:
    """A backbone in two parts.

    Each part returns a feature map, and then the features of other layers. These are the means over the whole
    map of a layer and, if there is a centre crop, over the crop.
    """

    trunk: Any  # keras.Model: uint8 (batch, size, size, 3) -> the map at the division, features below; frozen
    blocks: Any  # keras.Model: outputs of the trunk -> the deepest map, features of the other layers; trains
    layers: list[str]  # those whose maps and features the blocks return, in this order
    depth: dict[str, int]  # path of each weight of the blocks -> number of its block; 0: the uppermost one


@dataclass(frozen=True)
class Network:
    """A backbone with its heads, as models that share their weights. All logits are float32."""

    backbone: DividedBackbone
    design: HeadDesign
    head: Any  # keras.Model: features, and those of the centre crop -> logits (batch, subclasses)
    extras: Any  # keras.Model: features -> logits (batch, extra heads, subclasses); None: no extra heads
    judge: Any  # keras.Model: outputs of the blocks -> logit of the positive class (batch, 1)
    top: Any  # keras.Model: outputs of the trunk -> the same; trains
    classifier: Any  # keras.Model: outputs of the trunk -> logits (batch, subclasses)
    whole: Any  # keras.Model: uint8 (batch, size, size, 3) -> probability (batch, 1)
    centre: Any  # keras.Model: outputs of the trunk -> features of the centre crop; None: there is no crop

    @property
    def extra_heads(self) -> list[Any]:
        """Each extra head: keras.Model, features -> logits (batch, subclasses)."""
        return [each for each in self.extras.layers if each.weights] if self.extras else []


def build_network(settings: Backbone, level: Level, design: HeadDesign, blocks: int, seed: int) -> Network:
    """Put a head on its backbone and divide the network below the uppermost blocks.

    The head separates subclasses. The odds of the positive class are those of all its subclasses together
    against all others. `level` sets the input size. So many `blocks` train, at least 1; all if there are
    fewer. The seed is that of untrained filters, of extra heads and of dropout.

    Raises UserError as `aplsmear.features.backbones.cut_network`.
    """
    import keras

    layers = design.recipe.features.split("/")[1].split(JOINT)
    backbone = _divide_backbone(settings, level, layers, blocks, design.centre_crop, seed)
    found = [keras.Input(each.shape[1:], dtype=each.dtype) for each in backbone.blocks.outputs]
    deepest = _means(found[0], design.centre_crop)
    features = dict(zip(backbone.layers, [deepest, *found[1:]], strict=True))
    has_crop = design.centre_crop < 1
    pairs = [keras.ops.split(features[each], 2, axis=1) if has_crop else [features[each]] for each in layers]
    joined = [_joined(each) for each in zip(*pairs, strict=True)]  # of the whole map; of the centre crop
    vector = _joined(joined)

    negative, positive = design.subclasses
    wide = replace(design.recipe, width=design.recipe.width + design.extra_heads * design.extra_units)
    head = _build_head(wide, design.channels * len(joined), negative + positive, seed, "head")
    extras = _build_extra_heads(design, negative + positive, seed) if design.extra_heads else None
    lower, upper = keras.ops.split(head(vector), [negative], axis=1)
    odds = [keras.ops.logsumexp(each, axis=1, keepdims=True) for each in (upper, lower)]
    judge = keras.Model(_bare(found), odds[0] - odds[1], name="judge")
    classify = keras.Model(_bare(found), head(vector))
    crop = keras.Model(_bare(found), joined[-1]) if has_crop else None

    given = _bare(backbone.blocks.inputs)
    maps = backbone.blocks(given)
    top = keras.Model(given, judge(maps))
    classifier = keras.Model(given, classify(maps))
    image = backbone.trunk.input
    whole = keras.Model(image, keras.ops.sigmoid(top(backbone.trunk(image, training=False), training=False)))
    centre = keras.Model(given, crop(maps)) if crop else None
    return Network(backbone, design, head, extras, judge, top, classifier, whole, centre)


def block_ends(network: Any) -> list[str]:
    """The names of the layers after which a network can be divided, from the input upwards.

    The end of the last block is left out. The network is a functional keras.Model. A layer that only returns
    some tokens of a vision transformer lies beside the path.
    """
    from keras import layers

    from aplsmear.features.dino import Block, Part

    mixing = (layers.Conv2D, layers.SeparableConv2D, layers.Dense, Block)
    operations = [each for each in network.operations if not isinstance(each, Part)]
    place = {id(each.output): number for number, each in enumerate(operations)}
    last_reader = list(range(len(operations)))  # of each operation's output
    for number, each in enumerate(operations):
        if not isinstance(each, layers.InputLayer):
            for tensor in each.input if isinstance(each.input, list | tuple) else [each.input]:
                last_reader[place[id(tensor)]] = max(last_reader[place[id(tensor)]], number)
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
        furthest = max(furthest, last_reader[number])
    return ends


def set_head(network: Network, head: Head, mean: np.ndarray, scale: np.ndarray) -> None:
    """Give the network the weights of a head, so that both return the same probabilities.

    A head takes raw features. The network standardises them first, because one learning rate suits only
    channels of one scale; the first product of the head is changed to match. Surplus units of the network's
    head start with zero output weights. If the head separates only the two classes, all subclasses of a class
    are equally likely.

    Args:
        network: with a head as deep as this one, and as wide or wider.
        head: the weights; its last product has one column, or one for each subclass. It has no rows for the
            features of the centre crop; their weights are 0.
        mean: float32 (channels,), of the features, and then of those of the centre crop.
        scale: float32 (channels,), above 0: their standard deviations.
    """
    norm, *products = (layer for layer in network.head.layers if layer.weights)
    norm.set_weights([mean, scale**2])
    head = _with_subclasses(head, network.design.subclasses)
    rows = len(head.kernels[0])
    kernels = [head.kernels[0] * scale[:rows, None], *head.kernels[1:]]
    biases = [head.biases[0] + mean[:rows] @ head.kernels[0], *head.biases[1:]]
    for layer, kernel, bias in zip(products, kernels, biases, strict=True):
        wide, low = layer.get_weights()
        rows, columns = kernel.shape
        if layer is products[-1]:
            wide[:] = 0
        wide[rows:, :columns] = 0
        wide[:rows, :columns], low[:columns] = kernel, bias
        layer.set_weights([wide, low])
    channels = network.design.channels
    for extra in network.extra_heads:
        extra.get_layer("standardise").set_weights([mean[-channels:], scale[-channels:] ** 2])


def join_heads(network: Network, head: Head) -> None:
    """Replace the head that `set_head` gave to a network by the mean, as logits, of it and extra heads."""
    mean, variance = network.head.get_layer("standardise").get_weights()
    scale = np.sqrt(variance)
    # Without a crop all heads read the same features; with one the tuned head reads the first half of them,
    # the extra heads the second half.
    surplus = len(mean) - network.design.channels
    tuned = _with_subclasses(head, network.design.subclasses)
    tuned = replace(tuned, kernels=(np.pad(tuned.kernels[0], ((0, surplus), (0, 0))), *tuned.kernels[1:]))
    heads = [tuned]
    for extra in network.extra_heads:
        _, *products = (layer for layer in extra.layers if layer.weights)
        kernels, biases = zip(*(layer.get_weights() for layer in products), strict=True)
        raw = np.pad(kernels[0], ((surplus, 0), (0, 0))) / scale[:, None]
        weights = (raw, *kernels[1:]), (biases[0] - mean @ raw, *biases[1:])
        heads.append(Head(head.features, *weights, head.activation))
    set_head(network, mean_head(heads), mean, scale)


def _divide_backbone(
    settings: Backbone, level: Level, layers: Sequence[str], blocks: int, crop: float, seed: int
) -> DividedBackbone:
    """Divide a backbone that ends in these layers. Arguments as in `build_network` and `HeadDesign`."""
    import keras

    cut, preprocess = cut_network(settings, level, seed)
    network = keras.Model(cut.input, [cut.output[layer] for layer in layers])
    order = _order(network)
    deepest = max(layers, key=lambda layer: (order[layer], cut.output[layer].shape[1]))
    ends = [*block_ends(network), deepest]
    start = ends[-1 - blocks] if blocks < len(ends) else network.operations[0].name
    below = [layer for layer in layers if order[layer] <= order[start]]
    above = [layer for layer in layers if order[layer] > order[start]]
    division = network.get_layer(start).output
    bottom = keras.Model(network.input, [division, *(cut.output[layer] for layer in below)], name="trunk")
    upper = keras.Model(division, [cut.output[layer] for layer in above], name="blocks")
    bottom.trainable, upper.trainable = False, True
    for each in upper.layers:
        each.trainable = not isinstance(each, keras.layers.BatchNormalization)

    size = settings.input_size[level]
    image = keras.Input((size, size, 3), dtype="uint8", name="image")
    given, *lower = bottom(preprocess(keras.ops.cast(image, "float32")), training=False)
    trunk = keras.Model(image, _bare([given, *(_means(each, crop) for each in lower)]))
    inputs = [keras.Input(each.shape[1:]) for each in trunk.outputs]
    maps = dict(zip(above, upper(inputs[0], training=False), strict=True))
    features = dict(zip(below, inputs[1:], strict=True))
    features |= {layer: _means(each, crop) for layer, each in maps.items() if layer != deepest}
    others = [layer for layer in layers if layer != deepest]
    top = keras.Model(_bare(inputs), _bare([maps[deepest], *(features[layer] for layer in others)]))
    depth = {
        weight.path: sum(order[end] >= order[layer.name] for end in ends) - 1
        for layer in upper.layers
        for weight in layer.weights
    }
    return DividedBackbone(trunk, top, [deepest, *others], depth)


def _order(network: Any) -> dict[str, int]:
    """Layer -> its place on the way through a network; `Part` has the place of the layer that it reads."""
    from aplsmear.features.dino import Part

    order = {operation.name: place for place, operation in enumerate(network.operations)}
    for each in network.operations:
        if isinstance(each, Part):
            order[each.name] = order[each.input._keras_history.operation.name]
    return order


def _build_head(recipe: Recipe, channels: int, outputs: int, seed: int, name: str) -> Any:
    """keras.Model: features (batch, channels) -> logits (batch, outputs)."""
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
        units = width if number < len(sizes) - 1 else outputs
        signal = layers.Dense(units, name=f"product_{number}", dtype="float32")(signal)
    return keras.Model(vector, signal, name=name)


def _build_extra_heads(design: HeadDesign, outputs: int, seed: int) -> Any:
    """keras.Model: features -> logits (batch, extra heads, outputs). The heads differ in their seeds."""
    import keras

    vector = keras.Input((design.channels,))
    recipe = replace(design.recipe, width=design.extra_units)
    heads = [
        _build_head(recipe, design.channels, outputs, seed + number, f"member_{number}")
        for number in range(1, design.extra_heads + 1)
    ]
    return keras.Model(vector, keras.ops.stack([head(vector) for head in heads], axis=1), name="members")


def _with_subclasses(head: Head, subclasses: tuple[int, int]) -> Head:
    """A head that separates only the classes, with equal odds for all subclasses of a class."""
    kernel, bias = head.kernels[-1], head.biases[-1]
    if kernel.shape[1] == sum(subclasses):
        return head
    negative, positive = subclasses
    wide = np.concatenate([np.zeros((len(kernel), negative)), np.repeat(kernel, positive, axis=1)], axis=1)
    low = np.repeat([-np.log(negative), bias[0] - np.log(positive)], subclasses)
    return replace(
        head,
        kernels=(*head.kernels[:-1], wide.astype(np.float32)),
        biases=(*head.biases[:-1], low.astype(np.float32)),
    )


def _means(feature_map: Any, crop: float) -> Any:
    """Means of a map (batch, height, width, channels) over the image: float32 (batch, channels).

    With a crop below 1, the means over the centre crop follow: (batch, 2 channels).
    """
    import keras

    feature_map = keras.ops.cast(feature_map, "float32")
    found = [keras.ops.mean(feature_map, axis=(1, 2))]
    if crop < 1:
        rims = [min(round(side * (1 - crop) / 2), (side - 1) // 2) for side in feature_map.shape[1:3]]
        centre = keras.layers.Cropping2D([(rim, rim) for rim in rims], dtype="float32")(feature_map)
        found.append(keras.ops.mean(centre, axis=(1, 2)))
    return _joined(found)


def _joined(features: Sequence[Any]) -> Any:
    """Features (batch, channels) of several layers as one tensor."""
    import keras

    return keras.ops.concatenate(features, axis=1) if len(features) > 1 else features[0]


def _bare(tensors: Sequence[Any]) -> Any:
    """Keras takes one tensor without a list, several in a list."""
    return list(tensors) if len(tensors) > 1 else tensors[0]
