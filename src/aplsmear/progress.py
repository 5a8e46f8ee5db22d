"""One look for every long wait: what is done, what is left, how long it will take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T], unit: str, total: int | None = None, note: Callable[[T], str] | None = None
) -> Iterator[T]:
    """Pass `items` on and show how far they are: a bar on a terminal, a line every half minute in a log.

    Args:
        items: what is waited for.
        unit: what one of them is called.
        total: how many there will be.
        note: a remark beside the bar after each.
    """
    seldom = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, unit=f" {unit}", mininterval=seldom, dynamic_ncols=True) as bar:
        for item in items:
            if note:
                bar.set_postfix_str(note(item), refresh=False)
            bar.update()
            yield item
