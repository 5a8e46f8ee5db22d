"""What a reader of annotations returns, and the search for the pictures that annotations name."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import numpy as np
from pydantic import BaseModel, ValidationError

from aplsmear.errors import UserError, brief
from aplsmear.images.reading import ImageError, image_size, is_picture_name
from aplsmear.words import named, visible

Model = TypeVar("Model", bound=BaseModel)

CELL_LABELS = ("cellType", "specialCharacteristics", "objectType", "segmentationQuality")
ATTRIBUTES = ("id", *CELL_LABELS)  # of a cell, written by an export beside box and class
NO_TYPE = "Cell"  # class of a cell whose type is not known
_LARGEST = 10**9  # bytes of a file of annotations
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
    """One cell of a picture; class, patient and diagnosis as the annotation has them, '' if it has none."""

    picture: str  # path below the folder of the pictures, with `/`
    label: str  # the class
    box: tuple[float, float, float, float] | None = None  # y0, x0, y1, x1 in px, end exclusive; None: all
    attributes: Mapping[str, str] = {}  # `ATTRIBUTES` that an export wrote; labels joined by `|`
    patient: str = ""
    diagnosis: str = ""


@dataclass
class Found:
    """The annotations of a source."""

    what: str  # the source, for a message
    pictures: list[str] = field(default_factory=list)  # annotated ones, also without cells; as in `Cell`
    cells: list[Cell] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # what and why -> names


class Pictures:
    """The pictures of a folder and its subfolders, found by the names that annotations give them."""

    def __init__(self, root: Path) -> None:
        """List the folder, sorted (`every`); links to folders are not followed. Paths start at `root`."""
        self.root = root
        self.missing: list[str] = []  # names without a picture
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

        If several pictures have the name, the one counts that shares most folders with the reference, which
        starts at the folder `beside`. A name without a picture is added to `missing`.

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
        """Height and width in px; ExchangeError if the picture cannot be read."""
        if picture not in self._sizes:
            self._sizes[picture] = size_of(self.root / picture, picture)
        return self._sizes[picture]

    def check(self, source: Path) -> None:
        """Raise ExchangeError if the pictures of some annotations were not found."""
        if self.missing:
            raise ExchangeError(
                f"{source}: no picture below {self.root} has the name of {len(self.missing):,} annotations "
                f"({named(self.missing)}). Name the folder of the pictures with --images."
            )


def size_of(path: Path, name: str) -> tuple[int, int]:
    """Height and width of a picture in px; an ExchangeError with its `name` if it cannot be read."""
    try:
        return image_size(path)
    except ImageError as error:
        raise ExchangeError(f"{name}: {error.what}; {error.fix}.") from error


def _shared(one: PurePosixPath, other: PurePosixPath) -> int:
    """Number of folders, from the file upwards, that two paths have in common."""
    folders = [[part for part in path.parts[-2::-1] if part.lower() not in _FOLDERS] for path in (one, other)]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*folders, strict=False)))


def hull(points: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """The upright box y0, x0, y1, x1 around points x, y; shape (n, 2)."""
    across = np.asarray([point[:2] for point in points], dtype=np.float64)
    (x0, y0), (x1, y1) = across.min(axis=0).tolist(), across.max(axis=0).tolist()
    return y0, x0, y1, x1


def around(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    """The box y0, x0, y1, x1 of these sides around a centre."""
    return y - height / 2, x - width / 2, y + height / 2, x + width / 2


def text_of(path: Path) -> str:
    """The content of a file of annotations, UTF-8; ExchangeError if it cannot be read or is too large."""
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
    """The content of a JSON file; ExchangeError if it is none."""
    try:
        return json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is not valid JSON ({brief(error)}): export it again.") from error


def validated(model: type[Model], content: Any, path: Path) -> Model:
    """The content of a file as a model; an ExchangeError names the first place that does not fit."""
    try:
        return model.model_validate(content)
    except RecursionError as error:
        raise ExchangeError(f"{path} is nested too deep: export it again.") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise ExchangeError(f"{path}, {where}: {first['msg'].lower()}. Export it again.") from error
