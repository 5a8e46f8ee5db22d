"""Problems of a data set, in words for the person who keeps its tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aplsmear.errors import UserError
from aplsmear.words import visible

_EXAMPLES = 5  # rows named in one line of the table
_WIDTH = 160  # characters
_LONGEST = 80  # characters shown of one value


@dataclass(frozen=True)
class Problem:
    """One thing to correct before the data set can be used."""

    file: str  # path below the folder of the data set
    row: int | None = None  # its number in a spreadsheet (the header is row 1); None for the whole file
    column: str = ""  # '' for a whole row or file
    value: str = ""  # what the field contains
    expected: str = field(kw_only=True)  # what it should contain
    fix: str = field(kw_only=True)  # what to change or to type

    def __str__(self) -> str:
        """One line: file, row, column, value, what was expected, what to do."""
        row = f"row {self.row}" if self.row else ""
        value = repr(_short(self.value)) if self.value else ""
        where = ", ".join(part for part in (self.file, row, self.column, value) if part)
        return f"{where}: expected {self.expected}; {self.fix}"


def problems_in(file: str, column: str, values: pd.Series, expected: str, fix: str) -> list[Problem]:
    """A problem for each of `values`, which has the row numbers as its index."""
    return [
        Problem(file, row, column, value, expected=expected, fix=fix)
        for row, value in zip(values.index.tolist(), values.tolist(), strict=True)
    ]


class DataSetError(UserError, ValueError):
    """A data set cannot be used, for these problems."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        """Sort the problems by file (in the order of first problems), row and column."""
        listed = list(problems)
        files = list(dict.fromkeys(one.file for one in listed))
        self.problems = sorted(listed, key=lambda one: (files.index(one.file), one.row or 0, one.column))
        super().__init__(self.problems)

    def __str__(self) -> str:
        """One line for each problem."""
        return "\n".join(map(str, self.problems))


def print_problems(problems: Iterable[Problem]) -> None:
    """Print the table of `render_problems` on stderr; 160 characters wide where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=_WIDTH)
    console.print(render_problems(problems))


def render_problems(problems: Iterable[Problem]) -> Table:
    """The problems as a table of `rich`; equal problems share a line that names up to five of their rows."""
    groups: dict[tuple[str, str, str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.file, problem.column, problem.expected, problem.fix].append(problem)
    count = sum(map(len, groups.values()))
    table = Table(title=f"{count} problem{'s' if count > 1 else ''}", title_justify="left", show_lines=True)
    for heading in ("file", "column", "row: value", "expected", "what to do"):
        table.add_column(heading, overflow="fold")
    for (file, column, expected, fix), equal in groups.items():
        lines = [
            ": ".join(part for part in (str(one.row or ""), _short(one.value)) if part)
            for one in equal[:_EXAMPLES]
        ]
        if len(equal) > _EXAMPLES:
            lines.append(f"and {len(equal) - _EXAMPLES:,} more")
        table.add_row(
            *(Text(visible(text, "\n")) for text in (file, column, "\n".join(lines), expected, fix))
        )
    return table


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
