"""Keys, tokens and passwords: they must not appear in output, files or logs."""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import TracebackType
from urllib.parse import unquote, urlsplit

HIDDEN = "***"
_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^\s/@]*:[^\s@]*(?=@)")  # user:password
_IN_QUERY = re.compile(r"(?<=[?&])([^\s=&]*(?:pass|secret|token|key)[^\s=&]*)=[^\s&]*", re.IGNORECASE)
_SHORTEST = 6  # characters; to hide a shorter text would hide common words


def without_secrets(text: str) -> str:
    """Replace passwords in URLs, and the values of environment variables that hold a secret, by ``***``."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _IN_QUERY.sub(rf"\1={HIDDEN}", _IN_URL.sub(HIDDEN, text))


def holds_password(url: str) -> bool:
    """Whether a URL has a password, before its host or in its query."""
    return urlsplit(url).password is not None or _IN_QUERY.search(url) is not None


def hide_in_tracebacks() -> None:
    """Replace secrets in all tracebacks that this process prints from now on."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = traceback.format_exception(kind, error, trace)
        print(without_secrets("".join(lines)), end="", file=sys.stderr)

    sys.excepthook = show


def _secrets() -> set[str]:
    """Secrets in the environment: values of variables that are named so, and passwords in URLs."""
    found = set()
    for name, value in os.environ.items():
        if _NAMES.search(name) and not os.path.exists(value):  # noqa: PTH110 (the path of a key is no secret)
            found.add(value)
        if "://" in value:
            try:
                password = urlsplit(value).password
            except ValueError:  # not a URL
                password = None
            found |= {password, unquote(password)} if password else set()
    return {each for each in found if len(each) >= _SHORTEST}
