"""What is wrong with the place where outs are shared: tried out, not guessed.

A remote is tried as DVC uses it: an object of a new name is written, read back, compared and deleted. What a
store says in its answers may hold keys, so none of it is passed on: only its error code, in words of this
module.
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
from typing import Protocol, TypeVar

import requests

from aplsmear.errors import UserError

PATIENCE = 4.0  # s, for one answer
SKEW = 15 * 60  # s; S3 refuses what was signed longer ago, or so far in the future
_NOTE = b"of `aplsmear share-check`; may be deleted\n"

# What a store or a disk means by its error codes, by the names of S3, of botocore and of errno.
_REFUSED = {"AccessDenied", "AllAccessDisabled", "Forbidden", "403", "MethodNotAllowed", "405"}
_REFUSED |= {"EACCES", "EPERM", "EROFS"}
_EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "UnauthorizedSSOTokenError"}
_NO_BUCKET = {"NoSuchBucket", "404", "InvalidBucketName", "ParamValidationError"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_NO_KEY = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "507", "ENOSPC", "EDQUOT"}
_SILENT = {"TimeoutError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"}
_SILENT |= {"ConnectionClosedError", "503", "ServiceUnavailable", "ETIMEDOUT", "EHOSTDOWN", "ESTALE"}

T = TypeVar("T")


class ShareError(UserError):
    """A remote is of no use as it is; the message says what is wrong, and the mend."""


class Files(Protocol):
    """What is needed of an fsspec file system."""

    def pipe_file(self, path: str, value: bytes) -> object:
        """Write a file."""

    def cat_file(self, path: str) -> bytes:
        """Read a file."""

    def rm_file(self, path: str) -> object:
        """Delete a file."""

    def ls(self, path: str) -> object:
        """List a folder."""


@dataclass(frozen=True)
class Place:
    """A remote, as its errors speak of it.

    Attributes:
        name: of the remote.
        url: where it lies, without credentials.
        endpoint: address of the store's server; empty for a folder on a disk.
        key_from: where the store's credentials come from.
    """

    name: str
    url: str
    endpoint: str = ""
    key_from: str = ""

    @property
    def bucket(self) -> str:
        """The bucket of an S3 URL."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def rename(self) -> str:
        """How another place is named."""
        return f"`dvc remote modify {self.name} url URL`"

    def error(self, happened: str, mend: str) -> ShareError:
        """What a person is told."""
        where = f"{self.url} at {self.endpoint}" if self.endpoint else self.url
        return ShareError(f"Remote {self.name} ({where}): {happened}\n  What to do: {mend}")


def within(act: Callable[[], T], seconds: float = PATIENCE) -> T:
    """What `act` returns or raises.

    Raises:
        TimeoutError: no answer in so many seconds. `act` is left to itself, in a thread that does not keep
            the process from ending: neither a dead network drive nor a silent server can be interrupted.
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
    """Is the folder there? If not, the first `dvc push` can make it.

    Raises:
        ShareError: the disk is missing or refuses, or there is a file of that name.
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
            "ask who runs the disk to make it and let you write to it.",
        )
    return False


def look_for_server(place: Place, verify: bool | str = True) -> None:
    """Does the server at `place.endpoint` answer, and is our clock right?

    Args:
        place: what is asked about.
        verify: whether the server must prove who it is, or the file of certificates that it must prove it by.

    Raises:
        ShareError: it does not, or the clocks are further apart than `SKEW`.
    """
    address = "see whether the network is there (VPN, proxy, firewall), and whether the address is right: "
    address += f"`dvc remote modify {place.name} endpointurl URL`."
    try:
        answer = requests.head(place.endpoint, timeout=PATIENCE, allow_redirects=False, verify=verify)
    except requests.exceptions.SSLError:
        failure = place.error(
            "the server cannot prove who it is, or speaks no TLS.",
            f"see whether the address begins with http or https rightly; for certificates of your own: "
            f"`dvc remote modify {place.name} ssl_verify FILE`.",
        )
    except requests.exceptions.Timeout:
        failure = place.error(f"unreachable: the server does not answer within {PATIENCE:g} s.", address)
    except requests.exceptions.RequestException:
        failure = place.error("unreachable: no server answers there.", address)
    else:
        sent = answer.headers.get("Date")
        apart = (datetime.now(UTC) - parsedate_to_datetime(sent)).total_seconds() if sent else 0.0
        if abs(apart) <= SKEW:
            return
        ahead = "ahead of" if apart > 0 else "behind"
        failure = place.error(*_skew(f"{abs(apart) / 60:.0f} minutes {ahead}"))
    raise failure from None


def try_out(place: Place, files: Files, folder: str) -> None:
    """Write a small object of a new name into a folder, read it back, compare, delete it.

    Args:
        place: what is tried.
        files: its file system, signed in.
        folder: path of the remote in it.

    Raises:
        ShareError: what is wrong, by what the store answered.
    """
    path = f"{folder.rstrip('/')}/.share-check-{uuid.uuid4().hex}"
    try:
        within(lambda: files.pipe_file(path, _NOTE))
    except Exception as error:
        failure = explained(place, error, readable=_readable(files, folder))
    else:
        try:
            back = within(lambda: files.cat_file(path))
            within(lambda: files.rm_file(path))
        except Exception as error:
            failure = explained(place, error)
        else:
            if back == _NOTE:
                return
            failure = place.error(
                "an object came back other than it was written.",
                "do not share anything there, and tell who runs it.",
            )
    raise failure from None


def _readable(files: Files, folder: str) -> bool:
    """Whether a folder can be listed; one that is not there yet can."""
    try:
        within(lambda: files.ls(folder))
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return True


def explained(place: Place, error: Exception, *, readable: bool = False) -> ShareError:
    """What a failure means.

    Args:
        place: what was tried.
        error: what it raised.
        readable: what is there can be read all the same.
    """
    code = _code(error)
    whose = f" (it comes from {place.key_from})" if place.key_from else ""
    key = (
        "give the right key in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), or for this clone "
        f"alone: `dvc remote modify --local {place.name} access_key_id ID`, then secret_access_key likewise."
    )
    meanings = [
        ({"RequestTimeTooSkewed"}, *_skew("too far from")),
        (
            _REFUSED | _SILENT if readable else set(),
            "read-only: it can be read, not written. `dvc pull` works, `dvc push` does not.",
            "to push, ask who runs it for the right to write"
            + (", or take a key that has it." if whose else "."),
        ),
        (
            _SILENT,
            f"unreachable: no answer within {PATIENCE:g} s.",
            "try again; then see whether network and disk are there, or ask who runs it.",
        ),
        ({"InvalidAccessKeyId"}, f"wrong key: the store does not know this access key id{whose}.", key),
        ({"SignatureDoesNotMatch"}, f"wrong key: the secret is not that of the access key id{whose}.", key),
        (_EXPIRED, f"wrong key: its session has ended{whose}.", f"sign in anew, then {key}"),
        (_NO_KEY, "no key: no credentials were found, or not the whole of them.", key),
        (
            _REFUSED,
            f"no rights: neither reading nor writing is allowed{whose}.",
            "ask who runs it for rights" + (f"; if this is the wrong key: {key}" if whose else "."),
        ),
        (
            _NO_BUCKET,
            f"no such bucket: {place.bucket}.",
            f"make it, or see whether the name is right: {place.rename}.",
        ),
        (
            _REGION,
            f"the bucket {place.bucket} lies in another region.",
            f"`dvc remote modify {place.name} region REGION`, with the region of the bucket.",
        ),
        (_FULL, "it is full.", "ask who runs it for more space."),
    ]
    for codes, happened, mend in meanings:
        if code in codes:
            return place.error(happened, mend)
    return place.error(f"it fails with {code}.", f"see whether the address is right: {place.rename}.")


def _code(error: BaseException) -> str:
    """The code that S3 gave, or that of errno, or the name of the exception."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        cause = cause.__cause__
    if isinstance(error, OSError) and error.errno:
        return errno.errorcode.get(error.errno, str(error.errno))
    return type(error).__name__


def _skew(how: str) -> tuple[str, str]:
    return (
        f"clock skew: the clock of this machine is {how} the server's, which refuses what is signed by it.",
        "set the clock (`timedatectl set-ntp true`), or ask who runs this machine.",
    )
