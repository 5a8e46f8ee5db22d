"""Frozen networks of keras.applications, cut at named layers, and the features they give."""

from __future__ import annotations

import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from aplsmear.compute.engine import HERE, Engine
from aplsmear.errors import UserError, brief
from aplsmear.features.devices import machine_strategy, precision_of
from aplsmear.files import sha256
from aplsmear.images.reading import decode_jpeg, resize
from aplsmear.images.view_store import View, count_views, read_views
from aplsmear.params import JOINT, Backbone, Level, nearest

UNTRAINED, IMAGENET = "none", "imagenet"  # values of `weights` that are no path
_DECODERS = 4  # threads at most; each has a batch in hand
_BATCHES = 32  # of one partition: some seconds of work, whose features are a few megabytes
_KEPT = 8  # networks that a process keeps built, because partition after partition asks for them


class BackboneError(UserError, ValueError):
    """A backbone, layer or weight file that Keras does not have; the message says what it has."""


def build_backbone(settings: Backbone, level: Level, seed: int, strategy: Any = None) -> Any:
    """The network of `settings` from a uint8 image to one feature vector per layer, in inference mode.

    Each layer's feature map is averaged over the image (the bottleneck feature of the original); layers named
    together (``a+b``) stand behind one another in one vector. Keras's own state starts anew, so that neither
    names nor untrained filters depend on what was built before.

    Args:
        settings: application, its options, the layers to cut at, the weights.
        level: whose input size to use.
        seed: of the untrained filters (`weights: none`).
        strategy: tf.distribute.Strategy on whose devices it lies; None: the one in force.

    Returns:
        keras.Model: uint8 (batch, size, size, 3), RGB -> {layer: float32 (batch, channels)}.

    Raises:
        BackboneError: no such application, option, layer or weight file, weights that do not fit, or a layer
            without a feature map.
    """
    import keras
    import tensorflow as tf

    keras.utils.clear_session()
    with (strategy or tf.distribute.get_strategy()).scope(), precision_of(settings.precision):
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
    for path in weight_files(settings):
        _check_content(path, settings.sha256)
        _load(path, full, cut)
    cut.trainable = False
    return cut, preprocess


def weight_files(settings: Backbone) -> list[Path]:
    """The file that a backbone reads its weights from, if any."""
    return [] if settings.weights in (UNTRAINED, IMAGENET) else [Path(settings.weights)]


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


class FeatureRequest(NamedTuple):
    """A forward pass that items of one level take: a backbone, and the layers that are wanted of it."""

    backbone: str  # its name
    settings: Backbone
    level: Level
    seed: int  # of untrained filters
    layers: tuple[str, ...]


def features_of_file(
    path: Path, settings: Backbone, weights: Path, level: Level, engine: Engine = HERE
) -> Iterator[list[np.ndarray]]:
    """One forward pass over all views of a file, partition by partition.

    Args:
        path: of `aplsmear.images.view_store.ViewWriter`.
        settings: the backbone.
        weights: its weights, of `write_weights`. Nobody downloads any, and untrained filters are drawn once:
            Keras draws them from Python's one generator, which other threads of a worker use too.
        level: whose input size to use.
        engine: does the partitions; whichever it is, the same images make a batch.

    Yields:
        As `features_of`, of `partition` views each.
    """
    size = partition(settings, level)
    count = count_views(path)
    parts = (range(start, min(start + size, count)) for start in range(0, count, size))
    settings = settings.model_copy(update={"weights": str(weights), "sha256": ""})
    function = partial(_features_of_rows, path=path, settings=settings, level=level)
    yield from engine.map(function, parts, processes=False)


def partition(settings: Backbone, level: Level) -> int:
    """Views of one partition of `features_of_file`."""
    return _BATCHES * batch_of(settings, level)


def _features_of_rows(rows: range, path: Path, settings: Backbone, level: Level) -> list[np.ndarray]:
    batches = read_views(path, batch_of(settings, level), rows)
    found = features_of(batches, settings, level, 0)
    return [np.concatenate(layer) for layer in zip(*found, strict=True)]


def features_of_views(
    views: Mapping[Level, Sequence[View]], passes: Sequence[FeatureRequest]
) -> dict[str, np.ndarray]:
    """What the passes give for all views of their levels: float16 (views, channels), by level/backbone/layer.

    Of a level without views there is nothing.
    """
    found: dict[str, np.ndarray] = {}
    for each in passes:
        mine, batch = views[each.level], batch_of(each.settings, each.level)
        batches = (mine[start : start + batch] for start in range(0, len(mine), batch))
        parts = features_of(batches, each.settings, each.level, each.seed, each.layers)
        if mine:
            values = map(np.concatenate, zip(*parts, strict=True))
            names = (f"{each.level}/{each.backbone}/{layer}" for layer in each.layers)
            found |= dict(zip(names, values, strict=True))
    return found


def features_of(
    batches: Iterable[Sequence[View]],
    settings: Backbone,
    level: Level,
    seed: int,
    layers: Sequence[str] | None = None,
) -> Iterator[list[np.ndarray]]:
    """One forward pass over batches of encoded views; see `ForwardPass`, and `ahead`. The network is kept."""
    wanted = tuple(settings.layer if layers is None else layers)
    forward = _kept_pass(settings.model_dump_json(), level, seed, wanted, _stamp(settings))
    yield from ahead(forward, batches)


def ahead(forward: ForwardPass, batches: Iterable[Sequence[View]]) -> Iterator[list[np.ndarray]]:
    """The features of each batch; the next batches are decoded while the network runs."""
    decoders = min(_DECODERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(decoders) as threads:
        waiting: deque[Future[np.ndarray]] = deque()
        for views in batches:
            waiting.append(threads.submit(forward.pixels, views))
            if len(waiting) > decoders:
                yield forward.features(waiting.popleft().result())
        while waiting:
            yield forward.features(waiting.popleft().result())


class ForwardPass:
    """From at most `batch_of` encoded views to their features.

    On several GPUs each takes its share of a batch. A batch that is too large for their memory is halved
    until it fits, and stays so.
    """

    def __init__(
        self,
        settings: Backbone,
        level: Level,
        seed: int,
        layers: Sequence[str] | None = None,
        strategy: Any = None,
    ) -> None:
        """Build the network.

        Args:
            settings: the backbone.
            level: whose input size to use.
            seed: of untrained filters.
            layers: some of the backbone's; None: all. What stands behind the last one is not computed.
            strategy: tf.distribute.Strategy; None: what `machine_strategy` finds.

        Raises:
            BackboneError: as `build_backbone`.
        """
        import tensorflow as tf

        cv2.setNumThreads(1)
        self.settings, self.size = settings, settings.input_size[level]
        self.layers = list(settings.layer if layers is None else layers)
        self.strategy = strategy or machine_strategy()
        network = build_backbone(settings, level, seed, self.strategy)

        def chosen(images: Any) -> list[Any]:
            found = network(images, training=False)
            return [found[layer] for layer in self.layers]

        self._graph = tf.function(lambda images: self.strategy.run(chosen, (images,)))
        self._share = -(-batch_of(settings, level) // self.strategy.num_replicas_in_sync)  # of each device

    def __call__(self, views: Sequence[View]) -> list[np.ndarray]:
        """One float16 array (views, channels) per layer; see `features`."""
        return self.features(self.pixels(views))

    def pixels(self, views: Sequence[View]) -> np.ndarray:
        """Decoded, at the size that the network takes: uint8 (views, size, size, 3)."""
        images = np.empty((len(views), self.size, self.size, 3), dtype=np.uint8)
        for row, view in enumerate(views):
            image = decode_jpeg(view.image)
            images[row] = image if image.shape[0] == self.size else resize(image, self.size)
        return images

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """Of decoded views: one float16 array (views, channels) per layer.

        Raises:
            BackboneError: a feature is not a number that float16 can hold, not even one image fits into
                memory, or half precision is asked for where it cannot be had.
        """
        import tensorflow as tf

        while True:
            together = self._share * self.strategy.num_replicas_in_sync
            try:
                parts = [self._step(images[row : row + together]) for row in range(0, len(images), together)]
                break
            except tf.errors.ResourceExhaustedError as error:
                if self._share == 1:
                    raise BackboneError(
                        f"one image of {self.size} px does not fit into memory with "
                        f"{self.settings.application}: make `input_size` smaller, or cut at an earlier layer"
                    ) from error
                self._share = -(-self._share // 2)
            except (tf.errors.AbortedError, tf.errors.UnimplementedError) as error:
                if self.settings.precision != "on":
                    raise
                raise BackboneError(
                    f"{self.settings.application} does not run in half precision here ({brief(error)}): it "
                    "takes a GPU; set `precision` of the backbone to auto"
                ) from error
        whole = (np.concatenate(part) for part in zip(*parts, strict=True))
        return [_as_float16(values, layer) for values, layer in zip(whole, self.layers, strict=True)]

    def _step(self, images: np.ndarray) -> list[np.ndarray]:
        """At most one share a device; float32 (images, channels) per layer."""
        import tensorflow as tf

        # A short last batch goes through at full length: one shape, one graph.
        full = np.zeros((self.strategy.num_replicas_in_sync, self._share, *images.shape[1:]), dtype=np.uint8)
        full.reshape(-1, *images.shape[1:])[: len(images)] = images

        def of_device(context: Any) -> Any:
            return tf.constant(full[context.replica_id_in_sync_group])

        found = self._graph(self.strategy.experimental_distribute_values_from_function(of_device))
        devices = self.strategy.experimental_local_results
        return [np.concatenate([each.numpy() for each in devices(layer)])[: len(images)] for layer in found]


@lru_cache(maxsize=_KEPT)
def _kept_pass(settings: str, level: Level, seed: int, layers: tuple[str, ...], _: str) -> ForwardPass:
    return ForwardPass(Backbone.model_validate_json(settings), level, seed, layers)


def _stamp(settings: Backbone) -> str:
    """Another one, once a file of weights is another."""
    for path in filter(Path.is_file, weight_files(settings)):
        with path.open("rb") as file:  # a network disk looks anew at a file only when it is opened
            status = os.fstat(file.fileno())
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
    return ""


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
        raise BackboneError(f"Keras cannot build {settings.application} so: {brief(error)}") from error
    except Exception as error:  # what Keras raises where a download fails is no narrower
        if settings.weights != IMAGENET:
            raise
        raise BackboneError(
            f"the ImageNet weights of {settings.application} could not be had ({brief(error)}): they come "
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
    return keras.ops.mean(keras.ops.cast(feature_map, "float32"), axis=(1, 2))


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
        tensors, numbers = _count_tensors(path)
        if _leads_elsewhere(path):
            raise ValueError("it takes data from another file")
        networks = {len(full.weights): full, len(cut.weights): cut}
        if tensors not in networks:
            raise ValueError(
                f"it holds {tensors} tensors; the whole network has {len(full.weights)}, up to the deepest "
                f"layer used {len(cut.weights)}"
            )
        if numbers != (own := networks[tensors].count_params()):  # a file of a kilobyte can claim terabytes
            raise ValueError(f"it holds {numbers:,} numbers, the network has {own:,}")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            networks[tensors].load_weights(path)
        left_out = [str(each.message) for each in said if issubclass(each.category, UserWarning)]
        if left_out:  # Keras only warns where it leaves filters untrained
            raise ValueError(left_out[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"the weights in {str(path)!r} do not fit {full.name} with these options and layers: "
            f"{brief(error)}"
        ) from error


def _count_tensors(path: Path) -> tuple[int, int]:
    """How many arrays an HDF5 file holds, and how many numbers they say they have; a saved seed is none."""
    import h5py

    sizes: list[int] = []

    def count(_: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim > 0:
            sizes.append(int(node.size))

    with h5py.File(path) as file:
        file.visititems(count)
    return len(sizes), sum(sizes)


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
