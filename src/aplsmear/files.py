"""Files that are whole or not there, arrays on disk, and locks."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import numpy as np


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
