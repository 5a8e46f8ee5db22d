"""Progress of long loops: items done, items left, remaining time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T],
    unit: str,
    total: int | None = None,
    note: Callable[[T], str] | None = None,
    counts: Iterable[int] = repeat(1),
) -> Iterator[T]:
    """Yield the items and show how many of `total` are done: a bar on a terminal, a line every 30 s in a log.

    `unit` is the name of what is counted, in the plural; `note` gives a text beside the bar after each item;
    `counts` is how much each item counts.
    """
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=total, unit=f" {unit}", mininterval=seconds, dynamic_ncols=True, disable=total == 0
    ) as bar:
        for item, count in zip(items, counts, strict=False):
            if note:
                bar.set_postfix_str(note(item), refresh=False)
            bar.update(count)
            yield item
