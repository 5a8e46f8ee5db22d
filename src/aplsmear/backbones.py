"""Frozen networks of keras.applications, cut at named layers, and the features they give."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from aplsmear.errors import UserError
from aplsmear.files import sha256
from aplsmear.images import decode
from aplsmear.params import Backbone, Level, nearest
from aplsmear.shards import View
from aplsmear.views import resize

JOINT = "+"  # between layers whose features stand behind one another
UNTRAINED, IMAGENET = "none", "imagenet"  # values of `weights` that are no path


class BackboneError(UserError, ValueError):
    """A backbone, layer or weight file that Keras does not have; the message says what it has."""


def build_backbone(settings: Backbone, level: Level, seed: int) -> Any:
    """The network of `settings` from a uint8 image to one feature vector per layer, in inference mode.

    Each layer's feature map is averaged over the image (the bottleneck feature of the original); layers named
    together (``a+b``) stand behind one another in one vector. Keras's own state starts anew, so that neither
    names nor untrained filters depend on what was built before.

    Args:
        settings: application, its options, the layers to cut at, the weights.
        level: whose input size to use.
        seed: of the untrained filters (`weights: none`).

    Returns:
        keras.Model: uint8 (batch, size, size, 3), RGB -> {layer: float32 (batch, channels)}.

    Raises:
        BackboneError: no such application, option, layer or weight file, weights that do not fit, or a layer
            without a feature map.
    """
    import keras

    keras.utils.clear_session()
    cut, preprocess = cut_network(settings, level, seed)
    size = settings.input_size[level]
    image = keras.Input((size, size, 3), dtype="uint8")
    maps = cut(preprocess(keras.ops.cast(image, "float32")), training=False)
    pooled = {layer: _pooled(layer, each) for layer, each in maps.items()}
    return keras.Model(image, {layer: _joined(layer, pooled) for layer in settings.layer})


def cut_network(settings: Backbone, level: Level, seed: int) -> tuple[Any, Callable[[Any], Any]]:
    """The network of `settings` up to its layers, frozen, and the preprocessing that belongs to it.

    Args:
        settings: as for `build_backbone`.
        level: whose input size to use.
        seed: of the untrained filters.

    Returns:
        keras.Model: preprocessed float32 (batch, size, size, 3) -> {layer: its map}, a joint layer's parts
        each by itself; and a function from float32 RGB, 0 to 255, to what it takes.

    Raises:
        BackboneError: as `build_backbone`.
    """
    import keras

    builder, preprocess = _application(settings.application)
    size = settings.input_size[level]
    keras.utils.set_random_seed(seed)
    full = _full_network(builder, settings, size)
    names = [layer.name for layer in full.layers]
    wanted = list(dict.fromkeys(part for layer in settings.layer for part in layer.split(JOINT)))
    problems = [
        f"{settings.application} has no layer {layer!r}{nearest(layer, names)}"
        for layer in wanted
        if layer not in names
    ]
    if problems:
        raise BackboneError("\n".join([*problems, f"it has: {', '.join(names)}"]))
    cut = keras.Model(full.input, {layer: full.get_layer(layer).output for layer in wanted})
    if settings.weights not in (UNTRAINED, IMAGENET):
        _check_content(Path(settings.weights), settings.sha256)
        _load(Path(settings.weights), full, cut)
    cut.trainable = False
    return cut, preprocess


def batch_of(settings: Backbone, level: Level) -> int:
    """Images of one forward pass: ``settings.batch`` cells, or smears of no more pixels together."""
    shrink = (settings.input_size["cell"] / settings.input_size[level]) ** 2
    return max(1, int(settings.batch * min(shrink, 1)))


def write_weights(path: Path, settings: Backbone, level: Level, seed: int) -> None:
    """Write the weights of `cut_network`, so that `weights: <path>` gives the same network elsewhere, without
    a download.

    Args:
        path: ends in ``.weights.h5``; the same bytes for the same weights.
        settings: the backbone.
        level: whose input size to use.
        seed: of untrained filters.
    """
    import keras

    keras.utils.clear_session()
    network, _ = cut_network(settings, level, seed)
    part = path.with_name(f"part.{path.name}")  # Keras looks at how the name ends
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save_weights(part)
    part.replace(path)


def features_of(
    batches: Iterator[list[View]], settings: Backbone, level: Level, seed: int
) -> Iterator[list[np.ndarray]]:
    """One forward pass over batches of encoded views; see `forward_pass`."""
    forward = forward_pass(settings, level, seed)
    for views in batches:
        yield forward(views)


def forward_pass(
    settings: Backbone, level: Level, seed: int, layers: Sequence[str] | None = None
) -> Callable[[Sequence[View]], list[np.ndarray]]:
    """A function from at most `batch_of` encoded views to their features.

    Args:
        settings: the backbone.
        level: whose input size to use.
        seed: of untrained filters.
        layers: some of the backbone's; None: all of them. What stands behind the last one is not computed.

    Returns:
        A function: it gives one float16 array (views, channels) per layer, and raises BackboneError where a
        feature is not a number that float16 can hold.

    Raises:
        BackboneError: as `build_backbone`.
    """
    import tensorflow as tf

    cv2.setNumThreads(1)
    network = build_backbone(settings, level, seed)
    wanted = list(settings.layer if layers is None else layers)

    def chosen(images: Any) -> list[Any]:
        found = network(images, training=False)
        return [found[layer] for layer in wanted]

    graph = tf.function(chosen)
    size = settings.input_size[level]
    images = np.zeros((batch_of(settings, level), size, size, 3), dtype=np.uint8)

    def forward(views: Sequence[View]) -> list[np.ndarray]:
        for row, view in enumerate(views):
            image = decode(view.image)
            images[row] = image if image.shape[0] == size else resize(image, size)
        # A short last batch goes through at full length: one shape, one graph.
        found = zip(graph(images), wanted, strict=True)
        return [_as_float16(values.numpy()[: len(views)], layer) for values, layer in found]

    return forward


def _application(name: str) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """A builder of keras.applications and the preprocessing that belongs to it."""
    import keras

    known = sorted(each for each in dir(keras.applications) if each[0].isupper())
    if name not in known:
        raise BackboneError(
            f"keras.applications has no {name!r}{nearest(name, known)}; it has: {', '.join(known)}"
        )
    builder = getattr(keras.applications, name)
    return builder, sys.modules[builder.__module__].preprocess_input


def _full_network(builder: Callable[..., Any], settings: Backbone, size: int) -> Any:
    """The whole network without its top; Keras's refusals in the user's words."""
    fixed = {
        "include_top": False,
        "weights": IMAGENET if settings.weights == IMAGENET else None,
        "input_shape": (size, size, 3),
    }
    taken = sorted(fixed.keys() & settings.options.keys())
    if taken:
        raise BackboneError(f"`options` of a backbone cannot set {', '.join(taken)}: the pipeline does")
    try:
        return builder(**fixed, **settings.options)
    except (TypeError, ValueError) as error:
        raise BackboneError(f"Keras cannot build {settings.application} so: {_brief(error)}") from error
    except Exception as error:  # what Keras raises where a download fails is no narrower
        if settings.weights != IMAGENET:
            raise
        raise BackboneError(
            f"the ImageNet weights of {settings.application} could not be had ({_brief(error)}): they come "
            "from the network at first use; without one, give `weights` the path of a file, or `none`"
        ) from error


def _pooled(name: str, feature_map: Any) -> Any:
    """The mean over the image, float32 (batch, channels)."""
    import keras

    if len(feature_map.shape) != 4:
        raise BackboneError(
            f"layer {name!r} gives {tuple(feature_map.shape)[1:]}, not a map of height, width and channels: "
            "cut at another one"
        )
    return keras.ops.mean(feature_map, axis=(1, 2))


def _joined(layer: str, pooled: dict[str, Any]) -> Any:
    import keras

    parts = [pooled[part] for part in layer.split(JOINT)]
    return keras.ops.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _as_float16(values: np.ndarray, layer: str) -> np.ndarray:
    if not bool((np.abs(values) <= np.finfo(np.float16).max).all()):
        raise BackboneError(
            f"layer {layer!r} gives features beyond float16 (largest: {np.abs(values).max():.3g}): cut at "
            "another layer, or give other weights"
        )
    return values.astype(np.float16)


def _check_content(path: Path, expected: str) -> None:
    if not path.is_file():
        raise BackboneError(f"no weight file at {str(path)!r}: mend `weights` of the backbone in params.yaml")
    if expected and (found := sha256(path)) != expected:
        raise BackboneError(
            f"{str(path)!r} is another file than the one that params.yaml means by its sha256 ({expected}). "
            f"Put that one back; or write `sha256: {found}` there, and all that hangs on them runs again"
        )


def _load(path: Path, full: Any, cut: Any) -> None:
    """Load weights of the whole network without its top, or of the network up to the deepest layer used.

    Which of the two a file holds is seen from the number of its tensors.
    """
    try:
        tensors = _count_tensors(path)
        if _leads_elsewhere(path):
            raise ValueError("it takes data from another file")
        networks = {len(full.weights): full, len(cut.weights): cut}
        if tensors not in networks:
            raise ValueError(
                f"it holds {tensors} tensors; the whole network has {len(full.weights)}, up to the deepest "
                f"layer used {len(cut.weights)}"
            )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            networks[tensors].load_weights(path)
        left_out = [str(each.message) for each in said if issubclass(each.category, UserWarning)]
        if left_out:  # Keras only warns where it leaves filters untrained
            raise ValueError(left_out[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"the weights in {str(path)!r} do not fit {full.name} with these options and layers: "
            f"{_brief(error)}"
        ) from error


def _count_tensors(path: Path) -> int:
    """How many arrays an HDF5 file holds; bare numbers (a saved seed) are none."""
    import h5py

    tensors = 0

    def count(_: str, node: Any) -> None:
        nonlocal tensors
        tensors += isinstance(node, h5py.Dataset) and node.ndim > 0

    with h5py.File(path) as file:
        file.visititems(count)
    return tensors


def _leads_elsewhere(path: Path) -> bool:
    """Whether a part of an HDF5 file lies in another one: a stranger's weights could read any file so."""
    import h5py

    def leads(group: Any) -> bool:
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                return True
            node = group[name]
            if isinstance(node, h5py.Group) and leads(node):
                return True
            if isinstance(node, h5py.Dataset) and (node.is_virtual or node.external):
                return True
        return False

    with h5py.File(path) as file:
        return leads(file)


def _brief(error: Exception) -> str:
    """The first line of what was said, without addresses of objects."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
