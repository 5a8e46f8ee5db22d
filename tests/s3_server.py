"""A real S3 server on 127.0.0.1 that checks signatures: rclone's, over a folder that holds the buckets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

ID, SECRET = f"id-{token_hex(8)}", token_hex(20)  # found only where a program writes them
BUCKET = "lab"


@dataclass
class S3Server:
    """A server that runs in a `with` block; it can be killed and started again at the same address."""

    root: Path
    options: tuple[str, ...] = ()
    port: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __enter__(self) -> S3Server:
        (self.root / BUCKET).mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        log = self.root.with_name(f"{self.root.name}.log")
        program = Path(sys.executable).with_name("rclone")
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [program, "serve", "s3", str(self.root), f"--addr=127.0.0.1:{self.port}", *self.options],
                # not on the command line, which every user of the machine can read
                env=os.environ | {"RCLONE_AUTH_KEY": f'"{ID},{SECRET}"', "RCLONE_CONFIG": "/dev/null"},
                stderr=file,
            )
        for _ in range(600):
            if said := re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text(encoding="utf-8")):
                self.port = int(said[1])
                return
            assert self._process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        raise TimeoutError(log.read_text(encoding="utf-8"))

    def kill(self) -> None:
        """Kill the server at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def objects(self) -> list[Path]:
        """The files of all complete objects."""
        return [path for path in self.root.rglob("*") if path.is_file() and not path.name.startswith(".")]
