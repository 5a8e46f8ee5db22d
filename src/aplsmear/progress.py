"""One look for every long wait: what is done, what is left, how long it will take."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], unit: str, total: int | None = None) -> Iterator[T]:
    """Pass `items` on and show how far they are: a moving bar on a terminal, a line every half minute in a log."""
    seldom = 0.1 if sys.stderr.isatty() else 30.0
    yield from tqdm(items, total=total, unit=f" {unit}", mininterval=seldom, dynamic_ncols=True)
