"""Read a page with a parser, and open it in a browser without a network."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<script>alert("x")</script>&'


class Reader(HTMLParser):
    """Collects tags with their attributes and texts, and checks that every element is closed."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, name, attributes) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name) -> None:
        assert self.open.pop() == name

    def handle_data(self, text) -> None:
        self.texts.append(text)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no browser: `apt-get install chromium` installs one"
)
BARE = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
BARE += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]


def browse(folder: Path, *arguments: str) -> str:
    """What a headless browser prints; its profile lies in the folder."""
    command = [CHROMIUM, *BARE, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
