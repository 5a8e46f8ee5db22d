"""CSV files as people's programs write them, with row numbers that people can find."""

from __future__ import annotations

import csv
import difflib
import errno
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from aplsmear.data.problems import Problem
from aplsmear.tables import unguarded

_DELIMITERS = (",", ";", "\t")
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"", "utf-8"))
_LARGEST = 10**9  # bytes; a million cells take 150 MB
_AGAIN = "export the table again, as CSV UTF-8"


def read_csv(
    path: Path, wanted: Mapping[str, bool], problems: list[Problem], remarks: list[str]
) -> pd.DataFrame | None:
    """Some columns of a CSV file, as text without spaces at its ends, nor a ``'`` against formulas in front.

    Handled: comma, semicolon or tab; any line ends; UTF-8 with and without a byte-order mark, UTF-16 with
    one, latin-1 (with a remark); empty rows; superfluous columns. Reported: everything else.

    Args:
        path: the file.
        wanted: the columns to read, and whether each is needed.
        problems: is added to.
        remarks: is added to.

    Returns:
        The wanted columns that are there; the index is the row number that a spreadsheet shows. None where
        the file cannot be read or lacks a needed column. Rows with too few or too many fields are reported
        and left out.
    """
    text = _text(path, problems, remarks)
    if text is None:
        return None
    head = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(_DELIMITERS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    places: dict[str, int] | None = None
    width = number = 0
    rows: list[list[str]] = []
    numbers: list[int] = []
    try:
        for number, record in enumerate(reader, start=1):
            if not any(field.strip() for field in record):
                continue
            if places is None:
                width, places = len(record), _places(path.name, number, record, wanted, problems)
                if places is None:
                    return None
            elif len(record) < width or any(field.strip() for field in record[width:]):
                problems.append(_ragged(path.name, number, len(record), width))
            else:
                rows.append([unguarded(record[place].strip()).strip() for place in places.values()])
                numbers.append(number)
    except csv.Error as error:
        expected = f"fields whose quotes are closed ({error})"
        problems.append(
            Problem(path.name, number + 1, "", "", expected, f'look for a stray " in this row, or {_AGAIN}')
        )
        return None
    if places is None or not (rows or problems):
        problems.append(Problem(path.name, None, "", "", "a header, and a row for each item", _AGAIN))
        return None
    return pd.DataFrame(rows, columns=list(places), index=pd.Index(numbers, dtype=np.int64), dtype=object)


def _text(path: Path, problems: list[Problem], remarks: list[str]) -> str | None:
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise OSError(errno.EINVAL, "not a file")
        if path.stat().st_size > _LARGEST:
            raise OSError(errno.EFBIG, f"more than {_LARGEST // 10**6:,} MB")
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        problems.append(
            Problem(
                path.name,
                None,
                "",
                "",
                f"a file that can be read ({reason})",
                "put it there, or check its rights",
            )
        )
        return None
    encoding = next(name for mark, name in _MARKS if data.startswith(mark))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("latin-1")
        remarks.append(f"{path.name} is not UTF-8: read as latin-1")
    if "\0" in text:
        problems.append(Problem(path.name, None, "", "", "text; the file holds zero bytes", _AGAIN))
        return None
    return text


def _places(
    file: str, row: int, header: list[str], wanted: Mapping[str, bool], problems: list[Problem]
) -> dict[str, int] | None:
    """Place of each wanted column; None where a needed one is missing or one is there twice."""
    titles = [title.strip() for title in header]
    doubled = [title for title, count in Counter(titles).items() if count > 1 and title in wanted]
    missing = [title for title, needed in wanted.items() if needed and title not in titles]
    for title in doubled:
        problems.append(
            Problem(file, row, title, "", "each column once in the header", "rename or remove one of the two")
        )
    for title in missing:
        folded = {one.casefold(): one for one in titles if one and one not in wanted}
        close = difflib.get_close_matches(title.casefold(), folded, n=1)
        mend = (
            f"rename the column {folded[close[0]]!r}"
            if close
            else "add it, see the README's section on own data"
        )
        problems.append(Problem(file, row, title, "", f"a column {title} in the header", mend))
    if doubled or missing:
        return None
    return {title: titles.index(title) for title in wanted if title in titles}


def _ragged(file: str, row: int, found: int, expected: int) -> Problem:
    return Problem(
        file, row, "", f"{found} fields", f"{expected} fields, as in the header",
        'put text that holds the delimiter in quotes, such as "[1, 2, 3, 4]"',
    )  # fmt: skip
