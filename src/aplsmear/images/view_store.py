"""Encoded views in one large, byte-stable file a level, written and read as a stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from aplsmear.files import whole
from aplsmear.params import Level


class View(NamedTuple):
    """One view of one item (a cell or a smear): 0 is the plain one; `image` is encoded."""

    item: str
    view: int
    image: bytes


# Pictures are compressed already and no two are alike; statistics would hold some of them a second time.
_FORMAT = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}

SCHEMA = pa.schema([("item", pa.string()), ("view", pa.int32()), ("image", pa.binary())])


class ViewWriter:
    """Writes the views of each level to a file of its own, group by group; memory holds one group.

    A context: the files are there when the block ends well, and not at all when it does not.
    """

    def __init__(self, paths: Mapping[Level, Path]) -> None:
        """Take the file of each level; nothing is written before the block starts."""
        self._paths = paths
        self._stack = ExitStack()
        self._files: dict[Level, pq.ParquetWriter] = {}

    def __enter__(self) -> ViewWriter:
        """Start the files."""
        with ExitStack() as stack:
            for level, path in self._paths.items():
                part = stack.enter_context(whole(path))
                file = pq.ParquetWriter(part, SCHEMA, **_FORMAT)
                self._files[level] = stack.enter_context(file)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        """Finish them, or remove them after an error."""
        return self._stack.__exit__(*error)

    def write(self, groups: Mapping[Level, list[View]]) -> None:
        """Append one group of views to the file of each level."""
        for level, views in groups.items():
            if views:
                columns = dict(zip(SCHEMA.names, zip(*views, strict=True), strict=True))
                self._files[level].write_table(pa.table(columns, schema=SCHEMA))


def count_views(path: Path) -> int:
    """How many views a file of `ViewWriter` holds."""
    return int(pq.ParquetFile(path).metadata.num_rows)


def read_views(path: Path, batch: int, rows: range | None = None) -> Iterator[list[View]]:
    """The views of a file of `ViewWriter`, in its order, `batch` at a time (the last may be smaller).

    Args:
        path: the file.
        batch: views that are given together.
        rows: consecutive ones; only the groups that hold some of them are read. None: all.
    """
    file = pq.ParquetFile(path)
    rows = range(file.metadata.num_rows) if rows is None else rows
    groups: list[int] = []
    before = start = 0  # rows of those groups that come before the first one asked for; rows so far
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if start < rows.stop and end > rows.start:
            before = before if groups else rows.start - start
            groups.append(group)
        start = end
    views = islice(_views(file, groups, batch), before, before + len(rows))
    while found := list(islice(views, batch)):
        yield found


def _views(file: pq.ParquetFile, groups: list[int], batch: int) -> Iterator[View]:
    for group in groups:  # of several, Arrow keeps all that it has read until the last one ends
        for rows in file.iter_batches(batch, row_groups=[group]):
            columns = [rows.column(name).to_pylist() for name in SCHEMA.names]
            yield from map(View, *columns)


def plain_views(path: Path, items: Collection[str]) -> dict[str, bytes]:
    """The encoded plain view of each of some items, by item; only the groups that hold one are read whole."""
    found: dict[str, bytes] = {}
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        names = file.read_row_group(group, columns=["item", "view"])
        pairs = zip(names["item"].to_pylist(), names["view"].to_pylist(), strict=True)
        rows = [row for row, (item, view) in enumerate(pairs) if view == 0 and item in items]
        if rows:
            kept = file.read_row_group(group, columns=["item", "image"]).take(rows)
            found |= dict(zip(kept["item"].to_pylist(), kept["image"].to_pylist(), strict=True))
    return found


def read_index(path: Path) -> pd.DataFrame:
    """Item and view of each view of a file of `ViewWriter`, without their images."""
    index: pd.DataFrame = pq.read_table(path, columns=["item", "view"]).to_pandas()
    return index
