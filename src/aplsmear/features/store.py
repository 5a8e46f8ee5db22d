"""Bottleneck features on disk: one memory-mapped float16 array a layer, rows in the order of the views."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from aplsmear.errors import UserError
from aplsmear.files import give_back, new_array, whole
from aplsmear.tables import read_table, write_table

INDEX = "index.csv"


class FeaturesError(UserError, ValueError):
    """The features on disk are not those that params.yaml speaks of."""


@dataclass(frozen=True)
class Features:
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
        batches: for each batch one float16 array (views, channels) per layer; in all as many rows as `index`.

    Raises:
        ValueError: they are not as many.
    """
    with ExitStack() as stack:
        there = layers if len(index) else []  # without views there is an index of no rows, and no array
        parts = [stack.enter_context(whole(folder / f"{layer}.npy")) for layer in there]
        row = 0
        arrays: list[np.memmap] = []
        for batch in batches:
            if not arrays:
                arrays = [
                    new_array(part, np.float16, (len(index), values.shape[1]))
                    for part, values in zip(parts, batch, strict=True)
                ]
            end = row + len(batch[0])
            if end > len(index):
                raise ValueError(f"more than {len(index)} rows of features for {len(index)} views")
            for array, values in zip(arrays, batch, strict=True):
                array[row:end] = values
                give_back(array)
            row = end
        if row != len(index):
            raise ValueError(f"{row} rows of features for {len(index)} views")
        for array in arrays:
            array.flush()
    write_table(folder / INDEX, index)


def read_features(folder: Path, backbones: Collection[str]) -> dict[str, Features]:
    """All features of one level: ``folder/<backbone>/<layer>.npy``, by the name ``backbone/layer``.

    Raises:
        FeaturesError: the folder holds a backbone that is not one of `backbones` (DVC would take it for an
            input), or lacks one.
    """
    there = {path.parent.name for path in folder.glob(f"*/{INDEX}")}
    strangers, absent = sorted(there - set(backbones)), sorted(set(backbones) - there)
    problems = []
    if strangers:
        problems.append(
            f"{folder} holds features of backbones that params.yaml does not name: {', '.join(strangers)}. "
            "`aplsmear tidy` removes them (DVC keeps them in its cache)."
        )
    if absent:
        problems.append(
            f"{folder} lacks those of {', '.join(absent)}: `dvc pull bottleneck` brings them where they were "
            "pushed, `dvc repro` makes them."
        )
    if problems:
        raise FeaturesError(" ".join(problems))
    indices = {name: read_table(folder / name / INDEX) for name in sorted(there)}
    found = {}
    for path in sorted(folder.glob("*/*.npy")):
        name = f"{path.parent.name}/{path.stem}"
        found[name] = Features(name, indices[path.parent.name], np.load(path, mmap_mode="r"))
    return found
