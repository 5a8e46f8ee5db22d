"""Downloading from Kaggle: the real client against a server of our own."""

from __future__ import annotations

import hashlib
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
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from aplsmear.sources.kaggle import MARKER, KaggleError, Obtained, obtain
from kaggle_server import BASIC, KEY, OWNER, SIGNATURE, SLUG, USER, KaggleServer

ROOT = Path(__file__).parents[2]

pytest.importorskip("kagglehub", reason="Kaggle's client is not installed")

FILES = {
    "wsi.csv": b"id,imgName,label\n1,a.png,m3\n2,b.png,healthy\n",
    "labeled_cells.csv": b"id,wsi,cellType,bbox\n",
    "wsi/a.png": np.random.default_rng(1).bytes(150_000),  # bytes that no packing makes smaller, as of images
    "wsi/b.png": np.random.default_rng(2).bytes(150_000),
}


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
    """A machine with nobody's credentials but the planted ones."""
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


def fetch(folder: Path, version: int | None = 3, attempts: int = 3, progress: bool = False) -> Obtained:
    return obtain(OWNER, SLUG, version, folder, progress=progress, attempts=attempts, pause=0.0)


def refused(folder: Path, version: int | None = 3, attempts: int = 3) -> str:
    """The message of a download that must fail, with nothing that passes for a data set left behind."""
    before = holds(folder) if folder.is_dir() else None
    with pytest.raises(KaggleError) as caught:
        fetch(folder, version, attempts)
    assert (holds(folder) if folder.is_dir() else None) == before
    message = str(caught.value)
    for part in (
        "What to do:",
        "By hand:",
        f"https://www.kaggle.com/datasets/{OWNER}/{SLUG}",
        "dataset.root",
    ):
        assert part in message
    return message


# ---- what arrives


def test_a_download_is_put_in_place_and_described(server: KaggleServer, folder: Path) -> None:
    obtained = fetch(folder)
    assert holds(folder) == FILES
    assert list(folder.parent.iterdir()) == [folder]
    lines = "".join(f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n" for name in sorted(FILES))
    total = sum(map(len, FILES.values()))
    assert obtained == Obtained(OWNER, SLUG, 3, 4, total, hashlib.sha256(lines.encode()).hexdigest())


def test_a_complete_download_is_not_downloaded_again(server: KaggleServer, folder: Path) -> None:
    first = fetch(folder)
    server.seen.clear()
    assert fetch(folder) == first
    assert server.seen == []
    assert fetch(folder, None) == first  # whether it is the newest, only Kaggle knows
    assert [seen.call for seen in server.seen] == ["GetDataset"]


def test_the_newest_version_is_asked_for_and_named(server: KaggleServer, folder: Path) -> None:
    server.versions[7] = packed(FILES | {"wsi.csv": b"newer"})
    assert fetch(folder, None).version == 7
    assert (folder / "wsi.csv").read_bytes() == b"newer"


def test_another_version_replaces_the_one_in_place(server: KaggleServer, folder: Path) -> None:
    server.versions[4] = packed({"wsi.csv": b"of version 4"})
    fetch(folder)
    fetch(folder, 4)
    assert holds(folder) == {"wsi.csv": b"of version 4"}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("top", ["marrow/", "outer/inner folder/"])
def test_a_folder_around_everything_is_left_out(server: KaggleServer, folder: Path, top: str) -> None:
    plain = fetch(folder)
    server.versions[3] = packed(FILES, top, zipfile.ZIP_STORED)
    other = folder.with_name("other")
    assert fetch(other).fingerprint == plain.fingerprint
    assert holds(other) == FILES


def test_progress_is_shown_when_asked_for(
    server: KaggleServer, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch(folder)
    assert capfd.readouterr() == ("", "")
    fetch(folder.with_name("other"), progress=True)
    assert f"{SLUG} v3: 100%" in capfd.readouterr().err


def test_an_answer_without_storage_or_length_will_do(server: KaggleServer, folder: Path) -> None:
    server.redirects = server.lengths = server.checksum = False
    fetch(folder)
    assert holds(folder) == FILES


# ---- what breaks off


@pytest.mark.parametrize("checksum", [True, False])
def test_broken_connections_resume_where_they_broke(
    server: KaggleServer, folder: Path, checksum: bool
) -> None:
    server.checksum, server.drop_after, server.drops = (
        checksum,
        40_000,
        6,
    )  # more than the attempts without progress
    fetch(folder)
    assert holds(folder) == FILES
    starts = [int((seen.range or "bytes=0-")[6:-1]) for seen in server.downloads]
    assert len(starts) == 7
    assert np.diff(starts).min() > 20_000


def test_a_storage_that_cannot_resume_starts_over(server: KaggleServer, folder: Path) -> None:
    server.ranges, server.drop_after, server.drops = False, 200_000, 2
    fetch(folder)
    assert holds(folder) == FILES


def test_a_dropped_connection_is_said_and_the_next_run_goes_on(server: KaggleServer, folder: Path) -> None:
    server.drop_after = 100_000
    assert "connection to Kaggle's storage broke" in refused(folder, attempts=1)
    server.drop_after = None
    fetch(folder)
    assert holds(folder) == FILES
    first, second = server.downloads
    assert first.range is None
    assert second.range is not None
    assert 80_000 < int(second.range[6:-1]) <= 100_000


def test_a_rest_is_never_put_behind_another_archive(server: KaggleServer, folder: Path) -> None:
    server.checksum, server.drop_after = False, 100_000
    refused(folder, attempts=1)
    files = FILES | {"wsi/a.png": FILES["wsi/b.png"], "wsi/b.png": FILES["wsi/a.png"]}
    server.versions[3], server.drop_after = packed(files), None  # as long as the first
    fetch(folder)
    assert holds(folder) == files


def test_no_server_at_all(server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path) -> None:
    signed_in.setenv("http_proxy", "http://127.0.0.1:1")
    for version in (3, None):
        assert "no connection to Kaggle" in refused(folder, version)


def test_a_killed_download_never_passes_for_whole_and_goes_on(server: KaggleServer, folder: Path) -> None:
    server.drop_after, server.stall = 100_000, True
    code = (
        "import sys, pathlib, aplsmear.sources.kaggle as k; "
        "k.obtain(*sys.argv[1:3], 3, pathlib.Path(sys.argv[3]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, OWNER, SLUG, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    ) as process:
        assert server.halfway.wait(30)
        part = folder.with_name(folder.name + ".kaggle.part")
        process.send_signal(signal.SIGKILL)
    assert not folder.exists()
    assert part.exists()
    server.stall, server.drop_after = False, None
    (part / "files" / "wsi").mkdir(parents=True)  # as of one killed later, while it unpacked
    (part / "files" / "wsi" / "a.png").write_bytes(b"half a smear")
    fetch(folder)
    assert holds(folder) == FILES
    assert list(folder.parent.iterdir()) == [folder]


# ---- what Kaggle refuses


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "does not accept the credentials"),
        (403, "accept the terms"),
        (404, "no such data set"),
        (418, "refused (HTTP 418)"),
    ],
)
def test_a_refusal_is_said_at_once(server: KaggleServer, folder: Path, status: int, said: str) -> None:
    for version in (3, None):
        server.seen.clear()
        server.statuses = [status]
        assert said in refused(folder, version)
        assert len(server.seen) == 1


def test_wrong_names_and_versions_are_no_such_data_set(server: KaggleServer, folder: Path) -> None:
    assert "no such data set" in refused(folder, 99)
    with pytest.raises(KaggleError, match="a-lab/smeers version 3: Kaggle has no such data set"):
        obtain(OWNER, "smeers", 3, folder, progress=False)


@pytest.mark.parametrize(
    ("status", "said"), [(429, "asked too often (HTTP 429)"), (503, "out of order (HTTP 503)")]
)
def test_what_may_pass_is_tried_again_and_then_said(
    server: KaggleServer, folder: Path, status: int, said: str
) -> None:
    server.statuses = [status] * 3
    message = refused(folder)
    assert said in message
    assert "after 3 attempts" in message
    server.statuses = [status] * 2
    fetch(folder)
    assert holds(folder) == FILES


def test_a_long_wait_is_not_sat_out(server: KaggleServer, folder: Path) -> None:
    server.statuses, server.retry_after = [429], "7200"
    assert "asks to wait 7200 s" in refused(folder)
    assert len(server.seen) == 1


def test_an_expired_address_of_the_storage_is_asked_for_anew(server: KaggleServer, folder: Path) -> None:
    server.storage_statuses = [403, 500]
    fetch(folder)
    assert holds(folder) == FILES
    server.storage_statuses = [403] * 3
    assert "storage refused the download (HTTP 403)" in refused(folder.with_name("other"))


# ---- credentials


def test_without_credentials_a_public_data_set_is_obtained(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path
) -> None:
    signed_in.delenv("KAGGLE_USERNAME")
    signed_in.delenv("KAGGLE_KEY")
    fetch(folder)
    assert {seen.authorization for seen in server.seen} == {None}


def test_without_credentials_a_data_set_that_needs_them_says_where_they_go(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path
) -> None:
    signed_in.delenv("KAGGLE_KEY")
    server.public = False
    message = refused(folder)
    assert "no Kaggle credentials on this machine" in message
    assert "~/.kaggle/kaggle.json" in message
    server.statuses = [403]
    assert "no Kaggle credentials on this machine" in refused(folder)


@pytest.mark.parametrize("place", ["environment", "kaggle.json", "token", "token file"])
def test_credentials_come_from_kaggles_usual_places(
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
    assert {seen.authorization for seen in server.downloads} == {None}  # the storage is not to know


@pytest.mark.parametrize(
    "text", [f'{{"username": "{USER}", "key": "{KEY}', f'["{KEY}"]', "7", '{"username": 1}']
)
def test_a_broken_credentials_file_is_said_without_its_content(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path, tmp_path: Path, text: str
) -> None:
    signed_in.delenv("KAGGLE_KEY")
    (tmp_path / "home" / ".kaggle" / "kaggle.json").write_text(text)
    message = refused(folder)
    assert "credentials on this machine cannot be used" in message
    assert KEY not in message


def breaks(server: KaggleServer, **settings: Any) -> Callable[[], None]:
    return lambda: [setattr(server, name, value) for name, value in settings.items()] and None


def test_secrets_reach_no_output_log_file_or_exception(
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
    said = [repr(fetch(folder.with_name("good"), progress=True))]
    troubles: list[Callable[[], None]] = [
        *(breaks(server, statuses=[status] * 3) for status in (400, 401, 403, 404, 429, 500)),
        breaks(server, storage_statuses=[403] * 3),
        breaks(server, drop_after=0),
        breaks(server, storage="127.0.0.1:1"),
        breaks(server, storage="storage.localhost", drop_after=None, versions={3: packed({"../evil": b"x"})}),
        breaks(server, versions={3: b"no zip"}),
        breaks(server, accepts="nobody"),
        lambda: signed_in.setenv("KAGGLE_API_TOKEN", f"{KEY}\nsecond line"),
        lambda: signed_in.setenv("KAGGLE_API_TOKEN", f"{KEY}\u2028"),
        lambda: signed_in.setenv("http_proxy", "http://127.0.0.1:1"),
    ]
    for trouble in troubles:
        trouble()
        with pytest.raises(KaggleError) as caught:
            fetch(folder, progress=True)
        error: BaseException | None = caught.value
        while error is not None:  # what a traceback, or whoever looks deeper, can show
            said += [str(error), repr(error), repr(vars(error))]
            frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
            said += [repr(names) for names in frames if "said" not in names]
            error = error.__cause__ or error.__context__
    captured = capfd.readouterr()
    files = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    everything = "\n".join([*said, captured.out, captured.err, *files])
    for secret in (KEY, BASIC, SIGNATURE):
        assert secret not in everything
    assert "storage.localhost" in caplog.text  # whoever debugs the network sees addresses, but never the key
    assert KEY not in caplog.text
    assert BASIC not in caplog.text


# ---- what must not be unpacked


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ("../evil.png", "would leave the folder"),
        ("wsi/../../evil.png", "would leave the folder"),
        ("/etc/evil.png", "would leave the folder"),
        ("C:/evil.png", "would leave the folder"),
        ("..\\evil.png", "would leave the folder"),
        (link("wsi/evil"), "is a link"),
        ("WSI.csv", "is the same file as 'wsi.csv'"),
        ("wsi.csv/evil.png", "is a file and a folder"),
        ("wsi/evil\n.png", "is no name for a file"),
        (MARKER, "is no name for a file"),
    ],
)
def test_an_archive_that_would_do_harm_is_refused(
    server: KaggleServer, folder: Path, tmp_path: Path, member: str | zipfile.ZipInfo, said: str
) -> None:
    buffer = io.BytesIO(WHOLE)
    with zipfile.ZipFile(buffer, "a") as bundle:
        bundle.writestr(member, "../../../home")
        bundle.writestr("../second.png", "")
    server.versions[3] = buffer.getvalue()
    message = refused(folder)
    assert said in message
    assert "'../second.png' would leave the folder" in message  # all of them at once
    left = [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()]
    assert left == []


def test_a_bomb_is_refused(server: KaggleServer, folder: Path) -> None:
    server.versions[3] = packed(FILES | {"wsi/c.png": bytes(60_000_000)})
    assert "a bomb" in refused(folder)


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (b"<html>Please sign in to this network</html>", "BadZipFile"),
        (
            packed(FILES, method=zipfile.ZIP_STORED).replace(FILES["wsi/a.png"][:9], b"corrupted"),
            "BadZipFile",
        ),
        (
            packed({"cells.csv": b"", "images/a.png": b""}),
            "no wsi.csv at its top, which holds: cells.csv, images",
        ),
        (packed({}), "which holds: nothing"),
    ],
)
def test_what_is_no_data_set_is_refused_and_removed(
    server: KaggleServer, folder: Path, archive: bytes, said: str
) -> None:
    server.versions[3] = archive
    assert said in refused(folder)
    assert [path for path in folder.parent.rglob("*") if path.is_file()] == []


def test_damage_on_the_way_is_noticed_by_the_checksum(server: KaggleServer, folder: Path) -> None:
    server.drop_after = 100_000
    refused(folder, attempts=1)
    (partial,) = folder.parent.rglob("*.zip")
    partial.write_bytes(bytes(partial.stat().st_size))
    server.drop_after = None
    assert "its checksum is not what Kaggle says" in refused(folder)
    fetch(folder)
    assert holds(folder) == FILES


# ---- the disk


def test_too_little_space_is_said_before_the_download(
    server: KaggleServer, signed_in: pytest.MonkeyPatch, folder: Path
) -> None:
    usage = shutil.disk_usage(folder.anchor)._replace(free=500_000)  # the archive and its files need 600,000
    signed_in.setattr("shutil.disk_usage", lambda _: usage)
    assert "is full: 0.000601 GB needed, 0.0005 GB free" in refused(folder)
    assert server.downloads == []


def test_a_disk_that_fills_up_is_said_and_the_download_goes_on_later(
    server: KaggleServer, folder: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        message = refused(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "is full" in message
    assert "what has arrived is kept" in message
    fetch(folder)
    assert [seen.range for seen in server.downloads] == [None, "bytes=200000-"]


def test_a_folder_that_cannot_be_written_is_named(server: KaggleServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"cannot write or read {tmp_path / 'file'}" in refused(tmp_path / "file" / "raw")


# ---- other people's folders


def test_files_that_were_there_before_are_left_alone(server: KaggleServer, folder: Path) -> None:
    folder.mkdir(parents=True)
    fetch(folder)  # an empty one is welcome
    mine = folder.with_name("mine")
    mine.mkdir()
    (mine / "wsi.csv").write_text("my own")
    assert "were not downloaded by this program" in refused(mine)


def test_a_download_that_was_changed_is_neither_used_nor_replaced(server: KaggleServer, folder: Path) -> None:
    fetch(folder)
    (folder / "wsi.csv").write_text("id,imgName,label,patient\n")
    server.versions[4] = WHOLE
    for version in (3, 4):
        assert "was changed after its download" in refused(folder, version)


def test_an_experiment_in_a_folder_of_its_own_borrows_what_is_there_and_downloads_what_is_not(
    server: KaggleServer, tmp_path: Path
) -> None:
    """As the stage runs under `dvc exp run --temp` and in the queue: DVC_ROOT says where it was typed."""
    top, aside = tmp_path / "top", tmp_path / "aside"
    fetch(top / "kaggle")
    server.versions[4] = packed(FILES | {"wsi.csv": b"newer"})
    aside.mkdir()
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for version, calls in ((3, False), (4, True)):
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
        assert (aside / "kaggle").is_symlink() != calls
        assert bool(server.seen) == calls
    assert holds(aside / "kaggle")["wsi.csv"] == b"newer"
    assert holds(top / "kaggle") == FILES
