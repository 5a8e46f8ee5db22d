"""Names that may mean the same patient or site, and the file in which a user says that they do not.

If one patient has two names, both sides of a split can hold this patient. So names that a person could take
for each other are a problem, until the user makes them one, or says in `DISTINCT_FILE` that they are two.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath

import pandas as pd
from confusable_homoglyphs.confusables import is_confusable

from aplsmear.data.csvfile import is_there, read_csv
from aplsmear.data.labels import tidy
from aplsmear.data.problems import Problem
from aplsmear.data.schema import CELL_FOLDER, IMAGE_FOLDER

DISTINCT_FILE = "distinct.csv"
KINDS = ("patient", "site", "image", "boxes")

_SAME_ON_SCREEN = str.maketrans("OoIl|", "00111")  # as in Unicode's table of confusable characters (UTS 39)
_PARTS = re.compile(r"(?a)(\d+)|([^\d\s_.,:;/\\'\"()\[\]{}#&~-]+)")
_NUMBER = re.compile(r"(?a)[+-]?\d+(?:[.,]\d+)?(?:E[+-]?\d{1,3})?", re.IGNORECASE)
_GROUPED = re.compile(r"(?a)\d{1,3}([.,' ]\d{3})+")  # 1,200 or 1.200 for 1200
_EXACT = Context(prec=50)
_LONGEST_NUMBER = 40  # characters
_DIGITS = 15  # that a spreadsheet keeps of a number; zeros replace the others
_SPELT_OUT = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "æ": "ae", "ø": "oe", "œ": "oe"})
_MONTH = "jan|feb|m[aä]?rz?|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz]"
_CHANGED = {  # form of a name -> what a program, often a spreadsheet, has done
    r"(?a)\d(?:[.,]\d+)?E[+-]\d{2,3}": "rounded this number, and perhaps others to the same one",
    r"(?a)\d{15}0+(?:\.0+)?": "rounded this number, and perhaps others to the same one",
    r"(?a)#(?:N/A|REF!|VALUE!|NAME\?|DIV/0!|NUM!|NULL!|NV|WERT!|BEZUG!)": "put an error in its place",
    r".*\ufffd.*": "lost a letter",
    r"#{2,}": "shown signs, because its column was too narrow",
    r"nan|none|null|n/a|<na>|unknown|\?+": "put a word in an empty field, so that many patients become one",
    r"(?a)\d{4}-\d\d-\d\d 00:00:00": "made a date of the name",
    rf"(?a)\d{{1,2}}[-. /]+(?:{_MONTH})\.?|(?:{_MONTH})\.?[-. /]+\d{{2}}": "made a date of the name",
}


@dataclass(frozen=True)
class Distinct:
    """The rows of `DISTINCT_FILE`: names that are right, although they look alike or changed."""

    pairs: frozenset[tuple[str, frozenset[str]]] = frozenset()

    def declares(self, kind: str, *names: str) -> bool:
        """Whether a row says that two names (or their pseudonyms) mean two, or that one name is right."""
        return (kind, frozenset(names)) in self.pairs

    def has(self, kind: str, name: str) -> bool:
        """Whether any row has this name."""
        return any(kind == one and name in names for one, names in self.pairs)


def read_distinct(root: Path, hide: Callable[[str, str], str], problems: list[Problem]) -> Distinct:
    """Read `DISTINCT_FILE` in the folder of a data set; without this file, nothing is declared.

    The rows may have names or pseudonyms, which `hide` returns for a kind and a name. New problems are
    appended to `problems`.
    """
    table = None
    if is_there(root / DISTINCT_FILE, problems):
        table = read_csv(root / DISTINCT_FILE, {"what": True, "name": True, "other": True}, problems, [])
    if table is None:
        return Distinct()
    pairs = set()
    for row, (what, name, other) in zip(table.index, table.to_numpy(), strict=True):
        if what not in KINDS:
            expected, fix = f"one of {', '.join(KINDS)}", "correct the word, or delete the row"
            problems.append(Problem(DISTINCT_FILE, row, "what", what, expected=expected, fix=fix))
            continue
        both = frozenset(tidy(text) for text in (name, other) if text)
        pairs.add((what, both))
        for folder in (IMAGE_FOLDER, CELL_FOLDER) if what == "image" else ():
            full = frozenset(image_path(each, folder) for each in both)
            pairs |= {(what, full), (what, frozenset(hide(what, each) for each in full))}
        pairs.add((what, frozenset(hide(what, each) for each in both)))
    return Distinct(frozenset(pairs))


def image_path(name: str, folder: str = IMAGE_FOLDER) -> str:
    """The path of a picture, named as in its table, below the folder of its data set."""
    return str(PurePosixPath(folder, name.replace("\\", "/")))


def declaration(kind: str, name: str, other: str = "") -> str:
    """What a user can do if two names, or one strange name, are right."""
    two = "they show different smears" if kind == "image" else f"they are two {kind}s"
    right = two if other else "it is right"
    return f"if {right}, add the row `{kind},{name},{other}` to {DISTINCT_FILE} (see docs/data-format.md)"


def name_problems(
    file: str, kind: str, names: pd.Series, hide: Callable[[str, str], str], distinct: Distinct
) -> list[Problem]:
    """Names of one kind that may mean the same as another one, or that a spreadsheet has changed.

    `file` is the table; `kind`, ``patient`` or ``site``, is also the name of the column. `names` are tidied;
    their index is the row number. `hide` gives the text that a message may show for a kind and a name.
    `distinct` is what the user has declared.
    """
    rows = {name: row for row, name in zip(names.index[::-1], names.iloc[::-1], strict=True)}
    found = []
    for name in changed_names(names):
        shown = hide(kind, name)
        if distinct.declares(kind, shown):
            continue
        expected = f"the name of a {kind} as it was: a program has {_change(name)}"
        fix = f"format the column as text and enter the names again, or, {declaration(kind, shown)}"
        found.append(Problem(file, rows[name], kind, shown, expected=expected, fix=fix))
    for first, second in look_alikes(
        names, lambda *pair: distinct.declares(kind, *(hide(kind, one) for one in pair))
    ):
        shown, other = hide(kind, second), hide(kind, first)
        letters = "" if shown != second else _strange_letters(first, second)
        expected = f"one name for one {kind}; {other!r} in row {rows[first]} looks the same{letters}"
        fix = f"write both in the same way, or, {declaration(kind, other, shown)}"
        found.append(Problem(file, rows[second], kind, shown, expected=expected, fix=fix))
    return found


def look_alikes(names: Iterable[str], declared: Callable[[str, str], bool]) -> list[tuple[str, str]]:
    """Pairs of different names that may mean the same.

    Names are alike if they differ only by capital letters, accents, width, letters or digits that look the
    same (Unicode's confusable characters), dashes and blanks, leading zeros, or the form of a number. Each
    name is returned with the first one, in alphabetical order, that it is like, if these two are not
    `declared` to mean two.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names) - {""}):
        for key in _keys(name):
            groups[key].append(name)
    pairs: set[tuple[str, str]] = set()
    for group in groups.values():
        for place, name in enumerate(group):
            first = next((other for other in islice(group, place) if not declared(other, name)), None)
            if first is not None:
                pairs.add((first, name))
    return sorted(pairs)


def changed_names(names: Iterable[str]) -> list[str]:
    """Names that a spreadsheet has rounded, made a date or replaced by an error.

    A spreadsheet keeps 15 digits of a number: 1234567890123456 and 1234567890123457 both become
    1234567890123460. Where another long number has digits after the 15th, one or two zeros are chance.
    """
    every = sorted(set(names))
    ends = {name: name.split(".")[0][_DIGITS:] for name in every if re.fullmatch(r"(?a)\d{16,}(\.0+)?", name)}
    by_chance = any(end.strip("0") for end in ends.values())
    return [name for name in every if _change(name) and not (by_chance and 0 < len(ends.get(name, "")) < 3)]


def _change(name: str) -> str:
    """What a program, often a spreadsheet, may have done to a name; '' if nothing."""
    done = (what for form, what in _CHANGED.items() if re.fullmatch(form, name, re.IGNORECASE))
    return next(done, "")


def _keys(name: str) -> set[str]:
    """Names that share a key look alike."""
    with suppress(UnicodeError):  # UTF-8 that was read as Windows-1252: MÃ¼ller
        name = name.encode("cp1252").decode("utf-8")
    text = "".join(map(_plain, unicodedata.normalize("NFKD", name)))
    typed = [number.lstrip("0") or part or "0" for number, part in _PARTS.findall(text.casefold())]
    seen = text.translate(_SAME_ON_SCREEN).casefold().replace("rn", "m")
    shown = [number or part for number, part in _PARTS.findall(seen)]
    keys = {f"typed {_joined(typed) or text}", f"shown {_joined(shown) or text}"}
    spelt = name.casefold().translate(_SPELT_OUT)
    if spelt != name.casefold():
        keys |= _keys(spelt)
    if _GROUPED.fullmatch(text):
        keys.add(f"number {_EXACT.normalize(Decimal(re.sub(r'[^0-9]', '', text[:_LONGEST_NUMBER])))}")
    if len(text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(text):
        keys.add(f"number {_EXACT.normalize(Decimal(text.replace(',', '.')))}")
    return keys


def _joined(parts: list[str]) -> str:
    """Numbers stay apart; other parts are joined: P-12 and P12 give the same, 1-12 and 11-2 do not."""
    return "".join(f" {part} " if part.isdigit() else part for part in parts)


@cache
def _plain(letter: str) -> str:
    """``-`` for a dash, the ASCII digit or letter that a letter looks like, '' for an accent."""
    category = unicodedata.category(letter)
    if letter.isascii():
        return letter
    if category in ("Mn", "Cf"):
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(letter))
    if category.startswith("P"):
        return "-"
    name = unicodedata.name(letter, "")
    if stroke := re.fullmatch("LATIN (CAPITAL|SMALL) LETTER ([A-Z]) WITH STROKE", name):
        return stroke[2] if stroke[1] == "CAPITAL" else stroke[2].lower()
    like = {one["c"] for found in is_confusable(letter) or () for one in found["homoglyphs"]}
    like |= {one["c"].lower() for found in is_confusable(letter.upper()) or () for one in found["homoglyphs"]}
    return min(like | {letter}, key=lambda each: (not each.isascii(), each))


def _strange_letters(*names: str) -> str:
    """The letters outside ASCII that only one of two names has, by their Unicode names."""
    letters = sorted(letter for letter in set(names[0]) ^ set(names[1]) if not letter.isascii())
    named = ", ".join(unicodedata.name(letter, f"U+{ord(letter):04X}") for letter in letters[:3])
    return f" (different: {named})" if named else ""
