"""The view store: all encoded views of one level in one large Parquet file, written and read as a stream."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from aplsmear.files import whole
from aplsmear.params import Level


class View(NamedTuple):
    """One view of one item."""

    item: str  # name of a cell or smear
    view: int  # 0: the plain view; 1 and above: augmented views
    image: bytes  # JPEG


# JPEGs are compressed already and all different; column statistics would store some of them again.
_FORMAT = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}

SCHEMA = pa.schema([("item", pa.string()), ("view", pa.int32()), ("image", pa.binary())])


@contextmanager
def view_writer(paths: Mapping[Level, Path]) -> Iterator[Callable[[Mapping[Level, list[View]]], None]]:
    """A function that appends the views of one smear and its cells to the view stores of their levels.

    Memory holds one group of views. The files appear when the block ends without an error; after an error
    there are none.
    """
    with ExitStack() as stack:
        parts = {level: stack.enter_context(whole(path)) for level, path in paths.items()}
        files = {
            level: stack.enter_context(pq.ParquetWriter(part, SCHEMA, **_FORMAT))
            for level, part in parts.items()
        }

        def write(groups: Mapping[Level, list[View]]) -> None:
            for level, views in groups.items():
                if views:
                    columns = dict(zip(SCHEMA.names, zip(*views, strict=True), strict=True))
                    files[level].write_table(pa.table(columns, schema=SCHEMA))

        yield write


def count_views(path: Path) -> int:
    """Number of views in a view store."""
    return int(pq.ParquetFile(path).metadata.num_rows)


def read_views(path: Path, batch: int, rows: range | None = None) -> Iterator[list[View]]:
    """Read views in the order of the file, in batches (the last batch may be smaller).

    Args:
        path: a view store.
        batch: views per batch.
        rows: consecutive rows to read; row groups without any of them are skipped. None: all rows.
    """
    file = pq.ParquetFile(path)
    rows = range(file.metadata.num_rows) if rows is None else rows
    groups: list[int] = []
    before = start = 0  # rows of the first group read that precede `rows`; first row of the current group
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
    for group in groups:  # one by one: Arrow keeps every group of one call in memory until its end
        for rows in file.iter_batches(batch, row_groups=[group]):
            yield from map(View, *(rows.column(name).to_pylist() for name in SCHEMA.names))


def plain_views(path: Path, items: Collection[str]) -> dict[str, bytes]:
    """The JPEGs of the plain views of some items, by item; row groups without any of them are skipped."""
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
    """The columns `item` and `view` of a view store; images are not read."""
    index: pd.DataFrame = pq.read_table(path, columns=["item", "view"]).to_pandas()
    return index
