"""Bottleneck features on disk: one memory-mapped float16 array per layer, rows in the order of the views."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.errors import UserError
from aplsmear.files import rows_of, write_rows
from aplsmear.params import of_backbones
from aplsmear.tables import read_table, write_table
from aplsmear.words import unlike_params

INDEX = "index.csv"


@dataclass(frozen=True)
class Features:
    """The features of one layer of one backbone at one level, or of several backbones behind one another.

    The views of an item are consecutive, the plain view (0) first.
    """

    name: str  # backbone/layer, or backbone/layer+backbone/layer
    index: pd.DataFrame  # item, view: one row for each row of `values`
    values: Any  # float16 (views, channels): a memory-mapped array, or `Columns`


class Columns:
    """Arrays with the same rows, read as one array with all their columns; nothing is copied before."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """The arrays, (rows, columns) each."""
        self.parts, self.dtype = parts, parts[0].dtype
        self.shape = (len(parts[0]), sum(part.shape[1] for part in parts))

    def __len__(self) -> int:
        """The number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The rows of all parts, (..., columns)."""
        if isinstance(rows, np.ndarray) and rows.dtype != bool:
            return np.concatenate([rows_of(part, rows) for part in self.parts], axis=-1)
        return np.concatenate([part[rows] for part in self.parts], axis=-1)


class FeatureTable(dict[str, Features]):
    """Features by name. It lists those of single backbones, and gives those of several on demand."""

    def __missing__(self, name: str) -> Features:
        """The features ``backbone/layer+backbone/layer``.

        Raises:
            KeyError: one of the backbones or layers is not there.
            UserError: the backbones have seen different views.
        """
        names = of_backbones(name)
        if len(names) == 1 or not self.keys() >= set(names):
            raise KeyError(name)
        parts = [self[each] for each in names]
        if any(not part.index.equals(parts[0].index) for part in parts):
            raise UserError(f"the features {name} are of other views; run `dvc repro bottleneck` again")
        return Features(name, parts[0].index, Columns([part.values for part in parts]))


def write_features(
    folder: Path, index: pd.DataFrame, layers: list[str], batches: Iterable[list[np.ndarray]]
) -> None:
    """Write ``index.csv`` and, for each layer, ``<layer>.npy``: batches of features while they are computed.

    `index` has the columns `item` and `view`; a batch is one float16 array (views, channels) per layer.

    Raises ValueError: the batches have more or fewer rows in total than `index`.
    """
    there = layers if len(index) else []  # without views: an index without rows, and no array
    write_rows([folder / f"{layer}.npy" for layer in there], len(index), batches)
    write_table(folder / INDEX, index)


def read_features(folder: Path, backbones: Collection[str]) -> FeatureTable:
    """Open the features of one level, ``<backbone>/<layer>.npy`` in its folder, by ``backbone/layer``.

    `backbones` are those in params.yaml.

    Raises UserError: the folder has a backbone that is not in `backbones` (DVC would hash it as an input), or
    lacks one.
    """
    there = {path.parent.name for path in folder.glob(f"*/{INDEX}")}
    if problem := unlike_params(folder, "backbones", there, backbones, "bottleneck"):
        raise UserError(problem)
    indices = {name: read_table(folder / name / INDEX) for name in sorted(there)}
    found = FeatureTable()
    for path in sorted(folder.glob("*/*.npy")):
        name = f"{path.parent.name}/{path.stem}"
        found[name] = Features(name, indices[path.parent.name], np.load(path, mmap_mode="r"))
    return found
