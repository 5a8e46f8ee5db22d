"""What a reader of annotations returns, and the search for the pictures that annotations name."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import numpy as np
from pydantic import BaseModel, ValidationError

from aplsmear.errors import UserError, brief
from aplsmear.images.reading import ImageError, image_size, is_picture_name

Model = TypeVar("Model", bound=BaseModel)

CELL_LABELS = ("cellType", "specialCharacteristics", "objectType", "segmentationQuality")
ATTRIBUTES = ("id", *CELL_LABELS)  # of a cell, written by an export beside box and class
NO_TYPE = "Cell"  # class of a cell whose type is not known
_LARGEST = 10**9  # bytes of a file of annotations
_NAMED = 5  # names in one message
_LONGEST = 120  # characters of one name
_FOLDERS = {"images", "labels", "annotations", "imgs", "label", "image"}  # tell nothing about a picture
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio writes it before the names of uploaded files


class ExchangeError(UserError):
    """Annotations cannot be read or written; the message says why, and what to do."""

    def __init__(self, message: str) -> None:
        """Names from files may hold invisible characters, which do not reach the terminal."""
        super().__init__(visible(message))


def exported_class(labels: Mapping[str, str]) -> str:
    """The class that an export gives a cell with these labels, by column."""
    return labels["cellType"] or labels["objectType"] or NO_TYPE


class Cell(NamedTuple):
    """One cell of a picture.

    Attributes:
        picture: path below the folder of the pictures, with ``/``.
        label: the class as the annotation has it; '' if it has none.
        box: y0, x0, y1, x1 in px, end exclusive; None if the whole picture is the cell.
        attributes: columns of labeled_cells.csv that an export of this program wrote beside box and class:
            the id and labels, joined by ``|``.
        patient: as the annotation has it.
        diagnosis: as the annotation has it.
    """

    picture: str
    label: str
    box: tuple[float, float, float, float] | None = None
    attributes: Mapping[str, str] = {}
    patient: str = ""
    diagnosis: str = ""


@dataclass
class Found:
    """The annotations of a source.

    Attributes:
        what: what the source is, for a message.
        pictures: those that the annotations name, with and without cells; relative to the picture folder.
        cells: all cells.
        left_out: what was left out and why -> names.
    """

    what: str
    pictures: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


class Pictures:
    """The pictures of a folder and its subfolders, found by the names that annotations give them.

    Attributes:
        root: the folder; all paths are relative to it.
        every: the paths of all pictures, sorted.
        missing: names without a picture.
    """

    def __init__(self, root: Path) -> None:
        """List the folder; links to folders are not followed."""
        self.root = root
        self.missing: list[str] = []
        self._sizes: dict[str, tuple[int, int]] = {}
        files = (path for path in sorted(root.rglob("*")) if is_picture_name(path.name) and path.is_file())
        self.every = [path.relative_to(root).as_posix() for path in files]
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for each in self.every:
            name = PurePosixPath(each)
            for key in {name.name, name.stem}:
                self._by_name[key].append(each)

    def find(self, reference: str, beside: Path = Path()) -> str | None:
        """The picture that a name, a path, an address or the path of its annotation means.

        If several pictures have the name, the one counts that shares most folders with the reference. A name
        without a picture is added to `missing`.

        Args:
            reference: the name, path or address.
            beside: the folder of the annotations, which a relative path starts at.

        Raises:
            ExchangeError: several pictures fit equally well.
        """
        text = unquote(reference).replace("\\", "/").rpartition("?d=")[2]
        path = PurePosixPath(beside.as_posix(), text)
        names = [path.name, path.stem, _UPLOADED.sub("", path.name)]
        fitting = next((self._by_name[one] for one in names if one in self._by_name), [])
        if not fitting:
            self.missing.append(reference)
            return None
        shared = [_shared(path, PurePosixPath(each)) for each in fitting]
        best = [each for each, count in zip(fitting, shared, strict=True) if count == max(shared)]
        if len(best) > 1:
            raise ExchangeError(
                f"{named([reference])} can mean {named(best)}: rename one, or name the folder with --images."
            )
        return best[0]

    def size(self, picture: str) -> tuple[int, int]:
        """Height and width in px.

        Raises:
            ExchangeError: the picture cannot be read.
        """
        if picture not in self._sizes:
            try:
                self._sizes[picture] = image_size(self.root / picture)
            except ImageError as error:
                raise ExchangeError(f"{picture}: {error.what}; {error.fix}.") from error
        return self._sizes[picture]

    def check(self, source: Path) -> None:
        """Raise ExchangeError if the pictures of some annotations were not found."""
        if self.missing:
            raise ExchangeError(
                f"{source}: no picture below {self.root} has the name of {len(self.missing):,} annotations "
                f"({named(self.missing)}). Name the folder of the pictures with --images."
            )


def _shared(one: PurePosixPath, other: PurePosixPath) -> int:
    """Number of folders, from the file upwards, that two paths have in common."""
    count = 0
    for a, b in zip(_folders(one), _folders(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def _folders(path: PurePosixPath) -> list[str]:
    return [part for part in reversed(path.parts[:-1]) if part.lower() not in _FOLDERS]


def visible(text: str) -> str:
    """The text with invisible characters as escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def named(names: Iterable[object], count: int = _NAMED) -> str:
    """The first names, shortened, and how many more there are."""
    listed = [
        one if len(one) <= _LONGEST else f"{one[:_LONGEST]}..." for one in dict.fromkeys(map(str, names))
    ]
    more = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def hull(points: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """The upright box y0, x0, y1, x1 around points x, y; shape (n, 2)."""
    across = np.asarray([point[:2] for point in points], dtype=np.float64)
    (x0, y0), (x1, y1) = across.min(axis=0).tolist(), across.max(axis=0).tolist()
    return y0, x0, y1, x1


def around(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    """The box y0, x0, y1, x1 of these sides around a centre."""
    return y - height / 2, x - width / 2, y + height / 2, x + width / 2


def text_of(path: Path) -> str:
    """The content of a file of annotations, UTF-8.

    Raises:
        ExchangeError: it cannot be read, is too large, or is no text.
    """
    try:
        if not path.is_file():
            raise ExchangeError(f"{path} is no file.")
        if path.stat().st_size > _LARGEST:
            raise ExchangeError(f"{path} has more than {_LARGEST // 10**6:,} MB: divide it.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExchangeError(f"{path} is not UTF-8 text ({brief(error)}): save it again as UTF-8.") from error
    except OSError as error:
        raise ExchangeError(f"{path} cannot be read: {error.strerror}.") from error


def json_of(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ExchangeError: it is none.
    """
    try:
        return json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is not valid JSON ({brief(error)}): export it again.") from error


def validated(model: type[Model], content: Any, path: Path) -> Model:
    """The content of a file as a model.

    Raises:
        ExchangeError: it does not fit the model; the message names the first wrong place.
    """
    try:
        return model.model_validate(content)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise ExchangeError(f"{path} is nested too deep: export it again.") from error
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise ExchangeError(f"{path}, {where}: {first['msg'].lower()}. Export it again.") from error
