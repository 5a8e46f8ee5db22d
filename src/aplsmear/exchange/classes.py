"""The names of classes of other data sets and programs, and what they are in this layout.

The table classes.csv of this room has a row for each name. A class that neither it nor the user's own table
has is unknown: it is listed, and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from aplsmear.data.csvfile import read_all
from aplsmear.exchange.found import ExchangeError
from aplsmear.tables import SEPARATOR
from aplsmear.words import named

DIAGNOSES = {  # as other data sets write a diagnosis -> the labels of this layout
    "healthy": "{'healthy'}", "control": "{'healthy'}", "normal": "{'healthy'}", "aml": "{'aml'}",
    "apl": "{'aml', 'm3'}", "pmlrara": "{'aml', 'm3'}", "npm1": "{'aml'}", "cbfbmyh11": "{'aml'}",
    "runx1runx1t1": "{'aml'}", "scd": "{'healthy'}",
}  # fmt: skip
_COLUMNS = ("class", "cellType", "specialCharacteristics", "objectType")


class Meaning(NamedTuple):
    """The labels of a class in the columns of labeled_cells.csv, several joined by ``|``; '' for none."""

    cellType: str
    specialCharacteristics: str = ""
    objectType: str = "Cell"


def plain(name: str) -> str:
    """A name without capital letters, blanks and signs, in the singular: smudgecell for ``Smudge_cells``."""
    letters = re.sub(r"[\W_]+", "", name.casefold())
    return letters[:-1] if letters.endswith("s") and len(letters) > 4 else letters


def known_classes(own: Path | None = None) -> dict[str, Meaning]:
    """Plain name -> labels: of the table of this room, and above it of the user's own table.

    Raises:
        ExchangeError: the user's table lacks the column class or cellType.
    """
    with as_file(files("aplsmear.exchange") / "classes.csv") as path:
        tables = [path, *([own] if own else [])]
        return {name: meaning for each in tables for name, meaning in _rows(each).items()}


def _rows(path: Path) -> dict[str, Meaning]:
    table = read_all(path)
    if not {"class", "cellType"} <= set(table.columns):
        raise ExchangeError(
            f"{path} needs the columns class and cellType; it has {named(table.columns, 12)}."
        )
    table = table.reindex(columns=list(_COLUMNS), fill_value="")
    return {
        plain(name): Meaning(kind, special, what or "Cell") for name, kind, special, what in table.to_numpy()
    }


def meaning_of(label: str, known: Mapping[str, Meaning]) -> Meaning | None:
    """The labels of a class; None if it is unknown. Several classes joined by ``|`` are all looked up."""
    if not label:
        return Meaning("")
    if plain(label) in known:
        return known[plain(label)]
    parts = [known.get(plain(part)) for part in label.split(SEPARATOR)]
    if len(parts) == 1 or None in parts:
        return None
    fields = zip(*(part for part in parts if part), strict=True)
    return Meaning(*(SEPARATOR.join(sorted(set(filter(None, field)))) for field in fields))


def literal(labels: str) -> str:
    """Labels joined by ``|`` as a set literal: ``{'Auer rods', 'Faggot cell'}``; '' for none."""
    return f"{{{', '.join(map(repr, sorted(labels.split(SEPARATOR))))}}}" if labels else ""


def diagnosis_literal(text: str) -> str | None:
    """A diagnosis as labels of this layout; None if it is unknown. A set literal stays as it is."""
    if not text or text.startswith("{"):
        return text
    return DIAGNOSES.get(re.sub(r"[\W_]+", "", text.casefold()))
