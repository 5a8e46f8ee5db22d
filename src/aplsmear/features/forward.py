"""The forward pass of frozen backbones by ONNX Runtime: from encoded views to bottleneck features.

On a CPU the features are the same bytes on every x86-64 processor with AVX2 and FMA, for any number of
threads and any size of a batch. On a GPU (with the package onnxruntime-gpu) they differ in the last digits.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import joblib
import numpy as np

from aplsmear.compute.engine import HERE, Engine
from aplsmear.compute.runtime import providers
from aplsmear.errors import UserError, brief
from aplsmear.features.onnx_graph import PIXELS, only, read_graph
from aplsmear.images.reading import decode_jpeg, resize
from aplsmear.images.view_store import View, count_views, read_views
from aplsmear.params import JOINT, Backbone, Level

_BATCHES = 32  # of one partition: some seconds of work, whose features are a few megabytes
_AT_ONCE = 2**16  # pixels of one call on a CPU: maps of more images do not fit into the processor's cache
_KEPT = 8  # networks that a process keeps, because partition after partition needs them


class FeatureRequest(NamedTuple):
    """Which features of which backbone are wanted of the items of one level."""

    backbone: str  # its name
    graph: Path  # file of its graph for this level
    level: Level
    layers: tuple[str, ...]
    batch: int  # images of one forward pass


def batch_of(settings: Backbone, level: Level) -> int:
    """Images of one forward pass: ``settings.batch`` cells, or smears of no more pixels together."""
    shrink = (settings.input_size["cell"] / settings.input_size[level]) ** 2
    return max(1, int(settings.batch * min(shrink, 1)))


def partition(request: FeatureRequest) -> int:
    """Views of one partition of `features_of_file`."""
    return _BATCHES * request.batch


def features_of_file(
    path: Path, request: FeatureRequest, engine: Engine = HERE
) -> Iterator[list[np.ndarray]]:
    """One forward pass over all views of a file of `view_writer`, as `features_of`, `partition` views each.

    The engine changes no result.
    """
    size, count = partition(request), count_views(path)
    parts = (range(start, min(start + size, count)) for start in range(0, count, size))
    yield from engine.map(partial(_features_of_rows, path=path, request=request), parts, processes=False)


def _features_of_rows(rows: range, path: Path, request: FeatureRequest) -> list[np.ndarray]:
    found = features_of(read_views(path, request.batch, rows), request)
    return [np.concatenate(layer) for layer in zip(*found, strict=True)]


def features_of_views(
    views: Mapping[Level, Sequence[View]], requests: Sequence[FeatureRequest]
) -> dict[str, np.ndarray]:
    """All requested features of views: float16 (views, channels), by level/backbone/layer.

    A level without views has no entry.
    """
    found: dict[str, np.ndarray] = {}
    for request in requests:
        mine = views[request.level]
        batches = (mine[start : start + request.batch] for start in range(0, len(mine), request.batch))
        parts = list(features_of(batches, request))
        if parts:
            names = [f"{request.level}/{request.backbone}/{layer}" for layer in request.layers]
            values = map(np.concatenate, zip(*parts, strict=True))
            found |= dict(zip(names, values, strict=True))
    return found


def features_of(batches: Iterable[Sequence[View]], request: FeatureRequest) -> Iterator[list[np.ndarray]]:
    """The features of each batch of encoded views, in order: one float16 array (views, channels) per layer.

    Each batch is decoded and computed by one thread. There are as many threads as cores that this process may
    use, and about two batches per thread in memory.
    """
    network = _kept_network(request.graph, request.layers, _stamp(request.graph))
    threads = joblib.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[list[np.ndarray]]] = deque()
        for batch in batches:
            waiting.append(pool.submit(network, batch))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Network:
    """Some layers of a frozen backbone, ready to run; several threads may use it at once."""

    def __init__(self, graph: Path, layers: Sequence[str]) -> None:
        """Read the file of a graph; the layer ``a+b`` has the features of two layers behind one another.

        Raises GraphError: the file is no such graph, or lacks a layer.
        """
        import onnxruntime

        cv2.setNumThreads(1)
        self.layers = [layer.split(JOINT) for layer in layers]
        self._names = list(dict.fromkeys(name for layer in self.layers for name in layer))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # batches are shared among threads
        options.log_severity_level = 3
        model = only(read_graph(graph.read_bytes()), self._names)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=providers()
        )
        images, self.size, *_ = self._session.get_inputs()[0].shape
        on_cpu = self._session.get_providers()[0] == "CPUExecutionProvider"
        self._step = max(1, _AT_ONCE // self.size**2) if on_cpu else None  # images; None: the whole batch
        if images == 1:  # of an ONNX file that takes one image at a time
            self._step = 1

    def __call__(self, views: Sequence[View]) -> list[np.ndarray]:
        """The features of encoded views: one float16 array (views, channels) per layer.

        Raises UserError: a feature that float16 cannot hold, or too little memory.
        """
        return self.features(self.pixels(views))

    def pixels(self, views: Sequence[View]) -> np.ndarray:
        """Decoded views at the size that the network takes: uint8 (views, size, size, 3)."""
        images = np.empty((len(views), self.size, self.size, 3), dtype=np.uint8)
        for row, view in enumerate(views):
            image = decode_jpeg(view.image)
            images[row] = image if image.shape[0] == self.size else resize(image, self.size)
        return images

    def features(self, images: np.ndarray) -> list[np.ndarray]:
        """The features of decoded views; see `__call__`."""
        from onnxruntime.capi.onnxruntime_pybind11_state import EPFail, Fail, RuntimeException

        step = self._step or len(images)
        try:
            parts = [
                self._session.run(self._names, {PIXELS: images[row : row + step]})
                for row in range(0, len(images), step)
            ]
        except (EPFail, Fail, RuntimeException) as error:  # in practice too little memory
            raise UserError(
                f"{len(images)} images of {self.size} px could not be computed ({brief(error)}): lower "
                "`batch` of the backbone in params.yaml"
            ) from error
        found = dict(zip(self._names, map(np.concatenate, zip(*parts, strict=True)), strict=True))
        return [_as_float16(np.hstack([found[name] for name in layer]), layer) for layer in self.layers]


@lru_cache(maxsize=_KEPT)
def _kept_network(graph: Path, layers: tuple[str, ...], _: Any) -> Network:
    return Network(graph, layers)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes when the file is replaced."""
    with path.open("rb") as file:  # a network disk looks anew at a file only when it is opened
        status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _as_float16(values: np.ndarray, layer: Sequence[str]) -> np.ndarray:
    largest = np.abs(values).max(initial=0)
    if not largest <= np.finfo(np.float16).max:
        raise UserError(
            f"layer {JOINT.join(layer)!r} gives features beyond float16 (largest: {largest:.3g}): cut at "
            "another layer, or give other weights"
        )
    return values.astype(np.float16)
