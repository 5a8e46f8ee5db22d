"""Damages a file as a failing disk does."""

import os
from pathlib import Path


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; its time of change stays the same."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(stat.st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
