"""What is wrong with a data set, in words for the person who keeps its tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aplsmear.errors import UserError

_EXAMPLES = 5  # rows named in one line of the table
_WIDTH = 160  # characters
_LONGEST = 80  # characters shown of one value


@dataclass(frozen=True)
class Problem:
    """Something to mend before the data set can be used.

    Attributes:
        file: relative to the data set's folder.
        row: as a spreadsheet counts (the header is row 1); None where the whole file is meant.
        column: its name; '' where a whole row or file is meant.
        value: what is there.
        message: what was expected.
        mend: what to do.
    """

    file: str
    row: int | None
    column: str
    value: str
    message: str
    mend: str

    def __str__(self) -> str:
        """One line: where, what, what was expected, the mend."""
        row = f"row {self.row}" if self.row else ""
        value = repr(_short(self.value)) if self.value else ""
        where = ", ".join(part for part in (self.file, row, self.column, value) if part)
        return f"{where}: expected {self.message}; {self.mend}"


class DataSetError(UserError, ValueError):
    """A data set cannot be used.

    Attributes:
        problems: all that is wrong with it.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        """Keep the problems: files in the order of their first problem, rows in theirs."""
        listed = list(problems)
        files = list(dict.fromkeys(one.file for one in listed))
        self.problems = sorted(listed, key=lambda one: (files.index(one.file), one.row or 0, one.column))
        super().__init__(self.problems)

    def __str__(self) -> str:
        """One line a problem."""
        return "\n".join(map(str, self.problems))


def print_problems(problems: Iterable[Problem]) -> None:
    """The table of `render_problems`, on stderr; wide enough to read where there is no terminal to ask."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=_WIDTH)
    console.print(render_problems(problems))


def render_problems(problems: Iterable[Problem]) -> Table:
    """The problems as a table for `rich`; alike ones share a line: some of their rows, and how many more."""
    groups: dict[tuple[str, str, str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.file, problem.column, problem.message, problem.mend].append(problem)
    count = sum(map(len, groups.values()))
    table = Table(title=f"{count} problem{'s' if count > 1 else ''}", title_justify="left", show_lines=True)
    for heading in ("file", "column", "row: value", "expected", "how to mend"):
        table.add_column(heading, overflow="fold")
    for (file, column, message, mend), alike in groups.items():
        lines = [
            ": ".join(part for part in (str(one.row or ""), _short(one.value)) if part)
            for one in alike[:_EXAMPLES]
        ]
        if len(alike) > _EXAMPLES:
            lines.append(f"and {len(alike) - _EXAMPLES:,} more")
        table.add_row(*(Text(_visible(text)) for text in (file, column, "\n".join(lines), message, mend)))
    return table


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _visible(text: str) -> str:
    """Text whose invisible characters show as escapes: none reaches the terminal."""
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)
