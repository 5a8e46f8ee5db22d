"""Frozen backbones as plain Keras networks: what a user would run, and what our features are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.features.backbones import cut_network
from aplsmear.images.reading import read_image
from aplsmear.params import JOINT, Backbone, Level


def keras_network(settings: Backbone, level: Level, seed: int) -> Any:
    """keras.Model: uint8 (batch, size, size, 3), RGB -> {layer: float32 (batch, channels)}."""
    import keras

    keras.utils.clear_session()
    cut, preprocess = cut_network(settings, level, seed)
    size = settings.input_size[level]
    image = keras.Input((size, size, 3), dtype="uint8")
    maps = cut(preprocess(keras.ops.cast(image, "float32")), training=False)
    means = {layer: keras.ops.mean(each, axis=(1, 2)) for layer, each in maps.items()}
    joined = {layer: [means[part] for part in layer.split(JOINT)] for layer in settings.layer}
    return keras.Model(
        image, {layer: keras.ops.concatenate(parts, axis=1) for layer, parts in joined.items()}
    )


def write_live_weights(path: Path, settings: Backbone, smear: Path) -> None:
    """Write untrained weights whose features do not fade with depth.

    Each batch normalisation takes the mean and variance of its inputs for tiles of a smear. Without this,
    features fade to zeros.
    """
    keras = start_tensorflow().keras
    network, preprocess = cut_network(settings, "cell", 1)
    network.trainable = True
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    size, image = settings.input_size["cell"], read_image(smear)
    rows, columns = (side // size for side in image.shape[:2])
    tiles = image[: rows * size, : columns * size].reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    batch = tiles.reshape(-1, size, size, 3)[:256]
    network(preprocess(batch.astype(np.float32)), training=True)
    network.save_weights(path)


def gflop(network: Any) -> float:
    """Billions of multiplications and additions of products, for one image.

    Counted are convolutions, dense layers and blocks of vision transformers.
    """
    import keras

    layers = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)
    found = 0.0
    for layer in network.layers:
        if isinstance(layer, layers):
            found += 2 * float(np.prod(layer.kernel.shape)) * float(np.prod(layer.output.shape[1:-1]))
        elif type(layer).__name__ == "Block":
            tokens, width = layer.output.shape[1:]
            weights = sum(float(np.prod(each.shape)) for each in layer.weights if len(each.shape) == 2)
            found += 2 * tokens * weights + 4 * tokens**2 * width
    return found / 1e9
