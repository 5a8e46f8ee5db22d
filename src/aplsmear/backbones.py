"""Frozen networks of keras.applications, cut at named layers, and the features they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from aplsmear.images import decode
from aplsmear.params import Backbone, Level, nearest
from aplsmear.shards import View
from aplsmear.views import resize


class BackboneError(ValueError):
    """A backbone, layer or weight file that Keras does not have; the message says what it has."""


def build_backbone(settings: Backbone, level: Level, seed: int) -> Any:
    """The network of `settings` from a uint8 image to one feature vector per layer, in inference mode.

    Each layer's feature map is averaged over the image (the bottleneck feature of the original).

    Args:
        settings: application, its options, the layers to cut at, the weights.
        level: whose input size to use.
        seed: of the untrained filters (`weights: none`).

    Returns:
        keras.Model: uint8 (batch, size, size, 3), RGB -> {layer: float32 (batch, channels)}.

    Raises:
        BackboneError: no such application, layer or weight file, or weights that do not fit.
    """
    import keras

    application, preprocess = _application(settings.application)
    size = settings.input_size[level]
    keras.utils.set_random_seed(seed)
    whole = application(
        include_top=False,
        weights="imagenet" if settings.weights == "imagenet" else None,
        input_shape=(size, size, 3),
        **settings.options,
    )
    names = [layer.name for layer in whole.layers]
    for wanted in settings.layer:
        if wanted not in names:
            raise BackboneError(
                f"{settings.application} has no layer {wanted!r}{nearest(wanted, names)}; "
                f"it has: {', '.join(names)}"
            )
    cut = keras.Model(whole.input, {name: whole.get_layer(name).output for name in settings.layer})
    if settings.weights not in ("none", "imagenet"):
        _load(Path(settings.weights), whole, cut)
    cut.trainable = False
    image = keras.Input((size, size, 3), dtype="uint8")
    maps = cut(preprocess(keras.ops.cast(image, "float32")), training=False)
    return keras.Model(image, {name: keras.ops.mean(each, axis=(1, 2)) for name, each in maps.items()})


def features_of(
    batches: Iterator[list[View]], settings: Backbone, level: Level, seed: int
) -> Iterator[list[np.ndarray]]:
    """One forward pass over batches of encoded views.

    Args:
        batches: of at most ``settings.batch`` views.
        settings: the backbone.
        level: whose input size to use.
        seed: of untrained filters.

    Yields:
        For each batch, one float16 array (views, channels) per layer of the backbone.
    """
    import tensorflow as tf

    cv2.setNumThreads(1)
    network = build_backbone(settings, level, seed)
    forward = tf.function(lambda images: network(images, training=False))
    size = settings.input_size[level]
    images = np.zeros((settings.batch, size, size, 3), dtype=np.uint8)
    for views in batches:
        for row, view in enumerate(views):
            image = decode(view.image)
            images[row] = image if image.shape[0] == size else resize(image, size)
        # A short last batch goes through at full length: one shape, one graph.
        found = forward(images)
        yield [found[layer].numpy()[: len(views)].astype(np.float16) for layer in settings.layer]


def _application(name: str) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """A builder of keras.applications and the preprocessing that belongs to it."""
    import keras

    for module in vars(keras.applications).values():
        if hasattr(module, "preprocess_input") and callable(getattr(module, name, None)):
            return getattr(module, name), module.preprocess_input
    known = sorted(each for each in dir(keras.applications) if each[0].isupper())
    raise BackboneError(f"keras.applications has no {name!r}{nearest(name, known)}; it has: {', '.join(known)}")


def _load(path: Path, whole: Any, cut: Any) -> None:
    """Load weights saved from the whole network without its top, or from the network up to the deepest layer used.

    Which of the two a file holds is seen from the number of its tensors.
    """
    import h5py

    if not path.is_file():
        raise BackboneError(f"no weight file at {str(path)!r}: mend `weights` of the backbone in params.yaml")
    try:
        with h5py.File(path) as file:
            tensors = 0

            def count(_: str, node: Any) -> None:
                nonlocal tensors
                tensors += isinstance(node, h5py.Dataset) and node.ndim > 0

            file.visititems(count)
        network = cut if tensors == len(cut.weights) else whole
        network.load_weights(path)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise BackboneError(f"the weights in {path.name!r} do not fit {whole.name}: {first}") from error
