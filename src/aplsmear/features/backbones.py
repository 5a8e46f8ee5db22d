"""Frozen networks of Keras, cut at named layers, or of ONNX files, written as graphs."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aplsmear.dino_variants import VARIANTS, variant_of
from aplsmear.errors import UserError, brief
from aplsmear.features.export import as_graph
from aplsmear.features.onnx_file import graph_of_file
from aplsmear.features.onnx_graph import GraphError, is_portable
from aplsmear.files import sha256, whole
from aplsmear.params import JOINT, Backbone, Level
from aplsmear.words import nearest, no_such

UNTRAINED, IMAGENET = "none", "imagenet"  # values of `weights` that are no path


def cut_network(settings: Backbone, level: Level, seed: int) -> tuple[Any, Callable[[Any], Any]]:
    """Build the frozen network of `settings` up to its layers, for images of a level, and its preprocessing.

    `seed` is that of untrained filters.

    Returns:
        keras.Model: preprocessed float32 (batch, size, size, 3) -> {layer: its map}, each part of a joint
        layer by itself; and a function from float32 RGB, 0 to 255, to the input of this model.

    Raises UserError: no such application, option, layer or file of weights, or weights that do not fit.
    """
    if settings.source == "onnx":
        raise UserError(
            "an ONNX file is frozen and cannot be trained: choose a trial whose features are of a backbone "
            "with `source: keras.applications` (`finetune.trial`, or `tune.space.features` for the search)"
        )
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
        raise UserError("\n".join([*problems, f"it has: {', '.join(names)}"]))
    cut = keras.Model(full.input, {layer: full.get_layer(layer).output for layer in wanted})
    for path in weight_files(settings):
        _check_content(path, settings.sha256)
        _load(path, full, cut)
    cut.trainable = False
    return cut, preprocess


def weight_files(settings: Backbone) -> list[Path]:
    """The file that a backbone reads its weights from, if any."""
    return [] if settings.weights in (UNTRAINED, IMAGENET) else [Path(settings.weights)]


def write_graph(path: Path, settings: Backbone, level: Level, seed: int) -> bool:
    """Build or read the network of `settings` and write it as a graph for `aplsmear.features.forward`.

    The same weights give the same bytes. Arguments as of `cut_network`.

    Returns:
        Whether the graph gives the same bits on every processor. Only that of an ONNX file may not.

    Raises:
        UserError: as `cut_network`, or an ONNX file that cannot be used.
        GraphError: a layer that cannot be written.
    """
    if settings.source == "onnx":
        file = Path(settings.weights)
        _check_content(file, settings.sha256)
        try:
            graph = graph_of_file(file, settings, settings.input_size[level])
        except GraphError as error:
            where = f"the network in {str(file)!r} cannot be used for {level}s"
            raise UserError(f"{where}:\n  {error}") from None
    else:
        import keras

        keras.utils.clear_session()
        network, preprocess = cut_network(settings, level, seed)
        graph = as_graph(network, preprocess, settings.input_size[level])
    with whole(path) as part:
        part.write_bytes(graph.SerializeToString(deterministic=True))
    return is_portable(graph)


def _application(name: str) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """A builder of a network and the preprocessing that belongs to it."""
    import keras

    if name in VARIANTS:
        from aplsmear.features import dino

        return partial(_dino, name), dino.preprocess
    known = sorted([*(each for each in dir(keras.applications) if each[0].isupper()), *VARIANTS])
    if name not in known:
        raise UserError(no_such("keras.applications has no network", name, known))
    builder = getattr(keras.applications, name)
    return builder, sys.modules[builder.__module__].preprocess_input


def _dino(name: str, *, weights: str | None, input_shape: Sequence[int], **options: Any) -> Any:
    """A vision transformer, called as a builder of keras.applications; a ValueError: options do not fit."""
    from aplsmear.features import dino

    options.pop("include_top")
    if weights is not None:
        raise ValueError(
            "its weights are not those of ImageNet: `aplsmear weights convert` makes a file of published ones"
        )
    return dino.build(variant_of(name, options), input_shape[0])


def _full_network(builder: Callable[..., Any], settings: Backbone, size: int) -> Any:
    """The whole network without its top, or a UserError if Keras refuses the options or the size."""
    weights = IMAGENET if settings.weights == IMAGENET else None
    fixed = {"include_top": False, "weights": weights, "input_shape": (size, size, 3)}
    taken = sorted(fixed.keys() & settings.options.keys())
    if taken:
        raise UserError(f"`options` of a backbone cannot set {', '.join(taken)}: the pipeline sets it")
    try:
        return builder(**fixed, **settings.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"Keras cannot build {settings.application} so: {brief(error)}") from error
    except Exception as error:  # Keras raises this class where a download fails
        if settings.weights != IMAGENET:
            raise
        raise UserError(
            f"ImageNet weights of {settings.application} could not be downloaded ({brief(error)}): without "
            "a network, set `weights` in params.yaml to the path of a file, or to `none`."
        ) from error


def _check_content(path: Path, expected: str) -> None:
    if not path.is_file():
        raise UserError(f"no weight file at {str(path)!r}: correct `weights` of the backbone in params.yaml")
    if expected and (found := sha256(path)) != expected:
        raise UserError(
            f"{str(path)!r} has another SHA-256 than in params.yaml ({expected}). Put the right file there. "
            f"Or write `sha256: {found}` into params.yaml: all stages that use the weights then run again."
        )


def _load(path: Path, full: Any, cut: Any) -> None:
    """Load weights of the whole network without its top, or of the network up to the deepest layer used.

    The number of its tensors tells which of the two a file has; a UserError: it has neither.
    """
    import h5py

    try:
        with h5py.File(path) as file:
            sizes = list(_sizes_of_arrays(file))
        whole, part = (
            [math.prod(each.shape) for each in of.weights if len(each.shape)] for of in (full, cut)
        )
        networks = {len(whole): (full, sum(whole)), len(part): (cut, sum(part))}
        if len(sizes) not in networks:
            raise ValueError(
                f"it has {len(sizes)} tensors; the whole network has {len(whole)}, up to the deepest layer "
                f"used {len(part)}"
            )
        network, own = networks[len(sizes)]
        if sum(sizes) != own:  # a file of a kilobyte can declare terabytes
            raise ValueError(f"it has {sum(sizes):,} numbers, the network has {own:,}")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            network.load_weights(path)
        left_out = [str(each.message) for each in warned if issubclass(each.category, UserWarning)]
        if left_out:  # Keras only warns about filters that stay untrained
            raise ValueError(left_out[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the weights in {str(path)!r} do not fit {full.name} with these options and layers: "
            f"{brief(error)}"
        ) from error


def _sizes_of_arrays(group: Any) -> Iterator[int]:
    """The size of each array in an open HDF5 file; single numbers are left out.

    Raises ValueError: it refers to another file: a stranger's file could show any file of this machine.
    """
    import h5py

    for name in group:
        is_here = isinstance(group.get(name, getlink=True), h5py.HardLink)
        node = group[name] if is_here else None
        if isinstance(node, h5py.Group):
            yield from _sizes_of_arrays(node)
        elif not is_here or (isinstance(node, h5py.Dataset) and (node.is_virtual or node.external)):
            raise ValueError("it reads data from another file")
        elif isinstance(node, h5py.Dataset) and node.ndim:
            yield int(node.size)
