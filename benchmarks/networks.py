"""Frozen backbones as plain Keras networks: what a user would run, and what our features are held against."""

from __future__ import annotations

from typing import Any

from aplsmear.features.backbones import cut_network
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
