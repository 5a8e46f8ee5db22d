"""Tests of the place where outs are shared.

A remote is tested as DVC uses it: write an object of a new name, read it, compare, delete it. The answers of
a store can hold keys, so none is passed on: a message names the error code alone, in words of this module.
"""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import requests

from aplsmear.errors import UserError

PATIENCE = 4.0  # s; how long to wait for one answer
SKEW = 15 * 60  # s; S3 refuses a request whose time differs by more
_NOTE = b"of `aplsmear share-check`; may be deleted\n"

# Error codes of S3, botocore and errno, with what they mean and how to fix it.
_DENIED = "AccessDenied AllAccessDisabled Forbidden 403 MethodNotAllowed 405"
_DISK_DENIED = "EACCES EPERM EROFS"
_SILENT = (
    "TimeoutError EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError 503 "
    "ServiceUnavailable ETIMEDOUT EHOSTDOWN ESTALE"
)
_RIGHTS = "no rights: neither reading nor writing is allowed"
_KEY = (
    "set the right key in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), or in this clone only: "
    "`dvc remote modify --local {name} access_key_id ID`, and the same for secret_access_key."
)
_CLOCK = (
    "clock skew: the clock of this machine is {how} the server's, so the server refuses its requests.",
    "set the clock (`timedatectl set-ntp true`), or ask the person who runs this machine.",
)
_MEANINGS = (
    ("RequestTimeTooSkewed", _CLOCK[0].replace("{how}", "too far from"), _CLOCK[1]),
    (
        _SILENT,
        f"unreachable: no answer within {PATIENCE:g} s.",
        "try again; then check network and disk, or ask the person who runs it.",
    ),
    ("InvalidAccessKeyId", "wrong key: the store does not know this access key id{source}.", _KEY),
    ("SignatureDoesNotMatch", "wrong key: the secret is not that of the access key id{source}.", _KEY),
    (
        "ExpiredToken InvalidToken TokenRefreshRequired UnauthorizedSSOTokenError",
        "wrong key: its session has ended{source}.",
        f"sign in again, then {_KEY}",
    ),
    (
        "NoCredentialsError PartialCredentialsError CredentialRetrievalError ProfileNotFound",
        "no key: there are no credentials, or only a part of them.",
        _KEY,
    ),
    (_DENIED, f"{_RIGHTS}{{source}}.", f"ask the person who runs it for rights; if the key is wrong: {_KEY}"),
    (_DISK_DENIED, f"{_RIGHTS}.", "ask the person who runs it for rights."),
    (
        "NoSuchBucket 404 InvalidBucketName ParamValidationError",
        "no such bucket: {bucket}.",
        "make it, or correct the name: {rename}.",
    ),
    (
        "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException 301",
        "the bucket {bucket} is in another region.",
        "`dvc remote modify {name} region REGION`, with the region of the bucket.",
    ),
    (
        "QuotaExceeded XMinioStorageFull InsufficientStorage 507 ENOSPC EDQUOT",
        "it is full.",
        "ask the person who runs it for more space.",
    ),
)

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A remote, as messages name it."""

    name: str
    url: str  # without credentials
    endpoint: str = ""  # address of the store's server; empty for a folder on a disk
    key_from: str = ""  # where the credentials come from; empty for a folder on a disk

    @property
    def rename(self) -> str:
        """The command that sets another address."""
        return f"`dvc remote modify {self.name} url URL`"

    def error(self, happened: str, fix: str) -> UserError:
        """The error with its fix."""
        where = f"{self.url} at {self.endpoint}" if self.endpoint else self.url
        return UserError(f"Remote {self.name} ({where}): {happened}\n  What to do: {fix}")


def within(act: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The result of a function, or the exception that it raises; TimeoutError after `seconds`.

    It runs in a thread that does not keep the process from ending, because a call to a dead network drive or
    to a silent server cannot be interrupted.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(act())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(timeout=seconds)


def look_for_folder(place: Place, folder: Path) -> bool:
    """Whether the folder of a remote exists. If it does not, the first `dvc push` can make it.

    Raises UserError if the disk is missing or refuses to write, or the folder is a file.
    """
    try:
        if within(folder.is_dir):
            return True
        if within(folder.exists):
            raise place.error("this is a file, not a folder.", f"name a folder: {place.rename}.")
    except TimeoutError as error:
        raise explained(place, error) from None
    if not folder.parent.is_dir():
        raise place.error(
            f"neither this folder nor {folder.parent} exists.",
            f"mount the shared disk, or name another folder: {place.rename}.",
        )
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise place.error(
            f"it does not exist, and you may not make folders in {folder.parent}.",
            "ask the person who runs the disk to make it, with the right to write for you.",
        )
    return False


def look_for_server(place: Place, verify: bool | str = True) -> None:
    """Check that the server at `place.endpoint` answers and that this machine's clock is right.

    `verify`: whether to check the server's certificate, or a file of certificates to check it against. Raises
    UserError if there is no answer, or the clocks differ by more than `SKEW`.
    """
    address = "check the network (VPN, proxy, firewall) and the address: "
    address += f"`dvc remote modify {place.name} endpointurl URL`."
    try:
        answer = requests.head(place.endpoint, timeout=PATIENCE, allow_redirects=False, verify=verify)
    except requests.exceptions.SSLError:
        raise place.error(
            "its certificate is not valid, or the server does not use TLS.",
            f"check whether the address must begin with http or https; for your own certificates: "
            f"`dvc remote modify {place.name} ssl_verify FILE`.",
        ) from None
    except requests.exceptions.Timeout:
        message = f"unreachable: the server does not answer within {PATIENCE:g} s."
        raise place.error(message, address) from None
    except requests.exceptions.RequestException:
        raise place.error("unreachable: no server answers there.", address) from None
    sent = answer.headers.get("Date")
    apart = (datetime.now(UTC) - parsedate_to_datetime(sent)).total_seconds() if sent else 0.0
    if abs(apart) > SKEW:
        how = f"{abs(apart) / 60:.0f} minutes {'ahead of' if apart > 0 else 'behind'}"
        raise place.error(_CLOCK[0].format(how=how), _CLOCK[1])


def try_out(place: Place, files: Any, folder: str) -> None:
    """Write a small object of a new name into a folder, read it back, compare it and delete it.

    `files` is the file system (fsspec), signed in; `folder` is the path of the remote in it. Raises
    UserError if one of these steps failed; the message follows from the error code.
    """
    path = f"{folder.rstrip('/')}/.share-check-{uuid.uuid4().hex}"
    try:
        within(lambda: files.pipe_file(path, _NOTE))
    except Exception as error:
        raise explained(place, error, readable=_readable(files, folder)) from None
    try:
        back = within(lambda: files.cat_file(path))
        within(lambda: files.rm_file(path))
    except Exception as error:
        raise explained(place, error) from None
    if back != _NOTE:
        raise place.error(
            "an object was not read back as it was written.",
            "do not share anything there, and tell the person who runs it.",
        )


def _readable(files: Any, folder: str) -> bool:
    """Whether a folder can be listed; a folder that does not exist yet counts as readable."""
    try:
        within(lambda: files.ls(folder))
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return True


def explained(place: Place, error: Exception, *, readable: bool = False) -> UserError:
    """The error that explains an exception of a remote's file system; `readable`: it can be read, not
    written.
    """
    code = _code(error)
    if readable and code in f"{_DENIED} {_DISK_DENIED} {_SILENT}".split():
        return place.error(
            "read-only: it can be read, not written. `dvc pull` works, `dvc push` does not.",
            "to push, ask the person who runs it for the right to write.",
        )
    words = {
        "name": place.name,
        "rename": place.rename,
        "bucket": place.url.partition("://")[2].partition("/")[0],
        "source": f" (it comes from {place.key_from})" if place.key_from else "",
    }
    for codes, happened, fix in _MEANINGS:
        if code in codes.split():
            return place.error(happened.format(**words), fix.format(**words))
    return place.error(f"it fails with {code}.", f"check the address: {place.rename}.")


def _code(error: BaseException) -> str:
    """The error code of S3 or of errno, or the name of the exception."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        cause = cause.__cause__
    if isinstance(error, OSError) and error.errno:
        return errno.errorcode.get(error.errno, str(error.errno))
    return type(error).__name__
