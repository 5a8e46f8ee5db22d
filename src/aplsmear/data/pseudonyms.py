"""Names of patients, smears, cells and pictures replaced by keyed hashes.

A pseudonym is HMAC-SHA256 (RFC 2104) of a name under a secret key: whoever has the key and the data set can
tell which is whose, anybody else can neither turn it back nor try out names, as they could with a bare hash.
The key is in no parameter and no out.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from aplsmear.errors import UserError

KEY_VARIABLE, KEY_FILE = "APLSMEAR_PSEUDONYM_KEY", ".pseudonym-key"
SHORTEST = 16  # characters of a key
_DIGITS = (
    20  # hexadecimal: 80 bits, so that two of a billion names are alike with a chance of one in two million
)

_HOW = (
    f"make one in the repository's folder by `python -c 'import secrets; print(secrets.token_hex(32))' > "
    f"{KEY_FILE}` (git does not see it), and keep a copy in a safe place: another key gives other names"
)


class PseudonymError(UserError):
    """There is no usable key, or it is not the one that was used before."""


class Pseudonyms:
    """Names under one key."""

    def __init__(self, key: str) -> None:
        """Take a key, of `read_key`."""
        self._key = key.encode()

    def of(self, kind: str, name: str) -> str:
        """The pseudonym of a name; nothing for nothing.

        Args:
            kind: ``patient``, ``smear``, ``cell`` or ``image``; its first letter starts the pseudonym.
            name: as the data set has it.
        """
        digest = hmac.new(self._key, f"{kind}\0{name}".encode(), "sha256").hexdigest()
        return f"{kind[0]}{digest[:_DIGITS]}" if name else ""

    def files(self, root: Path, wanted: Collection[str]) -> dict[str, str]:
        """Which file is meant by each pseudonym of a picture.

        Args:
            root: of the data set.
            wanted: pseudonyms, as ``dataset/smears.csv`` has them.

        Returns:
            Pseudonym -> path below `root`.

        Raises:
            PseudonymError: some have none: the key or the pictures are others than before.
        """
        found: dict[str, str] = {}
        for place, _, names in os.walk(root, followlinks=True):
            paths = ((Path(place) / name).relative_to(root).as_posix() for name in names)
            found |= {self.of("image", path): path for path in paths}
        lost = [name for name in wanted if name not in found]
        if lost:
            raise PseudonymError(
                f"{len(lost)} of {len(wanted)} pictures of dataset/smears.csv are not found by their "
                f"pseudonyms: they were renamed, or the key ({KEY_VARIABLE} or {KEY_FILE}) is not the one "
                "that the stage `download` had. Give that key again, or run `dvc repro --force download`"
            )
        return {name: found[name] for name in wanted}


def read_key(environment: Mapping[str, str], folder: Path) -> str:
    """The key: what the environment gives as `KEY_VARIABLE`, else what `KEY_FILE` in this folder holds.

    Raises:
        PseudonymError: there is none, or it is too short to be secret.
    """
    file = folder / KEY_FILE
    source, key = KEY_VARIABLE, environment.get(KEY_VARIABLE, "").strip()
    if not key:
        source = str(file)
        try:
            key = file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise PseudonymError(
                f"dataset.pseudonymise needs a key, and there is neither {KEY_VARIABLE} nor {file}: {_HOW}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise PseudonymError(
                f"the key in {file} cannot be read ({type(error).__name__}): {_HOW}"
            ) from None
    if len(key) < SHORTEST:
        raise PseudonymError(f"the key of {source} has {len(key)} characters, fewer than {SHORTEST}: {_HOW}")
    return key
