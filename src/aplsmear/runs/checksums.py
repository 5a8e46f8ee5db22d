"""Whether files are what they were when DVC took note of them: a disk that fails changes bits in silence.

DVC itself looks at size, time and inode, and reads a file again only where one of these has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

DIRECTORY = ".dir"  # how the hash of a folder ends


def md5(path: Path) -> str:
    """MD5 of a file, as DVC has it, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def md5_of_folder(path: Path) -> str:
    """The hash that DVC gives a folder: that of a list of its files."""
    files = sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())
    listed = [{"md5": md5(path / name), "relpath": name} for name in files]
    written = json.dumps(listed, sort_keys=True).encode()
    return hashlib.md5(written, usedforsecurity=False).hexdigest() + DIRECTORY


def is_sound(path: Path, expected: str) -> bool:
    """Whether a file or folder has this hash."""
    return expected == (md5_of_folder(path) if expected.endswith(DIRECTORY) else md5(path))


def unsound(outs: Mapping[str, str], folder: Path) -> Iterator[str]:
    """The outs that are there and are not what they were.

    Args:
        outs: path -> hash, as dvc.lock has them.
        folder: where the paths start.
    """
    for path, expected in outs.items():
        if (folder / path).exists() and not is_sound(folder / path, expected):
            yield path


def unsound_objects(store: Path) -> Iterator[Path]:
    """The files of a cache of DVC whose content is not what their name says.

    Args:
        store: the folder ``files/md5`` of the cache.
    """
    for path in sorted(store.glob("[0-9a-f][0-9a-f]/*")):
        name = path.parent.name + path.name.removesuffix(DIRECTORY)
        if len(name) == 32 and path.is_file() and md5(path) != name:
            yield path
