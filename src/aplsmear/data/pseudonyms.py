"""Pseudonyms for the names of patients, smears, cells and pictures: keyed hashes.

A pseudonym is the HMAC-SHA256 (RFC 2104) of a name under a secret key. With the key and the data set, names
can be found again. Without the key, nobody can compute a name from its pseudonym, nor test whether a guessed
name fits, which a hash without a key would allow. The key is in no parameter and in no out.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from aplsmear.errors import UserError

KEY_VARIABLE, KEY_FILE = "APLSMEAR_PSEUDONYM_KEY", ".pseudonym-key"
SHORTEST = 16  # characters of a key
_DIGITS = 20  # hexadecimal, 80 bits: among a billion names, two equal ones with probability 1 in 2 million

_HOW = (
    "make one in the folder of the repository by `python -c 'import secrets; print(secrets.token_hex(32))' > "
    f"{KEY_FILE}` (git ignores this file). Keep a copy in a safe place: another key gives other pseudonyms"
)


class Pseudonyms:
    """Pseudonyms under one key."""

    def __init__(self, key: str) -> None:
        """Take a key, as `read_key` returns it."""
        self._key = key.encode()

    def of(self, kind: str, name: str) -> str:
        """The pseudonym of a name of a ``patient``, ``smear``, ``cell`` or ``image``; '' for an empty name.

        It starts with the first letter of the kind.
        """
        digest = hmac.new(self._key, f"{kind}\0{name}".encode(), "sha256").hexdigest()
        return f"{kind[0]}{digest[:_DIGITS]}" if name else ""

    def files(self, root: Path, *tables: pd.DataFrame) -> dict[str, str]:
        """Pseudonym of a picture -> its path below `root`, the folder of the data set.

        Wanted are those in the column ``image`` of the tables of smears and cells that have one.

        Raises:
            UserError: a pseudonym belongs to no file: the key or the names of pictures have changed.
        """
        found: dict[str, str] = {}
        for place, _, names in os.walk(root, followlinks=True):
            paths = ((Path(place) / name).relative_to(root).as_posix() for name in names)
            found |= {self.of("image", path): path for path in paths}
        wanted = [name for table in tables for name in table.get("image", ()) if name]
        lost = [name for name in wanted if name not in found]
        if lost:
            raise UserError(
                f"{len(lost)} of {len(wanted)} pictures of the data set are not found by their "
                f"pseudonyms. They were renamed, or the key ({KEY_VARIABLE} or {KEY_FILE}) is not the one "
                "that the stage `download` used. Use that key again, or run `dvc repro --force download`"
            )
        return {name: found[name] for name in wanted}


def read_key(environment: Mapping[str, str], folder: Path) -> str:
    """The secret key: the environment variable `KEY_VARIABLE`, else the content of `KEY_FILE` in the folder.

    A UserError if there is no key, or it is too short to be secret.
    """
    file = folder / KEY_FILE
    source, key = KEY_VARIABLE, environment.get(KEY_VARIABLE, "").strip()
    if not key:
        source = str(file)
        try:
            key = file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise UserError(
                f"dataset.pseudonymise needs a key, but there is neither {KEY_VARIABLE} nor {file}: {_HOW}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            why = type(error).__name__
            raise UserError(f"the key in {file} cannot be read ({why}): {_HOW}") from None
    if len(key) < SHORTEST:
        raise UserError(f"the key in {source} has {len(key)} characters, fewer than {SHORTEST}: {_HOW}")
    return key
