"""Download a data set from Kaggle, check it, and put it in place whole or not at all.

Kaggle's own client, `kagglehub`, signs in, downloads the archive, continues a download that was cut off and
compares the MD5 checksum. This module adds new attempts after network failures, a check of the free disk
space, and messages that say what to do.

Errors of the client and of the network can contain keys and signed addresses. Their text is not shown, and a
`KaggleError` is raised outside their handler, so that it keeps no reference to them.
"""

from __future__ import annotations

import shutil
import struct
import time
import zipfile
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import requests

from aplsmear.errors import UserError
from aplsmear.params import Kaggle
from aplsmear.progress import progress

MARKER = ".aplsmear-kaggle.json"
"""File in a downloaded folder that names the data set and its version."""

_LONGEST_PAUSE = 60.0  # s
_LARGEST_RATIO = 100  # unpacked to packed size; smears hardly shrink, tables shrink about tenfold
_DAMAGED = (  # what reading a damaged or encrypted archive raises
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError,
    FileExistsError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip


class KaggleError(UserError):
    """The data set could not be downloaded; the message says what happened and what to do."""


class Obtained(Kaggle):
    """The data set in the folder, its version, and how many files and bytes it has (without `MARKER`)."""

    files: int
    bytes: int


def obtain(wanted: Kaggle, folder: Path, *, attempts: int = 5, pause: float = 2.0) -> Obtained:
    """Download a version of a Kaggle data set into `folder`, with ``wsi.csv`` directly in it.

    If the folder already holds this version, nothing is downloaded. Another version of the same data set is
    replaced. A download that was cut off continues at the next call. Until the data set is complete, its
    parts are in ``<folder>.kaggle.part`` beside the folder.

    Credentials are read from Kaggle's usual places (KAGGLE_API_TOKEN, KAGGLE_USERNAME and KAGGLE_KEY,
    ~/.kaggle). Many public data sets need none.

    It gives up after as many `attempts` that failed in a row, without a new byte in between. The `pause`
    before the second attempt is in seconds; it doubles at each further one, up to one minute.

    Raises:
        KaggleError: the data set could not be downloaded, or the folder holds something else.
        OSError: the disk is full, or a path cannot be read or written.
    """
    folder = folder.resolve()
    work = folder.with_name(folder.name + ".kaggle.part")
    if (present := _present(wanted, folder)) is None:
        work.mkdir(parents=True, exist_ok=True)
        for name in ("files", "replaced"):  # of a run that was killed
            shutil.rmtree(work / name, ignore_errors=True)
        archive = _download(wanted, work, attempts, pause)
        try:
            present, top = _unpack(wanted, archive, work / "files")
        except KaggleError:
            shutil.rmtree(work)
            raise
        if folder.exists():
            folder.rename(work / "replaced")
        top.rename(folder)
    if work.exists():
        shutil.rmtree(work)
    return present


def borrow(wanted: Kaggle, folder: Path, lender: Path) -> Obtained | None:
    """Make `folder` a link to the earlier download in the folder `lender`.

    None, and no link, if that is incomplete, changed, or not the wanted version.
    """
    if folder.is_symlink():
        folder.unlink()
    try:
        present = _present(wanted, lender.resolve())
    except KaggleError:
        return None
    if present:
        folder.symlink_to(lender.resolve(), target_is_directory=True)
    return present


def _error(wanted: Kaggle, happened: str, to_do: str) -> KaggleError:
    name = f"{wanted.owner}/{wanted.slug}"
    return KaggleError(
        f"Kaggle data set {name} version {wanted.version}: {happened}\n"
        f"  What to do: {to_do}\n"
        f"  Page of the data set: https://www.kaggle.com/datasets/{name}\n"
        "  Without this program: download the data set from that page with a browser and unpack it. In "
        "params.yaml, set dataset.source to folder, and dataset.root to the folder that holds wsi.csv."
    )


def _present(wanted: Kaggle, folder: Path) -> Obtained | None:
    """The earlier download in the folder; None if it is empty, not there, or of another version.

    Raises:
        KaggleError: the folder holds something else, or the download was changed.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    move = f"move or rename {folder}, then run the same command again."
    try:
        present = Obtained.model_validate_json((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        raise _error(wanted, f"this program did not download {folder}.", move) from None
    if (present.owner, present.slug) != (wanted.owner, wanted.slug):
        raise _error(wanted, f"{folder} holds another data set: {present.owner}/{present.slug}.", move)
    files, size = _count(folder)
    if (files, size) != (present.files, present.bytes):
        raise _error(
            wanted,
            f"{folder} was changed after the download: it had {present.files} files with {present.bytes} "
            f"bytes, now it has {files} files with {size} bytes.",
            "to keep your changes, move the folder; in params.yaml, set dataset.root to its new place and "
            f"dataset.source to folder. To download it again, delete {folder}. Then run again.",
        )
    return present if present.version == wanted.version else None


def _count(folder: Path) -> tuple[int, int]:
    """Number of files in a folder and their bytes, without the marker."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return len(sizes), sum(sizes)


# --- download -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trouble:
    """Why an attempt failed; `passes`: another attempt may succeed."""

    happened: str
    to_do: str
    passes: bool = False


_AGAIN = "then run the same command again."
_CONTINUES = f"{_AGAIN} The download continues where it stopped."
_LATER = f"wait some minutes, {_CONTINUES}"
_NAME = "dataset.kaggle.owner, slug and version in params.yaml"
_NETWORK = f"check the network (proxy, firewall), {_CONTINUES}"
_SIGN_IN = (
    "create an API token on the Kaggle website (Settings, API). Save it as ~/.kaggle/access_token or "
    f"~/.kaggle/kaggle.json, or set KAGGLE_API_TOKEN, or set KAGGLE_USERNAME and KAGGLE_KEY; {_AGAIN}"
)
_UNUSABLE = _Trouble(
    "the Kaggle credentials on this computer cannot be used. Their file cannot be read or is damaged, or the "
    "key contains a wrong character, such as a line break.",
    _SIGN_IN,
)
_BROKEN = _Trouble("the archive was damaged on its way and is removed.", _NETWORK, passes=True)
_REFUSALS = {  # HTTP status of Kaggle -> its meaning, and what to do
    401: ("Kaggle does not accept the credentials: mistyped, expired or revoked", _SIGN_IN),
    403: (
        "Kaggle accepts the credentials, but does not give this data set to them",
        "open the page of the data set with a browser, sign in and accept the terms. If it does not open, "
        f"the data set is private or its name is wrong. Correct this, {_AGAIN}",
    ),
    404: (
        "Kaggle has no such data set, or not this version",
        "open the page of the data set with a browser. If it does not open, the data set was moved, renamed "
        f"or removed, or is private. Correct {_NAME}, {_AGAIN}",
    ),
    429: ("too many requests to Kaggle", _LATER),
}


def _download(wanted: Kaggle, work: Path, attempts: int, pause: float) -> Path:
    """Download the archive into the folder `work`, with several attempts; returns its path."""
    archive = work / f"{wanted.owner}-{wanted.slug}-{wanted.version}.zip"
    for other in work.glob("*.zip"):
        if other != archive:
            other.unlink()
    failures = most = 0
    while True:
        answer = _ask(wanted)
        trouble = answer if isinstance(answer, _Trouble) else _fetch(wanted, answer, archive)
        if trouble is None:
            return archive
        size = archive.stat().st_size if archive.exists() else 0
        failures = 1 if size > most else failures + 1
        most = max(most, size)
        if not trouble.passes or failures >= attempts:
            tried = f"gave up after {failures} attempts: " if failures > 1 else ""
            raise _error(wanted, tried + trouble.happened, trouble.to_do)
        time.sleep(min(pause * 2 ** (failures - 1), _LONGEST_PAUSE))


def _ask(wanted: Kaggle) -> requests.Response | _Trouble:
    """Ask Kaggle for the archive, which answers with a signed address of its storage.

    The address expires, so each attempt asks again.
    """
    from kagglehub.clients import build_kaggle_client
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug, request.dataset_slug = wanted.owner, wanted.slug
    request.dataset_version_number = wanted.version
    try:
        with build_kaggle_client() as client:
            answer: requests.Response = client.datasets.dataset_api_client.download_dataset(request)
            return answer
    except requests.HTTPError as error:
        return _refusal(error.response)
    except (requests.ConnectionError, requests.Timeout) as error:
        return _Trouble(f"no connection to Kaggle ({type(error).__name__}).", _NETWORK, passes=True)
    except requests.exceptions.InvalidHeader:
        return _UNUSABLE
    except requests.RequestException as error:
        return _Trouble(
            f"the answer of Kaggle cannot be read ({type(error).__name__}).",
            f"check whether a proxy answers instead of Kaggle, {_AGAIN}",
        )
    except (ValueError, TypeError, KeyError, OSError):  # raised while the credentials are read or sent
        return _UNUSABLE


def _refusal(answer: requests.Response | None) -> _Trouble:
    """The meaning of an HTTP status of Kaggle or of its storage."""
    if answer is None:
        return _Trouble("no answer from Kaggle.", _NETWORK, passes=True)
    status = answer.status_code
    passes = status in (408, 429) or status >= 500
    happened, to_do = _REFUSALS.get(
        status, ("Kaggle does not work at present" if passes else "Kaggle refused the request", _LATER)
    )
    if answer.history:  # the answer is from the storage, whose addresses expire
        happened, to_do, passes = "Kaggle's storage refused the download", _LATER, True
    elif status in (401, 403) and "Authorization" not in answer.request.headers:
        happened, to_do = "Kaggle requires credentials, and there are none on this computer", _SIGN_IN
    return _Trouble(f"{happened} (HTTP {status}).", to_do, passes)


def _fetch(wanted: Kaggle, answer: requests.Response, archive: Path) -> _Trouble | None:
    """Download the rest of the archive; None if it is complete. A KaggleError if the disk is too full.

    When kagglehub continues a download, it appends all that the storage returns, also an error page. Then
    checksum or size do not match, and the archive is removed and downloaded again from its beginning.
    """
    from kagglehub.clients import download_file
    from kagglehub.exceptions import DataCorruptionError
    from kagglehub.handle import DatasetHandle

    length = answer.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else 0
    with closing(answer):
        # kagglehub has a time limit only for continued downloads. With an empty file, all are continued.
        archive.touch()
        need = 2 * total - archive.stat().st_size  # the rest of the archive, and its files unpacked
        free = shutil.disk_usage(archive.parent).free
        if free < need:
            full = (
                f"the disk of {archive.parent} is full: {need / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free."
            )
            raise _error(wanted, full, f"delete files on this disk, {_CONTINUES}")
        try:
            download_file(answer, str(archive), DatasetHandle(wanted.owner, wanted.slug, wanted.version))
        except DataCorruptionError:  # the checksum does not match; kagglehub has removed the archive
            return _BROKEN
        except requests.RequestException as error:
            kind = type(error).__name__
            return _Trouble(f"the connection to Kaggle's storage broke ({kind}).", _NETWORK, passes=True)
    if total and archive.stat().st_size != total:
        archive.unlink()
        return _BROKEN
    return None


# --- archive --------------------------------------------------------------------------------------


def _unpack(wanted: Kaggle, archive: Path, files: Path) -> tuple[Obtained, Path]:
    """Check the archive, unpack it into the new folder `files`, and write the marker.

    Returns what was unpacked, and the folder in `files` that holds ``wsi.csv``. A KaggleError if the archive
    is damaged, a bomb or without this table.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = bundle.infolist()
            size, packed = sum(member.file_size for member in members), archive.stat().st_size
            if size > _LARGEST_RATIO * packed:
                raise _error(
                    wanted,
                    f"the archive is a bomb and is removed: its {packed} bytes unpack to {size}.",
                    f"check {_NAME}. If they are right, tell the owner of the data set.",
                )
            files.mkdir()
            for member in progress(members, "files unpacked", len(members)):
                bundle.extract(member, files)  # never outside of `files`; checks the CRC
    except _DAMAGED as error:
        raise _error(
            wanted, f"the archive is damaged ({type(error).__name__}) and is removed.", _NETWORK
        ) from None
    tables = [path for path in files.rglob("wsi.csv") if path.is_file()]
    if len(tables) != 1:
        raise _error(
            wanted,
            f"the archive has {len(tables)} files of the name wsi.csv, expected one.",
            f"check {_NAME}. A data set needs wsi.csv and the folder wsi.",
        )
    top = tables[0].parent  # folders may be around everything
    count, size = _count(top)
    obtained = Obtained(**wanted.model_dump(), files=count, bytes=size)
    (top / MARKER).write_text(obtained.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return obtained, top
