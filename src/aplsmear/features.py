"""Bottleneck features on disk: one memory-mapped float16 array a layer, its rows in the order of the views."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from aplsmear.files import whole
from aplsmear.shards import View
from aplsmear.tables import read_table, write_table

INDEX = "index.csv"


class Features(NamedTuple):
    """The features of one layer of one backbone on one level."""

    name: str  # backbone/layer
    index: pd.DataFrame  # item, view: one row a row of `values`; the views of an item stand together, 0 first
    values: np.ndarray  # float16, (views, channels), memory-mapped


def write_features(
    folder: Path, index: pd.DataFrame, layers: list[str], batches: Iterable[list[np.ndarray]]
) -> None:
    """Write batches of features as they come.

    Args:
        folder: gets ``index.csv`` and, for each layer, ``<layer>.npy``.
        index: item and view of each row.
        layers: their names.
        batches: for each batch one float16 array (views, channels) per layer; together as many rows as `index`.
    """
    arrays: list[np.ndarray] = []
    row = 0
    with ExitStack() as stack:
        parts = [stack.enter_context(whole(folder / f"{layer}.npy")) for layer in layers]
        for batch in batches:
            if not arrays:
                arrays = [
                    np.lib.format.open_memmap(
                        part, mode="w+", dtype=np.float16, shape=(len(index), values.shape[1])
                    )
                    for part, values in zip(parts, batch, strict=True)
                ]
            for array, values in zip(arrays, batch, strict=True):
                array[row : row + len(values)] = values
            row += len(batch[0])
        if row != len(index):
            raise ValueError(f"{row} rows of features for {len(index)} views")
        for array in arrays:
            array.flush()
    write_table(folder / INDEX, index)


def read_features(folder: Path, backbones: Collection[str]) -> dict[str, Features]:
    """All features of one level: ``folder/<backbone>/<layer>.npy``, by the name ``backbone/layer``.

    Raises:
        ValueError: the folder holds a backbone that is not one of `backbones` (DVC would take it for an input).
    """
    strangers = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in backbones)
    if strangers:
        raise ValueError(
            f"{folder} holds features of backbones that params.yaml does not name: {', '.join(strangers)}. "
            "`aplsmear tidy` removes them (DVC keeps them in its cache)."
        )
    found = {}
    for path in sorted(folder.glob("*/*.npy")):
        name = f"{path.parent.name}/{path.stem}"
        found[name] = Features(name, read_table(path.parent / INDEX), np.load(path, mmap_mode="r"))
    return found
