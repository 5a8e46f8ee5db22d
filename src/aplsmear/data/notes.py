"""Problems and parts of the report, gathered while a data set is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from aplsmear.data.names import Distinct
from aplsmear.data.problems import Problem, problems_in


@dataclass
class Notes:
    """Problems, and parts of the report."""

    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    unknown_labels: dict[str, dict[str, int]] = field(default_factory=dict)
    distinct: Distinct = field(default_factory=Distinct)

    def add(self, file: str, column: str, values: pd.Series, expected: str, fix: str) -> None:
        """Add `problems_in` these fields."""
        self.problems += problems_in(file, column, values, expected, fix)


def listed(ids: Iterable[str]) -> dict[str, Any]:
    """Number of ids, and the ids in order, as the report has them."""
    found = sorted_ids(ids)
    return {"count": len(found), "ids": found}


def sorted_ids(ids: Iterable[str]) -> list[str]:
    """Ids sorted by number if all are whole numbers, else as text."""
    listed = list(ids)
    if all(re.fullmatch(r"[0-9]{1,18}", one) for one in listed):
        return sorted(listed, key=lambda one: (int(one), one))
    return sorted(listed)
