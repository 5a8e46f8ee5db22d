"""Files that are whole or not there, arrays on disk, and locks."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import numpy as np

_ROWS = 512  # of a mapped file looked at together: the system shows up to 64 kB around each


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well, and is removed when it does not.

    A process that is killed in the block leaves ``<name>.part`` behind, never `path`; the next run writes
    over it. The folder of `path` is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def copy_whole(source: Path, path: Path) -> None:
    """Copy the content of a file; see `whole`."""
    with whole(path) as part:
        shutil.copyfile(source, part)


def new_array(path: Path, kind: Any, shape: tuple[int, ...]) -> np.memmap:
    """A .npy file of zeros to write to, mapped into memory.

    Its place on the disk is taken at once: a map that finds the disk full kills the process without a word.

    Raises:
        OSError: the disk has no room for it.
    """
    array: np.memmap = np.lib.format.open_memmap(path, "w+", kind, shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def give_back(array: np.ndarray) -> None:
    """Let the system have the memory in which it shows us a mapped file; what the file holds does not change.

    Otherwise each page that was ever looked at, or written, counts as memory of this process.
    """
    if isinstance(array, np.memmap) and array.mode != "c" and isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def rows_of(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``array[rows]``, from a mapped file in its order and without keeping pages of it (`give_back`).

    Args:
        array: of any shape.
        rows: int64, of any shape.
    """
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
    """Write a .npz of named arrays, the same bytes from the same arrays under every Python.

    `numpy.savez` asks for entries of 64 bits, and what comes of that hangs on the patch release of Python.

    Args:
        path: of the file; see `whole`.
        arrays: below 2 GiB each, numbers or text.
    """
    with whole(path) as part, ZipFile(part, "w") as bundle:
        for name, array in arrays.items():
            with io.BytesIO() as buffer:
                np.lib.format.write_array(buffer, np.asanyarray(array), allow_pickle=False)
                bundle.writestr(ZipInfo(f"{name}.npy"), buffer.getbuffer())


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hold(path: Path) -> IO[Any]:
    """Wait until no other process holds the lock of this name, and hold it.

    Returns:
        The file that is the lock. It is free again when this is closed or the process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def round_floats(obj: Any, digits: int = 6) -> Any:
    """A copy of nested dicts and lists as JSON can hold them, floats rounded to ``digits`` decimals.

    NumPy numbers and arrays become plain ones and tuples lists, so that equal results give equal bytes.

    Raises:
        ValueError: NaN or infinite numbers, each named by its key (``auroc.low``).
        TypeError: a value JSON has no form for, or a key that is not text.
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
    """Write `round_floats` of ``obj`` with sorted keys; a reader finds the old file or the new one, whole."""
    text = json.dumps(
        round_floats(obj, digits), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False
    )
    with whole(path) as part:
        part.write_text(text + "\n", encoding="utf-8", newline="\n")
