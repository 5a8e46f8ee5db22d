"""Downloads from Kaggle: the real client against a server on 127.0.0.1."""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from aplsmear.params import Kaggle
from aplsmear.sources.kaggle import MARKER, KaggleError, Obtained, obtain
from kaggle_server import BASIC, KEY, OWNER, SIGNATURE, SLUG, USER, KaggleServer

ROOT = Path(__file__).parents[2]

pytest.importorskip("kagglehub", reason="Kaggle's client is not installed")

FILES = {
    "wsi.csv": b"id,imgName,label\n1,a.png,m3\n2,b.png,healthy\n",
    "labeled_cells.csv": b"id,wsi,cellType,bbox\n",
    "wsi/a.png": np.random.default_rng(1).bytes(3_000_000),  # like images, cannot be packed smaller
    "wsi/b.png": np.random.default_rng(2).bytes(3_000_000),
}
CUT = 2_500_000  # bytes after which a connection breaks; the client writes in steps of 1 MiB


def packed(files: dict[str, bytes], top: str = "", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as bundle:
        for name, content in files.items():
            bundle.writestr(zipfile.ZipInfo(top + name), content, method)
    return buffer.getvalue()


WHOLE = packed(FILES)


def holds(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A computer with no other credentials than those of the test."""
    for name in (
        "KAGGLE_API_TOKEN",
        "KAGGLE_KERNEL_RUN_TYPE",
        "no_proxy",
        "NO_PROXY",
        "HTTP_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home" / ".kaggle"))
    (tmp_path / "home" / ".kaggle").mkdir(parents=True)
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    return monkeypatch


@pytest.fixture
def server(signed_in: pytest.MonkeyPatch) -> Iterator[KaggleServer]:
    with KaggleServer({3: WHOLE}) as running:
        for name, value in running.environment.items():
            signed_in.setenv(name, value)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "raw" / "marrow"


def fetch(folder: Path, version: int = 3, attempts: int = 3, slug: str = SLUG) -> Obtained:
    wanted = Kaggle(owner=OWNER, slug=slug, version=version)
    return obtain(wanted, folder, attempts=attempts, pause=0.0)


def refused(folder: Path, version: int = 3, attempts: int = 3, slug: str = SLUG) -> str:
    """The message of a download that must fail and must not change the folder."""
    before = holds(folder) if folder.is_dir() else None
    with pytest.raises(KaggleError) as caught:
        fetch(folder, version, attempts, slug)
    assert (holds(folder) if folder.is_dir() else None) == before
    message = str(caught.value)
    for part in (
        f"Kaggle data set {OWNER}/{slug} version {version}: ",
        "What to do: ",
        f"https://www.kaggle.com/datasets/{OWNER}/{slug}",
        "dataset.root",
    ):
        assert part in message
    return message


def starts(server: KaggleServer) -> list[int]:
    """The first byte of each request for the archive."""
    return [int((seen.range or "bytes=0-")[6:-1]) for seen in server.downloads]


# --- what arrives ---------------------------------------------------------------------------------


def test_a_download_is_put_in_place_counted_and_its_progress_shown(
    server: KaggleServer, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    obtained = fetch(folder)
    assert holds(folder) == FILES
    assert list(folder.parent.iterdir()) == [folder]
    size = sum(map(len, FILES.values()))
    assert obtained == Obtained(owner=OWNER, slug=SLUG, version=3, files=4, bytes=size)
    assert "100%" in capfd.readouterr().err


def test_a_complete_download_is_not_downloaded_again(server: KaggleServer, folder: Path) -> None:
    first = fetch(folder)
    server.seen.clear()
    assert fetch(folder) == first
    assert server.seen == []


def test_another_version_replaces_the_one_in_place(server: KaggleServer, folder: Path) -> None:
    server.versions[4] = packed({"wsi.csv": b"of version 4"})
    fetch(folder)
    fetch(folder, 4)
    assert holds(folder) == {"wsi.csv": b"of version 4"}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("top", ["marrow/", "outer/inner folder/"])
def test_a_folder_around_everything_is_left_out(server: KaggleServer, folder: Path, top: str) -> None:
    server.versions[3] = packed(FILES, top, zipfile.ZIP_STORED)
    fetch(folder)
    assert holds(folder) == FILES


def test_a_server_without_storage_length_and_checksum_is_enough(server: KaggleServer, folder: Path) -> None:
    server.redirects = server.lengths = server.checksum = False
    fetch(folder)
    assert holds(folder) == FILES


# --- broken connections ---------------------------------------------------------------------------


@pytest.mark.parametrize("checksum", [True, False])
def test_a_broken_connection_continues_where_it_broke(
    server: KaggleServer, folder: Path, checksum: bool
) -> None:
    server.checksum, server.drop_after, server.drops = checksum, 1_300_000, 4  # more than the attempts
    fetch(folder)
    assert holds(folder) == FILES
    assert len(starts(server)) == 5
    assert np.diff(starts(server)).min() > 1_000_000


def test_a_storage_that_cannot_continue_starts_again(server: KaggleServer, folder: Path) -> None:
    server.ranges, server.drop_after, server.drops = False, CUT, 2
    fetch(folder)
    assert holds(folder) == FILES


def test_a_download_that_failed_continues_in_the_next_run(server: KaggleServer, folder: Path) -> None:
    server.drop_after = CUT
    assert "connection to Kaggle's storage broke" in refused(folder, attempts=1)
    server.drop_after = None
    fetch(folder)
    assert holds(folder) == FILES
    first, second = starts(server)
    assert first == 0
    assert 2_000_000 < second <= CUT


@pytest.mark.parametrize("checksum", [True, False])
def test_an_error_page_never_becomes_a_part_of_the_archive(
    server: KaggleServer, folder: Path, checksum: bool
) -> None:
    server.checksum, server.drop_after = checksum, CUT
    refused(folder, attempts=1)
    server.drop_after, server.storage_statuses = None, [0, 503]
    fetch(folder)
    assert holds(folder) == FILES
    assert [start > 0 for start in starts(server)] == [False, True, False]


def test_the_rest_of_another_archive_is_never_appended(server: KaggleServer, folder: Path) -> None:
    server.drop_after = CUT
    refused(folder, attempts=1)
    files = FILES | {"wsi/a.png": FILES["wsi/b.png"], "wsi/b.png": FILES["wsi/a.png"]}
    server.versions[3], server.drop_after = packed(files), None  # as long as the first
    fetch(folder)
    assert holds(folder) == files


def test_damage_on_the_way_is_noticed_and_downloaded_again(server: KaggleServer, folder: Path) -> None:
    server.drop_after = CUT
    refused(folder, attempts=1)
    (partial,) = folder.parent.rglob("*.zip")
    partial.write_bytes(bytes(partial.stat().st_size))
    server.drop_after = None
    assert "damaged" in refused(folder, attempts=1)
    fetch(folder)
    assert holds(folder) == FILES


def test_without_a_network_the_message_says_so(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path
) -> None:
    signed_in.setenv("http_proxy", "http://127.0.0.1:1")
    assert "no connection to Kaggle" in refused(folder)


def test_a_killed_download_is_never_taken_for_whole_and_continues(server: KaggleServer, folder: Path) -> None:
    server.drop_after, server.stall = CUT, True
    code = (
        "import sys, pathlib; from aplsmear.params import Kaggle; import aplsmear.sources.kaggle as kaggle; "
        "kaggle.obtain(Kaggle(owner=sys.argv[1], slug=sys.argv[2], version=3), pathlib.Path(sys.argv[3]))"
    )
    part = folder.with_name(folder.name + ".kaggle.part")
    with subprocess.Popen(
        [sys.executable, "-c", code, OWNER, SLUG, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert server.halfway.wait(30)
        until = time.monotonic() + 30
        while sum(path.stat().st_size for path in part.glob("*.zip")) == 0 and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not folder.exists()
    server.stall, server.drop_after = False, None
    (part / "files" / "wsi").mkdir(parents=True)  # as of one killed later, while it unpacked
    (part / "files" / "wsi" / "a.png").write_bytes(b"half a smear")
    fetch(folder)
    assert holds(folder) == FILES
    assert list(folder.parent.iterdir()) == [folder]
    assert starts(server)[-1] > 0


# --- refusals of Kaggle ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "does not accept the credentials"),
        (403, "accept the terms"),
        (404, "no such data set"),
        (418, "refused the request (HTTP 418)"),
    ],
)
def test_a_refusal_is_told_at_once(server: KaggleServer, folder: Path, status: int, told: str) -> None:
    server.statuses = [status]
    assert told in refused(folder)
    assert len(server.seen) == 1


def test_a_wrong_version_and_a_data_set_that_was_moved_say_what_to_correct(
    server: KaggleServer, folder: Path
) -> None:
    for message in (refused(folder, 99), refused(folder, slug="smeers")):
        assert "no such data set, or not this version" in message
        assert "was moved, renamed or removed" in message
        assert "dataset.kaggle.owner, slug and version in params.yaml" in message


@pytest.mark.parametrize(
    ("status", "told"), [(429, "too many requests"), (503, "does not work at present (HTTP 503)")]
)
def test_a_passing_failure_is_tried_again_and_then_told(
    server: KaggleServer, folder: Path, status: int, told: str
) -> None:
    server.statuses = [status] * 3
    message = refused(folder)
    assert told in message
    assert "after 3 attempts" in message
    server.statuses = [status] * 2
    fetch(folder)
    assert holds(folder) == FILES


def test_an_expired_address_of_the_storage_is_asked_for_again(server: KaggleServer, folder: Path) -> None:
    server.storage_statuses = [403, 500]
    fetch(folder)
    assert holds(folder) == FILES
    server.storage_statuses = [403] * 3
    assert "storage refused the download (HTTP 403)" in refused(folder.with_name("other"))


# --- credentials ----------------------------------------------------------------------------------


def test_without_credentials_a_public_data_set_is_downloaded(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path
) -> None:
    signed_in.delenv("KAGGLE_USERNAME")
    signed_in.delenv("KAGGLE_KEY")
    fetch(folder)
    assert {seen.authorization for seen in server.seen} == {None}


def test_without_credentials_the_message_says_where_they_belong(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path
) -> None:
    signed_in.delenv("KAGGLE_KEY")
    server.public = False
    message = refused(folder)
    assert "there are none on this computer" in message
    assert "~/.kaggle/kaggle.json" in message
    server.statuses = [403]
    assert "there are none on this computer" in refused(folder)


@pytest.mark.parametrize("place", ["environment", "kaggle.json", "token", "token file"])
def test_credentials_are_found_in_kaggles_usual_places_and_not_sent_to_the_storage(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path, tmp_path: Path, place: str
) -> None:
    server.public = False
    if place != "environment":
        signed_in.delenv("KAGGLE_USERNAME")
        signed_in.delenv("KAGGLE_KEY")
    if place == "kaggle.json":
        (tmp_path / "home" / ".kaggle" / "kaggle.json").write_text(json.dumps({"username": USER, "key": KEY}))
    if place == "token":
        signed_in.setenv("KAGGLE_API_TOKEN", KEY)
    if place == "token file":
        (tmp_path / "home" / ".kaggle" / "access_token").write_text(KEY + "\n")
    if "token" in place:
        server.accepts = f"Bearer {KEY}"
    fetch(folder)
    assert {seen.authorization for seen in server.seen if seen.host == "localhost"} == {server.accepts}
    assert {seen.authorization for seen in server.downloads} == {None}


@pytest.mark.parametrize(
    "text", [f'{{"username": "{USER}", "key": "{KEY}', f'["{KEY}"]', "7", '{"username": 1}']
)
def test_a_damaged_credentials_file_is_told_without_its_content(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path, tmp_path: Path, text: str
) -> None:
    signed_in.delenv("KAGGLE_KEY")
    (tmp_path / "home" / ".kaggle" / "kaggle.json").write_text(text)
    message = refused(folder)
    assert "credentials on this computer cannot be used" in message
    assert KEY not in message


def setting(server: KaggleServer, **values: Any) -> Callable[[], None]:
    return lambda: [setattr(server, name, value) for name, value in values.items()] and None


def test_secrets_are_in_no_output_log_file_or_exception(
    server: KaggleServer,
    signed_in: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "raw"
    caplog.set_level(logging.DEBUG)
    signed_in.setattr(logging.getLogger("kagglehub"), "propagate", True)
    signed_in.setenv("no_proxy", "127.0.0.1")
    told = [repr(fetch(folder.with_name("good")))]
    troubles: list[Callable[[], None]] = [
        *(setting(server, statuses=[status] * 3) for status in (400, 401, 403, 404, 429, 500)),
        setting(server, storage_statuses=[403] * 3),
        setting(server, storage_statuses=[0, 403] * 3),
        setting(server, drop_after=0),
        setting(server, storage="127.0.0.1:1"),
        setting(server, storage="storage.localhost", drop_after=None, versions={3: packed({"evil": b"x"})}),
        setting(server, versions={3: b"no zip"}),
        setting(server, accepts="nobody"),
        lambda: signed_in.setenv("KAGGLE_API_TOKEN", f"{KEY}\nsecond line"),
        lambda: signed_in.setenv("KAGGLE_API_TOKEN", f"{KEY}\u2028"),
        lambda: signed_in.setenv("http_proxy", "http://127.0.0.1:1"),
    ]
    for trouble in troubles:
        trouble()
        with pytest.raises(KaggleError) as caught:
            fetch(folder)
        error: BaseException | None = caught.value
        while error is not None:  # all that a traceback or a debugger can show
            told += [str(error), repr(error), repr(vars(error))]
            frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
            told += [repr(names) for names in frames if "told" not in names]
            error = error.__cause__ or error.__context__
    captured = capfd.readouterr()
    files = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    everything = "\n".join([*told, captured.out, captured.err, *files])
    for secret in (KEY, BASIC, SIGNATURE):
        assert secret not in everything
    assert "storage.localhost" in caplog.text  # a log of the network shows addresses, but never the key
    assert KEY not in caplog.text
    assert BASIC not in caplog.text


# --- archives that must not be unpacked -----------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.png", "wsi/../../evil.png", "/etc/evil.png", "..\\evil.png"])
@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFLNK])
def test_an_archive_writes_no_link_and_nothing_outside_of_its_folder(
    server: KaggleServer, folder: Path, tmp_path: Path, name: str, kind: int
) -> None:
    member = zipfile.ZipInfo(name)
    member.external_attr = (kind | 0o777) << 16
    buffer = io.BytesIO(WHOLE)
    with zipfile.ZipFile(buffer, "a") as bundle:
        bundle.writestr(member, "../../../home")
    server.versions[3] = buffer.getvalue()
    fetch(folder)
    written = [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()]
    assert len(written) == len(FILES) + 2  # the member and the marker
    assert all(path.is_relative_to(folder) and not path.is_symlink() for path in written)


def test_a_bomb_is_refused(server: KaggleServer, folder: Path) -> None:
    server.versions[3] = packed({"wsi.csv": b"", "wsi/c.png": bytes(60_000_000)})
    assert "a bomb" in refused(folder)


@pytest.mark.parametrize(
    ("archive", "told"),
    [
        (b"<html>Please sign in to this network</html>", "BadZipFile"),
        (WHOLE[:-9], "BadZipFile"),
        (
            packed(FILES, method=zipfile.ZIP_STORED).replace(FILES["wsi/a.png"][:9], b"corrupted"),
            "BadZipFile",
        ),
        (packed({"wsi.csv": b"", "wsi.csv/a.png": b""}), "damaged (NotADirectoryError)"),
        (packed({"cells.csv": b"", "images/a.png": b""}), "0 files of the name wsi.csv"),
        (packed({"a/wsi.csv": b"", "b/wsi.csv": b""}), "2 files of the name wsi.csv"),
    ],
)
def test_an_archive_that_is_damaged_or_no_data_set_is_refused_and_removed(
    server: KaggleServer, folder: Path, archive: bytes, told: str
) -> None:
    server.versions[3] = archive
    assert told in refused(folder)
    assert [path for path in folder.parent.rglob("*") if path.is_file()] == []


# --- disk -----------------------------------------------------------------------------------------


def test_too_little_space_is_told_before_the_download(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path
) -> None:
    usage = shutil.disk_usage(folder.anchor)._replace(free=9_000_000)  # archive and files need 12 MB
    signed_in.setattr("shutil.disk_usage", lambda _: usage)
    assert "is full: 0.012 GB needed, 0.009 GB free" in refused(folder)
    assert server.downloads == []


def test_a_download_that_filled_the_disk_continues_later(server: KaggleServer, folder: Path) -> None:
    """The stage then says that the disk is full (tests/runs/test_stage.py)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CUT, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fetch(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fetch(folder)
    assert holds(folder) == FILES
    assert starts(server) == [0, CUT]


# --- other files in the folder --------------------------------------------------------------------


def test_files_that_were_there_before_are_left_alone(server: KaggleServer, folder: Path) -> None:
    folder.mkdir(parents=True)
    fetch(folder)  # into an empty folder
    mine = folder.with_name("mine")
    mine.mkdir()
    (mine / "wsi.csv").write_text("my own")
    (folder.with_name("a file")).touch()
    for path in (mine, folder.with_name("a file")):
        assert f"this program did not download {path}" in refused(path)


def test_a_download_that_was_changed_is_neither_used_nor_replaced(server: KaggleServer, folder: Path) -> None:
    fetch(folder)
    (folder / "wsi.csv").write_text("id,imgName,label,patient\n")
    server.versions[4] = WHOLE
    for version in (3, 4):
        assert "was changed after the download" in refused(folder, version)


def test_another_data_set_in_the_folder_is_left_alone(server: KaggleServer, folder: Path) -> None:
    fetch(folder)
    assert f"holds another data set: {OWNER}/{SLUG}" in refused(folder, slug="other")


def test_an_experiment_in_a_folder_of_its_own_takes_the_earlier_download(
    server: KaggleServer, tmp_path: Path
) -> None:
    """As the stage runs in the queue and under `dvc exp run --temp`: DVC_ROOT names the main folder."""
    top, aside = tmp_path / "top", tmp_path / "aside"
    fetch(top / "kaggle")
    server.versions[4] = packed(FILES | {"wsi.csv": b"newer"})
    aside.mkdir()
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for version, downloads in ((3, False), (4, True)):
        params["dataset"] |= {"source": "kaggle", "root": "kaggle"}
        params["dataset"]["kaggle"] = {"owner": OWNER, "slug": SLUG, "version": version}
        (aside / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        server.seen.clear()
        done = subprocess.run(
            [sys.executable, "-P", ROOT / "stages" / "kaggle.py"],
            cwd=aside,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "DVC_ROOT": str(top)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (aside / "kaggle").is_symlink() != downloads
        assert bool(server.seen) == downloads
    assert holds(aside / "kaggle")["wsi.csv"] == b"newer"
    assert holds(top / "kaggle") == FILES
