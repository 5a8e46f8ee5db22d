"""Files that are written completely or not at all, arrays on disk, and locks."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import numpy as np

from aplsmear.errors import UserError

_ROWS = 512  # of a mapped file read together: the system loads up to 64 kB around each


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to: it is renamed to `path` at the end of the block, or removed if the block fails.

    A process that is killed in the block leaves ``<name>.part``, which the next run overwrites. The folder of
    `path` is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def is_taken(path: Path) -> bool:
    """Whether this is a file, or a folder that holds something."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def refuse_taken(path: Path) -> None:
    """Raise a UserError if a file, or a folder that holds something, has this name."""
    if is_taken(path):
        what = " and is not empty" if path.is_dir() else ""
        raise UserError(f"{path} exists{what}, and nothing is overwritten: choose another name.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `folder` at the end of the block; after an error it stays.

    Raises:
        UserError: `folder` holds something, or a run that filled it was stopped.
    """
    refuse_taken(folder)
    part = folder.with_name(folder.name + ".part")
    if part.exists():
        raise UserError(f"{part} is there: a run was stopped. Delete it and try again.")
    yield part
    if folder.exists():
        folder.rmdir()
    part.rename(folder)


def copy_whole(source: Path, path: Path) -> None:
    """Copy the content of a file; see `whole`."""
    with whole(path) as part:
        shutil.copyfile(source, part)


def new_array(path: Path, kind: Any, shape: tuple[int, ...]) -> np.memmap:
    """A .npy file of zeros of a dtype (`kind`) to write to, mapped into memory.

    Its space on the disk is reserved at once. Otherwise a full disk would kill the process without a message.

    Raises:
        OSError: the disk is full.
    """
    array: np.memmap = np.lib.format.open_memmap(path, "w+", kind, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def write_rows(paths: Sequence[Path], count: int, chunks: Iterable[Sequence[np.ndarray]]) -> None:
    """Write .npy files of `count` rows that come in chunks, one array for each file: all files or none.

    Raises:
        ValueError: there are more or fewer rows.
        OSError: the disk is full.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(whole(path)) for path in paths]
        arrays: list[np.memmap] = []
        end = 0
        for chunk in chunks:
            if not arrays:
                each = zip(parts, chunk, strict=True)
                arrays = [new_array(part, rows.dtype, (count, *rows.shape[1:])) for part, rows in each]
            start, end = end, end + len(chunk[0])
            if end > count:
                break
            for array, rows in zip(arrays, chunk, strict=True):
                array[start:end] = rows
                give_back(array)
        if end != count:
            raise ValueError(f"{end} rows or more, not {count}")
        for array in arrays:
            array.flush()


def give_back(array: np.ndarray) -> None:
    """Free the memory of a mapped file; the content of the file does not change.

    Otherwise each page that was read or written counts as memory of this process.
    """
    if isinstance(array, np.memmap) and array.mode != "c" and isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def rows_of(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``array[rows]`` for int64 `rows` of any shape; memory of a mapped file is freed (`give_back`)."""
    if not isinstance(array, np.memmap):
        return np.asarray(array[rows])
    flat = rows.ravel()
    found = np.empty((len(flat), *array.shape[1:]), array.dtype)
    order = np.argsort(flat, kind="stable")
    for start in range(0, len(order), _ROWS):
        part = order[start : start + _ROWS]
        found[part] = array[flat[part]]
        give_back(array)
    return found.reshape(*rows.shape, *array.shape[1:])


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a .npz file of arrays of numbers or text, below 2 GiB each: the same bytes under every Python.

    `numpy.savez` writes 64-bit entries, whose bytes depend on the patch release of Python.
    """
    with whole(path) as part, ZipFile(part, "w") as bundle:
        for name, array in arrays.items():
            with io.BytesIO() as buffer:
                np.lib.format.write_array(buffer, np.asanyarray(array), allow_pickle=False)
                bundle.writestr(ZipInfo(f"{name}.npy"), buffer.getbuffer())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hold(path: Path) -> IO[Any]:
    """Wait for the lock of this name, and hold it until the file is closed or the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def round_floats(obj: Any, digits: int = 6) -> Any:
    """Copy nested dicts and lists for JSON, floats rounded to `digits` decimals: equal results, equal bytes.

    NumPy numbers and arrays become plain numbers and lists, tuples become lists.

    Raises:
        ValueError: numbers are NaN or infinite; the message names their keys (``auroc.low``).
        TypeError: JSON has no form for a value, or a key is not text.
    """
    infinite: list[str] = []

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        if isinstance(value, Mapping):
            for name in value:
                if not isinstance(name, str):
                    raise TypeError(f"the key {name!r} under {key or 'the top'} must be text")
            return {name: plain(item, f"{key}.{name}" if key else name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, float):
            if not math.isfinite(value):
                infinite.append(f"{key or 'the value'} is {value}")
            return round(value, digits) + 0.0  # no negative zero
        if value is None or isinstance(value, bool | int | str):
            return value
        raise TypeError(f"{key or 'the value'} is a {type(value).__name__}, which JSON cannot hold")

    result = plain(obj, "")
    if infinite:
        raise ValueError("numbers must be finite: " + "; ".join(infinite))
    return result


def write_json(path: Path, obj: Any, digits: int = 6) -> None:
    """Write `round_floats` of an object as JSON with sorted keys; see `whole`."""
    text = json.dumps(
        round_floats(obj, digits), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False
    )
    with whole(path) as part:
        part.write_text(text + "\n", encoding="utf-8", newline="\n")
