"""CSV files of any spreadsheet program, with the row numbers that the program shows."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from aplsmear.data.problems import DataSetError, Problem
from aplsmear.tables import unguarded
from aplsmear.words import misspelt

_DELIMITERS = (",", ";", "\t", "|")
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"", "utf-8"))
_OTHER_FILES = {  # first bytes -> what the file is
    b"PK\x03\x04": "an Excel or LibreOffice workbook, or a ZIP archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (.xls)",
    b"\x1f\x8b": "compressed by gzip",
    b"<": "a web page or XML",
    b"{\\rtf": "a text document (RTF)",
    b"%PDF": "a PDF",
    b"PAR1": "a Parquet file",
}
# Excel uses and hides it.
_SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?[ ,;\t]*(?:\r\n?|\n|$)', re.IGNORECASE)
_AS_TEXT = re.compile(r'="([^"]*)"')  # ="0012" in a spreadsheet: text, although it looks like a number
_LARGEST = 10**9  # bytes; a million cells take 150 MB
_SAME_FILE = 0.93  # of 1; likeness of labeledcells and labelledcells: 0.96, and labeledcellsold: 0.89
_AGAIN = "export the table again, as CSV UTF-8"


def read_csv(
    path: Path, wanted: Mapping[str, bool | str] | None, problems: list[Problem], remarks: list[str]
) -> pd.DataFrame | None:
    """Columns of a CSV file as text, without spaces at the ends and without a ``'`` before a formula.

    Accepted: comma, semicolon, tab or ``|``, also named in a first line ``sep=;``; any line ends; UTF-8 with
    and without a byte-order mark, UTF-16 with one, Windows-1252 (with a remark); ``="0012"``; empty rows;
    other columns. Everything else is reported.

    Args:
        path: the file.
        wanted: the columns to read, and whether each is required (a name: unless this column is there);
            None: all columns.
        problems: new problems are appended.
        remarks: new remarks are appended.

    Returns:
        The wanted columns that are there; the index is the row number that a spreadsheet shows. The titles of
        other columns are in ``attrs["unread"]``. None if the file cannot be read or lacks a required column.
        Rows with too few or too many fields are reported and left out.
    """
    file, text = path.name, _text(path, problems, remarks)
    if text is None:
        return None
    places: dict[str, int] | None = None
    header: list[str] = []
    width = number = 0
    rows: dict[int, list[str]] = {}
    try:
        for number, record in enumerate(_reader(text), start=1):
            if not any(field.strip() for field in record):
                continue
            if places is None:
                header = list(filter(None, map(_title, record)))
                columns = dict.fromkeys(header, False) if wanted is None else wanted
                width, places = len(record), _places(file, number, record, columns, problems)
                if places is None:
                    return None
            elif len(record) < width or any(field.strip() for field in record[width:]):
                fix = 'put text that contains the delimiter in quotes, such as "[1, 2, 3, 4]"'
                expected, value = f"{width} fields, as in the header", f"{len(record)} fields"
                problems.append(Problem(file, number, "", value, expected=expected, fix=fix))
            else:
                rows[number] = [_plain(record[place].strip()) for place in places.values()]
    except csv.Error as error:
        fix = f'look for a stray " in this row, or {_AGAIN}'
        problems.append(Problem(file, number + 1, expected=f"fields with closed quotes ({error})", fix=fix))
        return None
    if places is None or not (rows or problems):
        there = "it is empty" if places is None else "below the header there is none"
        expected = f"a header, and a row for each item; {there}"
        problems.append(Problem(file, expected=expected, fix=f"{_AGAIN}, or remove the file"))
        return None
    index = pd.Index(list(rows), dtype=np.int64)
    table = pd.DataFrame(list(rows.values()), columns=list(places), index=index, dtype=object)
    table.attrs["unread"] = [title for title in header if title not in places]
    return table


def read_all(path: Path, wanted: Mapping[str, bool | str] | None = None) -> pd.DataFrame:
    """As `read_csv`; DataSetError with all problems of the file."""
    problems: list[Problem] = []
    table = read_csv(path, wanted, problems, [])
    if table is None or problems:
        raise DataSetError(problems)
    return table


def is_there(path: Path, problems: list[Problem]) -> bool:
    """Whether a table that may be absent is there; a file with nearly its name is a problem."""
    found = os.path.lexists(path)  # a link whose file is missing is there, and cannot be read
    if not found and (other := _meant(path)):
        expected, fix = f"the name {path.name}", "rename it, or move it out of the folder"
        problems.append(Problem(other, expected=expected, fix=fix))
    return found


def _meant(path: Path) -> str:
    """The file beside it that was probably meant to have this name: Wsi.csv, wsi (1).csv; '' if none."""
    names = sorted(each.name for each in path.parent.iterdir() if each.is_file())
    cores = {re.sub(r"copy|kopie|[\W\d_]", "", name.casefold().split(".")[0]): name for name in names}
    return cores.get(misspelt(re.sub(r"[\W_]", "", path.stem), cores, _SAME_FILE) or "", "")


def _reader(text: str) -> Iterator[list[str]]:
    """The records of a CSV file; a line that only names the delimiter is no record."""
    head = next((line for line in re.split(r"[\r\n]+", text) if line.strip()), "")
    delimiter = max(_DELIMITERS, key=head.count)
    if named := _SEPARATOR_LINE.match(text):
        delimiter, text = named[1], text[named.end() :]
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def _plain(field: str) -> str:
    as_text = _AS_TEXT.fullmatch(field)
    return (as_text[1] if as_text else unguarded(field)).strip()


def _text(path: Path, problems: list[Problem], remarks: list[str]) -> str | None:
    try:
        if path.exists() and not path.is_file():  # reading a device or a pipe may never end
            raise OSError(errno.EINVAL, "not a file")
        if path.stat().st_size > _LARGEST:
            raise OSError(errno.EFBIG, f"more than {_LARGEST // 10**6:,} MB")
        data = path.read_bytes() if path.stat().st_size else b""  # reading a file of /proc may never end
    except OSError as error:
        expected = f"a file that can be read ({error.strerror or type(error).__name__})"
        fix = "put the file there, or correct its permissions (`ls -l` shows them)"
        problems.append(Problem(path.name, expected=expected, fix=fix))
        return None
    other = next((what for start, what in _OTHER_FILES.items() if data.startswith(start)), None)
    if other:
        problems.append(Problem(path.name, expected=f"a CSV file; it is {other}", fix=_AGAIN))
        return None
    encoding = next(name for mark, name in _MARKS if data.startswith(mark))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
        remarks.append(
            f"{path.name} is not UTF-8: read as Windows-1252. If letters such as ä and é are wrong, {_AGAIN}"
        )
    text = text.lstrip("\ufeff")  # programs that write a second byte-order mark
    if "\0" in text:
        problems.append(Problem(path.name, expected="text; the file contains zero bytes", fix=_AGAIN))
        return None
    return text


def _places(
    file: str, row: int, header: list[str], wanted: Mapping[str, bool | str], problems: list[Problem]
) -> dict[str, int] | None:
    """Position of each wanted column; None if one is missing, has another name, or is there twice."""
    titles = list(map(_title, header))
    others = [title for title in titles if title and title not in wanted]
    missing = [title for title, needed in wanted.items() if needed and not {title, needed} & set(titles)]
    wrong = []
    for title, count in Counter(titles).items():
        if count > 1 and title in wanted:
            wrong.append((title, "each column once in the header", "rename or delete one of the two columns"))
    for title in missing:
        meant = misspelt(title, others)
        fix = f"rename the column {meant!r}" if meant else "add the column (see docs/data-format.md)"
        wrong.append((title, f"a column {title} in the header", fix))
    for meant in [title for title in wanted if title not in (*titles, *missing)]:
        fix = "rename it; if it is another thing, delete it"
        same = [title for title in others if _core(title) == _core(meant)]
        wrong += [(title, f"the name {meant} for this column", fix) for title in same]
    problems += [Problem(file, row, title, expected=expected, fix=fix) for title, expected, fix in wrong]
    return None if wrong else {title: titles.index(title) for title in wanted if title in titles}


def _title(field: str) -> str:
    """A field of the header as it is seen, without blanks at its ends and invisible characters."""
    return " ".join("".join(one for one in field if unicodedata.category(one) != "Cf").split())


def _core(title: str) -> str:
    """The title of a column without capitals, signs and words such as ID: Patient-ID, patients -> patient."""
    text = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", title).casefold()))
    ends = re.match("(?:di|s|on|rn|mun|rebmun|eman|edoc)*(?=.)", text[::-1])  # backwards: time grows linearly
    return text[: -ends.end()] if ends and ends.end() else text
