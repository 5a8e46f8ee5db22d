"""What the part that trains reads of each view. It is computed once and kept on disk.

This is the output of the frozen part of the network. With `finetune.online` it is the image itself, because
the whole network runs then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aplsmear.errors import UserError
from aplsmear.files import write_rows
from aplsmear.finetune.network import Network
from aplsmear.heads.head import padded_deviation
from aplsmear.images.reading import decode, fitting
from aplsmear.images.view_store import View

CHUNK = 256  # views of one forward pass


@dataclass(frozen=True)
class ViewCache:
    """What networks that share a frozen part read of the views of a level."""

    row: np.ndarray  # int64 (views of the level,): the row of each view in `arrays`; -1: not cached
    arrays: list[np.ndarray]  # (rows, ...), mapped: float16 outputs of the frozen part, or uint8 images
    features: np.ndarray  # float16 (views of the level, channels): what the tuned head reads
    centre: np.ndarray | None = None  # float16 (rows, channels): features of the centre crop

    def read(self, views: np.ndarray) -> tuple[np.ndarray, ...]:
        """Inputs of the part that trains for some views: float32 or uint8 (views, ...) each."""
        found = (each[self.row[views]] for each in self.arrays)
        return tuple(each if each.dtype == np.uint8 else each.astype(np.float32) for each in found)

    def extra_features(self, views: np.ndarray) -> np.ndarray:
        """Features that extra heads read: float16 (views, channels)."""
        rows = (self.features, views) if self.centre is None else (self.centre, self.row[views])
        return np.asarray(rows[0][rows[1]])

    def standardisation(self, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scale of features over some views, then of those of the centre crop, if any: float32."""
        seen = [self.features[views]] + ([self.extra_features(views)] if self.centre is not None else [])
        mean = np.concatenate([values.mean(axis=0, dtype=np.float64) for values in seen])
        scale = np.concatenate([padded_deviation(values.std(axis=0, dtype=np.float64)) for values in seen])
        return mean.astype(np.float32), scale.astype(np.float32)

    def forward(self, graph: Any, views: np.ndarray) -> Iterator[np.ndarray]:
        """Outputs of a tf.function for some views, in chunks of one shape, so that it is traced once."""
        for start in range(0, len(views), CHUNK):
            part = views[start : start + CHUNK]
            yield graph(bare(self.read(np.resize(part, CHUNK)))).numpy()[: len(part)]


def cache_views(
    folder: Path,
    batches: Iterable[list[View]],
    wanted: np.ndarray,
    network: Network,
    features: np.ndarray,
    *,
    online: bool,
) -> ViewCache:
    """Compute what the part that trains reads, and keep it. Files that an earlier process wrote are used.

    The folder gets one .npy file for each array. `batches` are all views of the level, in their order;
    `wanted`, bool (views,), those to cache; `features` as in `ViewCache`. `online`: images are kept instead
    of outputs of the frozen part of the network, which must not be trained yet.

    Raises UserError: an output of the frozen part does not fit into float16.
    """
    import tensorflow as tf

    trunk, count = network.backbone.trunk, int(wanted.sum())
    paths = [folder / f"{number}.npy" for number in range(1 if online else len(trunk.outputs))]
    rows = np.where(wanted, np.cumsum(wanted) - 1, -1)
    if not all(path.is_file() for path in paths):
        graph = tf.function(lambda images: trunk(images, training=False))
        write_rows(paths, count, _outputs(None if online else graph, batches, wanted, trunk.input.shape[1]))
    cache = ViewCache(rows, [np.load(path, mmap_mode="r") for path in paths], features)
    if network.centre is None:
        return cache

    def centre(given: Any) -> Any:
        return network.centre(trunk(given, training=False) if online else given, training=False)

    path = folder / "centre.npy"
    if not path.is_file():
        chunks = cache.forward(tf.function(centre), np.flatnonzero(wanted))
        write_rows([path], count, ([_float16(each)] for each in chunks))
    return replace(cache, centre=np.load(path, mmap_mode="r"))


def bare(arrays: Sequence[Any]) -> Any:
    """Keras takes one input without a tuple, several in a tuple."""
    return tuple(arrays) if len(arrays) > 1 else arrays[0]


def _outputs(
    graph: Any, batches: Iterable[list[View]], wanted: np.ndarray, size: int
) -> Iterator[list[np.ndarray]]:
    """The images of the wanted views, batch by batch, or what a graph returns for them."""
    first = 0
    for batch in batches:
        here = np.flatnonzero(wanted[first : first + len(batch)])
        first += len(batch)
        if len(here):
            images = np.zeros((len(batch), size, size, 3), np.uint8)  # mostly of one shape: few graphs
            for number, place in enumerate(here):
                images[number] = fitting(decode(batch[place].image), size)
            found = graph(images) if graph else images
            arrays = found if isinstance(found, list | tuple) else [found]
            kept = [np.asarray(each)[: len(here)] for each in arrays]
            yield [_float16(each) for each in kept] if graph else kept


def _float16(values: np.ndarray) -> np.ndarray:
    if not (np.abs(values) <= np.finfo(np.float16).max).all():
        raise UserError(
            f"outputs of the frozen part are beyond float16 (largest: {np.abs(values).max():.3g}): choose "
            "another number of finetune.blocks"
        )
    return values.astype(np.float16)
