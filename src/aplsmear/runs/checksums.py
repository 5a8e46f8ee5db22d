"""Whether files still have the hashes that DVC noted: a failing disk changes bits without a message.

DVC itself compares size, time and inode, and reads a file again only if one of these has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

DIRECTORY = ".dir"  # the end of the hash of a folder


def md5(path: Path) -> str:
    """The MD5 of a file, as DVC computes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def md5_of_folder(path: Path) -> str:
    """The hash that DVC gives a folder: that of a list of its files and their MD5."""
    listed = [{"md5": md5(path / name), "relpath": name} for name in _names(path)]
    written = json.dumps(listed, sort_keys=True).encode()
    return hashlib.md5(written, usedforsecurity=False).hexdigest() + DIRECTORY


def is_sound(path: Path, expected: str) -> bool:
    """Whether a file or folder has this hash."""
    return expected == (md5_of_folder(path) if expected.endswith(DIRECTORY) else md5(path))


def unsound(outs: Mapping[str, str], record: Path, run: str) -> list[str]:
    """The outs (path -> hash, as in dvc.lock) that exist and do not have their hash.

    The file `record` gets the outs that were found sound in the run of this name. Those whose size, time and
    inode have not changed since are not read again in the same run. Without a name, everything is read, and
    nothing is recorded.
    """
    states = {path: _state(Path(path), expected) for path, expected in outs.items() if Path(path).exists()}
    kept = record.read_text(encoding="utf-8").splitlines() if run and record.is_file() else []
    known = set(kept) if kept[:1] == [run] else {run}
    found = [
        path for path, state in states.items() if state not in known and not is_sound(Path(path), outs[path])
    ]
    if run:
        sound = {state for path, state in states.items() if path not in found}
        record.write_text("\n".join([run, *sorted((known | sound) - {run})]) + "\n", encoding="utf-8")
    return found


def unsound_objects(store: Path) -> Iterator[Path]:
    """The files in ``files/md5`` of DVC's cache whose content does not have the hash in their name."""
    for path in sorted(store.glob("[0-9a-f][0-9a-f]/*")):
        name = path.parent.name + path.name.removesuffix(DIRECTORY)
        if len(name) == 32 and path.is_file() and md5(path) != name:
            yield path


def _names(folder: Path) -> list[str]:
    return sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file())


def _state(path: Path, expected: str) -> str:
    """A hash of path, expected hash, and size, time and inode of each file: in one line."""
    stats = [(name, (path / name).stat()) for name in (_names(path) if path.is_dir() else [""])]
    seen = [(name, each.st_size, each.st_mtime_ns, each.st_ino) for name, each in stats]
    return hashlib.sha256(repr((str(path), expected, seen)).encode()).hexdigest()
