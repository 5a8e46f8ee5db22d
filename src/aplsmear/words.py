"""Words of messages: unknown ones and those that were probably meant; what was left out of a data set."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

_LONGEST = 120  # characters of one name in a message
_LEFT_OUT = {  # in dataset/report.json -> in words, where the underscores are not enough
    "cells_without_box": "cells without a box",
    "cells_with_box_under_min_box": "cells with a box smaller than dataset.min_box",
    "cells_with_picture_under_min_box": "cells with a picture smaller than dataset.min_box",
    "cells_of_left_out_smears": "cells of smears that were left out",
}


def misspelt(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known word that was probably meant, without regard to capital letters; None if none is similar.

    `likeness` is the least similarity (`difflib.SequenceMatcher.ratio`), from 0 to 1 for the same word.
    """
    by_folded = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=likeness)
    return by_folded[close[0]] if close else None


def nearest(word: str, known: Iterable[str]) -> str:
    """A question after an unknown word: ``(did you mean 'X'?)``; empty if no known word is similar."""
    close = misspelt(word, known)
    return f" (did you mean {close!r}?)" if close else ""


def named(names: Iterable[object], count: int = 5) -> str:
    """The first names, shortened to 120 characters, and how many more there are."""
    listed = [
        one if len(one) <= _LONGEST else f"{one[:_LONGEST]}..." for one in dict.fromkeys(map(str, names))
    ]
    more = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def unlike_params(
    folder: Path, what: str, there: Collection[str], wanted: Collection[str], stage: str
) -> str:
    """What to do about a folder of ``members`` or ``backbones`` (`what`) that params.yaml does not describe.

    It has some that are not wanted (DVC would take them for inputs), or lacks some. Empty: it has all of them
    and no other. `stage` is the stage of dvc.yaml that fills the folder.
    """
    strange, absent = (", ".join(sorted({*a} - {*b})) for a, b in ((there, wanted), (wanted, there)))
    problems = []
    if strange:
        problems.append(
            f"{folder} has {what} that params.yaml does not name: {strange}. `aplsmear tidy` removes them "
            "(DVC keeps them in its cache)."
        )
    if absent:
        problems.append(
            f"{folder} lacks the {what} {absent}: `dvc pull {stage}` gets them if they were pushed, "
            "`dvc repro` makes them."
        )
    return " ".join(problems)


def visible(text: str, kept: str = "") -> str:
    """The text with invisible characters as escapes, so that none but `kept` reaches the terminal."""
    return "".join(one if one.isprintable() or one in kept else ascii(one)[1:-1] for one in text)


def no_such(lead: str, name: str, known: Collection[str]) -> str:
    """The message about an unknown name: `lead` (``there is no profile``), the name, the known names."""
    return f"{lead} {name!r}{nearest(name, known)}; there are: {', '.join(known)}"


def left_out(parts: Mapping[str, Any]) -> list[str]:
    """What was left out of a data set, such as ``cells without a box: 3``; `parts`: what -> ``count``."""
    return [
        f"{_LEFT_OUT.get(what, what.replace('_', ' '))}: {part['count']:,}"
        for what, part in parts.items()
        if part["count"]
    ]
