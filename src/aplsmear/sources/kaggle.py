"""A data set from Kaggle: downloaded with Kaggle's own client, checked, and put in place whole or not at all.

The client (`kagglehub`) finds the credentials, signs in, names the newest version and obtains the address of
the archive. The bytes are fetched here, because `kagglehub.dataset_download` (1.0) tries only once, waits for
ever on a silent connection, appends whatever a resumed request returns, and unpacks unseen.

What the client or the network raises may hold keys and signed addresses. None of it is passed on: every
failure becomes a `KaggleError` in this module's own words, raised outside the handler so that nothing
hangs on to it.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import hashlib
import json
import shutil
import stat
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import requests
from tqdm import tqdm

from aplsmear.errors import UserError

MARKER = ".aplsmear-kaggle.json"
"""File in a downloaded folder that says which data set and version it is."""

_T = TypeVar("_T")
_CHUNK = 1 << 20  # bytes, of files
_PIECE = 1 << 14  # bytes, of the network: what a breaking connection may lose
_TIMEOUT = (10.0, 60.0)  # s: to connect, and between two pieces of an answer
_LONGEST_PAUSE = 60.0  # s
_LARGEST_RATIO = 100  # unpacked to packed; smears hardly shrink, tables about tenfold
_LISTED = 10  # problems shown of one archive
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    UnicodeError,
)


class KaggleError(UserError, RuntimeError):
    """The data set could not be obtained; the message says what happened, what to do, and the way by hand."""


@dataclasses.dataclass(frozen=True)
class Obtained:
    """What lies in the folder: the data set, its version, and what it holds.

    `files` and `bytes` count the data set's own files. `fingerprint` is the SHA-256 of the lines that
    `sha256sum` prints for them, sorted by path: it depends on their content and names, not on the packing.
    """

    owner: str
    slug: str
    version: int
    files: int
    bytes: int
    fingerprint: str


def obtain(
    owner: str,
    slug: str,
    version: int | None,
    folder: Path,
    *,
    progress: bool = True,
    attempts: int = 5,
    pause: float = 2.0,
) -> Obtained:
    """Have a version of the Kaggle data set `owner/slug` in `folder`, with `folder/wsi.csv` at its top.

    A complete earlier download of the same version is recognised and nothing is downloaded; another version
    of the same data set is replaced. A download that was cut off, in whatever way, goes on where it stopped
    when this is called again. Work in progress lies in `<folder>.kaggle.part` beside the folder; what is
    complete is renamed into place, and the rest removed.

    Credentials come from Kaggle's usual places (KAGGLE_API_TOKEN, KAGGLE_USERNAME and KAGGLE_KEY, ~/.kaggle);
    if there are none, the data set is asked for without, which Kaggle allows for many public ones.

    Args:
        owner: the first half of the data set's name.
        slug: the second half.
        version: its number, from 1; None for the newest.
        folder: where it shall lie: absent, empty, or an earlier download.
        progress: show progress bars on stderr.
        attempts: give up after so many failures in a row that brought no new byte.
        pause: seconds before the second attempt; doubles with each, up to a minute.

    Raises:
        KaggleError: for whatever keeps the data set from being obtained.
    """
    source = _Source(owner, slug, version, folder.resolve(), progress)
    work = source.folder.with_name(source.folder.name + ".kaggle.part")
    with source.disk():
        obtained = _present(source)
        if obtained is None or not _is(obtained, source):
            with _client(source) as client:
                patience = _Patience(source, attempts, pause)
                number = _newest(source, client, patience) if version is None else version
                source = dataclasses.replace(source, version=number)
                if obtained is None or not _is(obtained, source):
                    work.mkdir(parents=True, exist_ok=True)
                    try:
                        archive = _download(source, client, work, patience)
                        obtained = _unpack(source, number, archive, work / "files")
                    except _Refused as refused:
                        shutil.rmtree(work)
                        raise source.error(*refused.args) from None
                    _put(work / "files", source.folder, work / "replaced")
        if work.exists():
            shutil.rmtree(work)
    return obtained


def borrow(owner: str, slug: str, version: int | None, folder: Path, lender: Path) -> Obtained | None:
    """Have in `folder`, as a link, what an earlier `obtain` has put into `lender`.

    Args:
        owner: as of `obtain`, like the next two.
        slug: of the data set.
        version: its number; None is never borrowed, since only Kaggle knows which is the newest.
        folder: becomes the link; absent, or an earlier link.
        lender: the other folder; nothing in it is changed.

    Returns:
        What is there now; None, and no link, where `lender` is not a whole download of just this version.
    """
    if folder.is_symlink():
        folder.unlink()
    source = _Source(owner, slug, version, lender.resolve(), progress=False)
    try:
        present = _present(source)
    except KaggleError:
        return None
    if present is None or not _is(present, source):
        return None
    folder.symlink_to(source.folder, target_is_directory=True)
    return present


# ---- what is asked for, and what is said about it


@dataclasses.dataclass(frozen=True)
class _Source:
    """The data set that is asked for; words the errors about it."""

    owner: str
    slug: str
    version: int | None
    folder: Path
    progress: bool

    def __str__(self) -> str:
        name = f"{self.owner}/{self.slug}"
        return name if self.version is None else f"{name} version {self.version}"

    @property
    def page(self) -> str:
        return f"https://www.kaggle.com/datasets/{self.owner}/{self.slug}"

    def error(self, happened: str, mend: str) -> KaggleError:
        return KaggleError(
            f"Kaggle data set {self}: {happened}\n"
            f"  What to do: {mend}\n"
            f"  By hand: download it from {self.page} with a browser, unpack it, set dataset.root to the "
            "folder that holds wsi.csv, and dataset.source to folder."
        )

    @contextmanager
    def disk(self) -> Iterator[None]:
        """Say in plain words that the disk is full or refuses."""
        try:
            yield
            return
        except OSError as error:
            if error.errno in _DISK_FULL:
                failure = self.full()
            else:
                failure = self.error(
                    f"cannot write or read {error.filename or self.folder} ({error.strerror}).",
                    "mend the folder's rights, or name another folder, and run again.",
                )
        raise failure from None

    def full(self, need: int | None = None, free: int | None = None) -> KaggleError:
        numbers = "" if need is None or free is None else f": {_gb(need)} needed, {_gb(free)} free"
        return self.error(
            f"the disk that holds {self.folder.parent} is full{numbers}.",
            "free some space, or name a folder on another disk, and run again; what has arrived is kept.",
        )

    def check_space(self, need: int) -> None:
        free = shutil.disk_usage(self.folder.parent).free
        if free < need:
            raise self.full(need, free)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


# ---- what lies in the folder already


def _is(present: Obtained, source: _Source) -> bool:
    return (present.owner, present.slug, present.version) == (source.owner, source.slug, source.version)


def _present(source: _Source) -> Obtained | None:
    """The earlier download in the folder, if there is one and it is as it was."""
    folder = source.folder
    if not folder.exists():
        return None
    another = "name a folder that does not exist yet, or move this one away, and run again."
    if not folder.is_dir():
        raise source.error(f"{folder} is a file.", another)
    marker = folder / MARKER
    if not marker.exists():
        if any(folder.iterdir()):
            raise source.error(f"{folder} holds files that were not downloaded by this program.", another)
        return None
    try:
        present = Obtained(**json.loads(marker.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise source.error(f"{marker} cannot be read.", f"delete {folder} and run again.") from None
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path != marker]
    if (len(sizes), sum(sizes)) != (present.files, present.bytes):
        raise source.error(
            f"{folder} was changed after its download: it held {present.files} files of {present.bytes} "
            f"bytes, and holds {len(sizes)} of {sum(sizes)}.",
            "to work on your own version of it, move it, set dataset.root to where it is, and dataset.source "
            f"to folder; to download it anew, delete {folder}; then run again.",
        )
    if (present.owner, present.slug) != (source.owner, source.slug):
        raise source.error(f"{folder} holds another data set, {present.owner}/{present.slug}.", another)
    return present


# ---- Kaggle's client


class _Passing(Exception):
    """A failure that may pass by itself; `wait` is how many seconds the server asked to wait."""

    def __init__(self, happened: str, mend: str, wait: float = 0.0) -> None:
        super().__init__(happened)
        self.mend = mend
        self.wait = wait


class _Refused(Exception):
    """What arrived is of no use and must go: what happened, what to do."""


_NETWORK = "check the network (proxy, firewall) and run again: the download goes on where it stopped."
_LATER = "wait, and run again: the download goes on where it stopped."


class _Patience:
    """Counts failures in a row, and waits between attempts."""

    def __init__(self, source: _Source, attempts: int, pause: float) -> None:
        self._source = source
        self._attempts = attempts
        self._pause = pause
        self._failures = 0
        self._most = 0

    def reached(self, size: int) -> None:
        """The archive has so many bytes; more than ever before is a success."""
        if size > self._most:
            self._most = size
            self._failures = 0

    def failed(self, failure: _Passing) -> None:
        """Wait for the next attempt.

        Raises:
            KaggleError: if this was the last one, or the server asks for more than a minute.
        """
        self._failures += 1
        if self._failures >= self._attempts or failure.wait > _LONGEST_PAUSE:
            tried = f" after {self._failures} attempts" if self._failures > 1 else ""
            raise self._source.error(f"gave up{tried}: {failure}", failure.mend) from None
        time.sleep(max(failure.wait, min(self._pause * 2 ** (self._failures - 1), _LONGEST_PAUSE)))


@contextmanager
def _client(source: _Source) -> Iterator[Any]:
    """Kaggle's client, signed in with what it finds in Kaggle's usual places."""
    from kagglehub.clients import build_kaggle_client

    failure = None
    try:
        client = build_kaggle_client().__enter__()
    except (ValueError, TypeError, KeyError, OSError):  # their text may quote the file
        failure = _unusable_credentials(source)
    if failure:
        raise failure
    try:
        yield client
    finally:
        client.__exit__(None, None, None)


_SIGN_IN = (
    "create an API token on Kaggle (Settings, API) and save it as ~/.kaggle/access_token or "
    "~/.kaggle/kaggle.json, or set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY; then run again."
)


def _unusable_credentials(source: _Source) -> KaggleError:
    return source.error(
        "the Kaggle credentials on this machine cannot be used: their file cannot be read or is not as "
        "Kaggle wrote it, or the key holds a character that no key has (a line break?).",
        _SIGN_IN,
    )


def _ask(source: _Source, call: Callable[[], _T]) -> _T:
    """One call of Kaggle's API.

    Raises:
        KaggleError: if asking again is of no use.
        _Passing: if it may be.
    """
    failure: Exception
    try:
        return call()
    except requests.HTTPError as error:
        failure = _refusal(source, error.response)
    except (requests.ConnectionError, requests.Timeout) as error:
        failure = _Passing(f"no connection to Kaggle ({type(error).__name__}).", _NETWORK)
    except (requests.exceptions.InvalidHeader, UnicodeError):
        failure = _unusable_credentials(source)
    except (requests.RequestException, ValueError) as error:
        failure = source.error(
            f"Kaggle's answer was not understood ({type(error).__name__}).",
            "check that no proxy answers in Kaggle's place; if kagglehub is outdated, update it; run again.",
        )
    raise failure


def _refusal(source: _Source, answer: requests.Response | None) -> Exception:
    """What an HTTP status of Kaggle, or of the storage it sent us to, means."""
    if answer is None:
        return _Passing("no answer from Kaggle.", _NETWORK)
    status = answer.status_code
    if answer.history:  # its address is signed for a short while: a new one may do
        return _Passing(f"Kaggle's storage refused the download (HTTP {status}).", _LATER)
    if status == 429:
        wait = answer.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isdecimal() else 0.0
        asked = f" and asks to wait {seconds:.0f} s" if seconds else ""
        return _Passing(f"Kaggle says that it was asked too often (HTTP 429){asked}.", _LATER, seconds)
    if status == 408 or status >= 500:
        return _Passing(f"Kaggle is out of order (HTTP {status}).", _LATER)
    if status in (401, 403) and "Authorization" not in answer.request.headers:
        happened = "Kaggle wants to know who asks, and there are no Kaggle credentials on this machine"
        return source.error(f"{happened} (HTTP {status}).", _SIGN_IN)
    happened, mend = {
        401: (
            "Kaggle does not accept the credentials of this machine: mistyped, expired or revoked",
            _SIGN_IN,
        ),
        403: (
            "Kaggle knows the credentials of this machine but refuses this data set to them",
            f"open {source.page} with a browser, sign in, accept the terms, and verify the account if asked "
            "to; if the page does not open, the data set is private or its name is mistyped; then run again.",
        ),
        404: (
            "Kaggle has no such data set, or not this version",
            "check dataset.kaggle.owner, slug and version against the address of its page; for a "
            "private data set, check that the credentials are of someone who may see it.",
        ),
    }.get(status, ("Kaggle refused", "update kagglehub, and run again."))
    return source.error(f"{happened} (HTTP {status}).", mend)


def _newest(source: _Source, client: Any, patience: _Patience) -> int:
    """The number of the newest version."""
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug = source.owner
    request.dataset_slug = source.slug
    while True:
        try:
            answer = _ask(source, lambda: client.datasets.dataset_api_client.get_dataset(request))
        except _Passing as failure:
            patience.failed(failure)
            continue
        version = int(answer.current_version_number or 0)
        if version < 1:
            raise source.error(
                "Kaggle does not say which version is the newest.", "set dataset.kaggle.version to a number."
            )
        return version


# ---- the archive


def _download(source: _Source, client: Any, work: Path, patience: _Patience) -> Path:
    """Fetch the archive into `work`, however many connections it takes; returns its path."""
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug = source.owner
    request.dataset_slug = source.slug
    request.dataset_version_number = source.version
    ask = client.datasets.dataset_api_client.download_dataset
    while True:
        try:  # ask anew each time: the storage's signed address expires
            with closing(_ask(source, lambda: ask(request))) as answer:
                return _fetch(source, answer, work, patience)
        except _Passing as failure:
            patience.failed(failure)


def _fetch(source: _Source, answer: requests.Response, work: Path, patience: _Patience) -> Path:
    """Bring the archive that `answer` points to from what is there to what it should be, and check it."""
    from kagglehub.integrity import get_md5_checksum_from_response

    headers = answer.headers
    md5 = get_md5_checksum_from_response(answer)
    length = headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    # The name says what the bytes belong to: a rest is never appended to the beginning of something else.
    identity = repr((str(source), total, md5 or headers.get("ETag") or headers.get("Last-Modified")))
    archive = work / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.zip"
    for other in work.glob("*.zip"):
        if other != archive or total is None:
            other.unlink()
    archive.touch()
    have = archive.stat().st_size
    if have != total:
        size = total or 0
        source.check_space(size - have + size)  # the rest of the archive, and at least as much unpacked
        have = _stream(source, answer, archive, total, patience)
    if total is not None and have != total:
        raise _damaged(f"{have} bytes instead of {total}")
    if md5:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
        if base64.b64encode(digest).decode() != md5:
            raise _damaged("its checksum is not what Kaggle says")
    return archive


def _damaged(how: str) -> _Refused:
    return _Refused(
        f"what arrived is damaged ({how}); it was removed.", "run again; if it stays so, try another network."
    )


def _stream(
    source: _Source, answer: requests.Response, archive: Path, total: int | None, patience: _Patience
) -> int:
    """Append to `archive` what it lacks; returns its size.

    Raises:
        _Passing: if the connection breaks; what came until then is on the disk.
    """
    have = archive.stat().st_size
    with closing(_rest(answer, have)) as body:
        if body.status_code != 206:
            have = 0  # all of it comes, asked for the rest or not
        name = f"{source.slug} v{source.version}"
        with archive.open("ab" if have else "wb") as file, _bar(name, total, have, source.progress) as bar:
            for piece in _pieces(body):
                file.write(piece)
                have += len(piece)
                patience.reached(have)
                bar.update(len(piece))
    return have


def _rest(answer: requests.Response, have: int) -> requests.Response:
    """The storage's answer with the bytes from `have` on, or with all of them."""
    if not answer.history:  # no storage: Kaggle itself sends the bytes
        return answer
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        body = requests.get(answer.url, headers=headers, stream=True, timeout=_TIMEOUT)
    except requests.RequestException as error:
        failure = _Passing(f"no connection to Kaggle's storage ({type(error).__name__}).", _NETWORK)
    else:
        rest = body.status_code == 206 and body.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if body.status_code == 200 or rest:
            return body
        body.close()
        failure = _Passing(f"Kaggle's storage refused the download (HTTP {body.status_code}).", _LATER)
    raise failure


def _pieces(body: requests.Response) -> Iterator[bytes]:
    """The bytes of an answer, as they come."""
    try:
        yield from body.iter_content(_PIECE)
        return
    except requests.RequestException as error:
        failure = _Passing(f"the connection to Kaggle's storage broke ({type(error).__name__}).", _NETWORK)
    raise failure


def _bar(name: str, total: int | None, done: int, progress: bool) -> tqdm[Any]:
    """A progress bar in bytes on stderr, which writes seldom where that is no terminal."""
    return tqdm(
        desc=name,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        disable=not progress,
    )


# ---- what is in the archive


def _unpack(source: _Source, version: int, archive: Path, files: Path) -> Obtained:
    """Unpack the whole archive into the new folder `files`, test each file, and leave a marker.

    Raises:
        _Refused: if it is damaged, a bomb, holds what would leave the folder, or lacks wsi.csv.
    """
    if files.exists():
        shutil.rmtree(files)  # of a run that was cut off
    files.mkdir()
    lines = []
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = _members(bundle, archive.stat().st_size)
            size = sum(member.file_size for member in members.values())
            source.check_space(size)
            with _bar("unpacking", size, 0, source.progress) as bar:
                for path, member in sorted(members.items(), key=lambda item: str(item[0])):
                    target = files / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with bundle.open(member) as packed, target.open("xb") as file:
                        lines.append(f"{_copy(packed, file, bar)}  {path}\n")
    except _DAMAGED as error:
        raise _damaged(f"{type(error).__name__} in the archive") from None
    fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()
    obtained = Obtained(source.owner, source.slug, version, len(lines), size, fingerprint)
    (files / MARKER).write_text(json.dumps(dataclasses.asdict(obtained), indent=2) + "\n", encoding="utf-8")
    return obtained


def _copy(packed: IO[bytes], file: IO[bytes], bar: tqdm[Any]) -> str:
    """Copy to the end, which tests the CRC; returns the SHA-256."""
    digest = hashlib.sha256()
    while piece := packed.read(_CHUNK):
        digest.update(piece)
        file.write(piece)
        bar.update(len(piece))
    return digest.hexdigest()


_SUSPECT = (
    "check that dataset.kaggle.owner and slug name the data set you mean; if so, tell its owner, and do not "
    "unpack it unseen."
)


def _members(bundle: zipfile.ZipFile, packed: int) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The files of the archive by where they go: a single folder around all of them is left out.

    Raises:
        _Refused: listing everything that must not be unpacked.
    """
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    seen: dict[str, str] = {}
    problems = []
    for member in bundle.infolist():
        if member.header_offset < 0:
            raise zipfile.BadZipFile
        name = member.orig_filename.replace("\\", "/")
        path = PurePosixPath(name)
        problem = _problem(name, path, member)
        if problem is None and name.endswith("/"):
            continue  # a folder is made when its first file comes
        key = str(path).casefold()
        if problem is None and key in seen:
            problem = f"is the same file as {seen[key]!r}, on some computers at least"
        if problem is None:
            seen[key] = name
            members[path] = member
        else:
            problems.append(f"{member.orig_filename!r} {problem}")
    folders = {str(parent).casefold() for path in members for parent in path.parents}
    problems += [f"{seen[name]!r} is a file and a folder" for name in sorted(folders & set(seen))]
    size = sum(member.file_size for member in members.values())
    if size > _LARGEST_RATIO * packed:
        problems.append(
            f"a bomb: unpacked {size} bytes, over {_LARGEST_RATIO} times the {packed} that arrived"
        )
    if problems:
        listed = "".join(f"\n    {problem}" for problem in problems[:_LISTED])
        more = f"\n    and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise _Refused(
            f"the archive holds what must not be unpacked; it was removed:{listed}{more}", _SUSPECT
        )
    return _without_top(members)


def _problem(name: str, path: PurePosixPath, member: zipfile.ZipInfo) -> str | None:
    """Why this member of an archive must not be unpacked."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or name[1:2] == ":":
        return "would leave the folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link" if kind == stat.S_IFLNK else "is no plain file"
    if not (path.parts or name == "./") or not name.isprintable() or path.name == MARKER:
        return "is no name for a file"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in a way that Kaggle does not use"
    return None


def _without_top(members: dict[PurePosixPath, zipfile.ZipInfo]) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The same files with wsi.csv at the top, taken out of the folders that hold everything."""
    while PurePosixPath("wsi.csv") not in members:
        tops = sorted({path.parts[0] for path in members})
        if len(tops) != 1 or any(len(path.parts) == 1 for path in members):
            listed = ", ".join(tops[:_LISTED]) or "nothing"
            raise _Refused(
                f"the archive has no wsi.csv at its top, which holds: {listed}; it was removed.",
                "check that dataset.kaggle.owner, slug and version name a data set in the layout that the "
                "README's section on your own data describes.",
            )
        members = {PurePosixPath(*path.parts[1:]): member for path, member in members.items()}
    return members


def _put(files: Path, folder: Path, replaced: Path) -> None:
    """Put the complete folder `files` where `folder` is, or is not yet."""
    if replaced.exists():
        shutil.rmtree(replaced)
    if folder.exists():
        folder.rename(replaced)
    files.rename(folder)
