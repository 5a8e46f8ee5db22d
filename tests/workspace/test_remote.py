"""Outs are shared through a folder or an S3 store: a faulty remote is explained, and all objects arrive."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from aplsmear.errors import UserError
from aplsmear.workspace import remote as share
from aplsmear.workspace.dvc_api import check_remote
from clones import commit, run, stages_run
from s3_server import BUCKET, ID, SECRET, S3Server

ROOT = Path(__file__).parents[2]
MOST_OBJECTS = 190  # of the whole demo: three ensembles with the evidence of their cells, and the one answer


KEYS = {"AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": SECRET}
NOWHERE = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent/config",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3") / "buckets") as started:
        yield started


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty DVC repository."""
    folder = tmp_path_factory.mktemp("empty") / "a clone"
    folder.mkdir()
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    return folder


@pytest.fixture
def check(empty: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message of `share-check` about a remote: the error, or its lines if the remote works."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**NOWHERE, **KEYS}.items():
        monkeypatch.setenv(name, value)

    def say(url: str | Path, endpoint: str = "") -> str:
        lines = ["['remote \"lab\"']", f"    url = {url}"] + [f"    endpointurl = {endpoint}"] * bool(
            endpoint
        )
        (empty / ".dvc" / "config.local").write_text("\n".join(lines), encoding="utf-8")
        try:
            said = "\n".join(check_remote(empty, "lab"))
        except UserError as error:
            said = str(error)
        assert SECRET not in said
        assert ID not in said
        return said

    return say


def share_check(folder: Path, *words: str, keys: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit code of `aplsmear share-check` and its output."""
    command = [sys.executable, "-m", "aplsmear.cli", "share-check", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")} | (keys or {})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


# --- faulty remotes --------------------------------------------------------------------------------


def test_a_remote_that_works_is_fine_and_stays_as_it_was(
    check: Callable[..., str], server: S3Server, tmp_path: Path
) -> None:
    before = server.objects
    assert re.search(r"^Remote lab .*: fine\.", check(f"s3://{BUCKET}/some/where", server.endpoint))
    assert server.objects == before
    folder = tmp_path / "shared disk"
    folder.mkdir()
    assert re.search(r"^Remote lab .*: fine\.", check(folder))
    assert list(folder.iterdir()) == []


def test_a_wrong_an_unknown_and_a_missing_key_have_different_messages(
    check: Callable[..., str], server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/apl"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert re.search(r"wrong key: the secret .*environment, AWS_ACCESS_KEY_ID", check(url, server.endpoint))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert re.search(r"wrong key: the store does not know this access key id", check(url, server.endpoint))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert re.search(
        r"no key: .*\n  What to do: .*config|--local lab access_key_id", check(url, server.endpoint)
    )


def test_a_missing_bucket_is_reported(check: Callable[..., str], server: S3Server) -> None:
    assert "no such bucket: none-such" in check("s3://none-such/apl", server.endpoint)


def test_an_unreachable_server_is_reported_within_seconds(check: Callable[..., str]) -> None:
    url = f"s3://{BUCKET}/apl"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "unreachable: the server does not answer within 4 s" in check(url, address)
    assert "unreachable: no server answers there" in check(url, address)


def test_a_read_only_store_is_reported(check: Callable[..., str], tmp_path: Path) -> None:
    """This server does not answer a write at all; others answer AccessDenied."""
    with S3Server(tmp_path / "buckets", ("--read-only",)) as server:
        assert "read-only: it can be read, not written" in check(f"s3://{BUCKET}/apl", server.endpoint)


@pytest.mark.parametrize("minutes", [-40, 40])
def test_clock_skew_is_reported(check: Callable[..., str], minutes: int) -> None:
    class Late(BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate((timestamp or time.time()) + 60 * minutes, usegmt=True)

        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Late) as late:
        thread = threading.Thread(target=late.handle_request)
        thread.start()
        said = check(f"s3://{BUCKET}/apl", f"http://127.0.0.1:{late.server_port}")
        thread.join()
    assert (
        f"clock skew: the clock of this machine is 40 minutes {'behind' if minutes > 0 else 'ahead of'}"
        in said
    )


def test_folders_that_cannot_be_used_are_reported(check: Callable[..., str], tmp_path: Path) -> None:
    said = check(tmp_path / "new")
    assert "fine, and not there yet: the first `dvc push` makes it" in said
    assert not (tmp_path / "new").exists()
    assert f"neither this folder nor {tmp_path / 'unmounted'} exists" in check(tmp_path / "unmounted" / "apl")
    (tmp_path / "file").touch()
    assert "this is a file" in check(tmp_path / "file")


def broken(error: Exception | None, *, readable: bool = True) -> Mock:
    """A file system that fails to write, or returns other bytes."""
    files = Mock()
    files.pipe_file.side_effect = error
    files.cat_file.return_value = b"other"
    files.ls.side_effect = None if readable else PermissionError
    return files


def answered(code: str) -> Exception:
    """The exception of s3fs for an error code of S3: its cause is the exception of botocore."""
    cause = Exception(SECRET)
    cause.response = {"Error": {"Code": code, "Message": SECRET}}  # type: ignore[attr-defined]
    error = OSError(SECRET)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (broken(OSError(errno.EROFS, "")), "read-only"),
        (broken(PermissionError(errno.EACCES, "")), "read-only"),
        (broken(PermissionError(errno.EACCES, ""), readable=False), "no rights"),
        (broken(OSError(errno.ENOSPC, "")), "it is full"),
        (broken(answered("AccessDenied")), "read-only"),
        (broken(answered("AccessDenied"), readable=False), "no rights"),
        (broken(answered("ExpiredToken"), readable=False), "its session has ended"),
        (broken(answered("RequestTimeTooSkewed"), readable=False), "clock skew"),
        (broken(answered("PermanentRedirect"), readable=False), "another region"),
        (broken(answered("Unheard")), "it fails with Unheard"),
        (broken(None), "was not read back as it was written"),
    ],
)
def test_every_failure_has_a_message_without_keys(files: Mock, message: str) -> None:
    place = share.Place("lab", f"s3://{BUCKET}/apl", "https://s3.example.org", "~/.aws")
    with pytest.raises(share.UserError, match=message) as caught:
        share.try_out(place, files, f"{BUCKET}/apl")
    assert "What to do: " in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_key_in_the_file_that_git_shares_is_reported(check: Callable[..., str], empty: Path) -> None:
    shared = empty / ".dvc" / "config"
    before = shared.read_text(encoding="utf-8")
    shared.write_text(
        f"['remote \"lab\"']\n    url = s3://{BUCKET}\n    secret_access_key = {SECRET}\n", encoding="utf-8"
    )
    said = check(f"s3://{BUCKET}")
    shared.write_text(before, encoding="utf-8")
    assert "secret_access_key stands in .dvc/config" in said
    assert "--local" in said


def test_a_faulty_remote_ends_the_command_with_exit_code_1(empty: Path, tmp_path: Path) -> None:
    (empty / ".dvc" / "config.local").write_text(
        "['remote \"lab\"']\n    url = /dev/null\n", encoding="utf-8"
    )
    for folder, name, message in (
        (empty, "other", "There is no remote other; known: lab"),
        (tmp_path, "", "lies in no DVC repository"),
    ):
        code, said = share_check(folder, *([name] if name else []))
        assert code == 1
        assert message in said


# --- push in one clone, pull in another --------------------------------------------------------------


@dataclass
class Lab:
    """Two people: A has all results, B has a clone; between them a git repository and the store."""

    server: S3Server
    store: Path  # folder of the remote's objects on the server's disk
    a: Path
    b: Path
    keys: dict[str, str]

    def dvc(self, folder: Path, *words: str, key: str = SECRET, ok: bool = True) -> str:
        """The output of `dvc` with the keys in its environment."""
        return run(folder, "dvc", *words, env=self.keys | {"AWS_SECRET_ACCESS_KEY": key}, ok=ok)

    def start(self, folder: Path, *words: str) -> subprocess.Popen[str]:
        """The same in the background."""
        return subprocess.Popen(
            [Path(sys.executable).with_name("dvc"), *words],
            cwd=folder,
            env=os.environ | self.keys,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def objects(self) -> int:
        """The number of objects in the remote; each must have the hash in its name."""
        return sound(self.store / "files" / "md5")


def sound(folder: Path) -> int:
    """The number of objects in a cache or remote; each must have the hash in its name."""
    objects = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for path in objects:
        if (
            path.suffix != ".part" and len(path.name.removesuffix(".dir")) == 30
        ):  # not a file that is being written
            digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            assert digest == (path.parent.name + path.name).removesuffix(".dir"), path
    return len(objects)


def outs_of(folder: Path) -> list[dict[str, Any]]:
    """All outs in dvc.lock that DVC caches; the data set from Kaggle is not cached."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    return [out for name, stage in lock.items() for out in stage.get("outs", []) if name != "kaggle"]


def objects_of(folder: Path) -> int:
    """The largest number of objects for dvc.lock: each out, and each file in it, equal bytes counted once.

    Heads and backbones in a `model` are copies of other outs: manifest, model and reference are its own. The
    index of the views of a level is the same for all backbones.
    """
    levels = [out["path"].split("/")[1] for out in outs_of(folder) if out["path"].startswith("features/")]
    files = {
        out["md5"]: 3 if out["path"].endswith("/model") else out.get("nfiles", 0) for out in outs_of(folder)
    }
    return len(files) + sum(files.values()) - (len(levels) - len(set(levels)))


@pytest.fixture
def lab(small: Path, tmp_path: Path, server: S3Server) -> Lab:
    made = Lab(
        server,
        server.root / BUCKET / tmp_path.name,
        tmp_path / "A",
        tmp_path / "B, with a blank",
        {**NOWHERE, **KEYS},
    )
    run(tmp_path, "git", "clone", "--quiet", str(small), made.a.name)
    shutil.copytree(small / ".dvc" / "cache", made.a / ".dvc" / "cache")
    run(made.a, "dvc", "remote", "add", "--quiet", "--default", "lab", f"s3://{BUCKET}/{tmp_path.name}")
    run(made.a, "dvc", "remote", "modify", "lab", "endpointurl", server.endpoint)
    commit(made.a)
    run(tmp_path, "git", "clone", "--quiet", "--bare", made.a.name, "origin")
    run(made.a, "git", "remote", "set-url", "origin", str(tmp_path / "origin"))
    run(tmp_path, "git", "clone", "--quiet", "origin", made.b.name)
    return made


@pytest.mark.pipeline
def test_one_changed_task_fetches_and_runs_what_it_needs_and_reaches_others_as_an_experiment(
    lab: Lab,
) -> None:
    lab.dvc(lab.a, "push")
    changed = ("-S", "overrides.apl_aml_smear.trials=1", "ensemble_apl_aml")
    needed = ("--pull", "--allow-missing", "--name", "fewer", *changed)
    # DVC cannot pull one stage's part of a folder that several stages share (docs/share.md).
    lab.dvc(lab.b, "pull", "bottleneck", "member_apl_aml")
    said = lab.dvc(lab.b, "exp", "run", *needed)
    assert set(stages_run(said)) == {"tune@apl_aml_smear", "member_apl_aml@apl_aml_smear", "ensemble_apl_aml"}
    assert not (lab.b / "ensembles" / "apl_healthy" / "report.html").exists()
    assert sorted(path.name for path in (lab.b / "tuned").iterdir() if path.is_dir()) == [
        "apl_aml_smear",
        "blast",  # weighs cells
    ]
    assert not (lab.b / "tuned" / "blast" / "predictions.csv").exists()

    lab.dvc(lab.b, "exp", "push", "origin", "fewer", "--run-cache")
    lab.dvc(lab.a, "exp", "pull", "origin", "fewer", "--run-cache")
    said = lab.dvc(lab.a, "exp", "run", *changed)
    assert stages_run(said) == []
    # Without --allow-missing DVC fetches the outs of all earlier stages.
    run(lab.b.parent, "git", "clone", "--quiet", "origin", "C")
    said = lab.dvc(lab.b.parent / "C", "repro", "--pull", "ensemble_apl_aml")
    assert stages_run(said) == []
    assert not (lab.b.parent / "C" / "tuned" / "apl_healthy_cell").exists()
    table = (lab.b / "ensembles" / "apl_aml" / "predictions.csv").read_bytes()
    assert (lab.a / "ensembles" / "apl_aml" / "predictions.csv").read_bytes() == table


@pytest.mark.pipeline
def test_outs_that_one_person_pushes_another_pulls_and_runs_nothing_although_the_server_failed_in_the_middle(
    lab: Lab,
) -> None:
    whole = sound(lab.a / ".dvc" / "cache" / "files" / "md5")
    for folder, word, arrives in (
        (lab.a, "push", lab.store / "files"),
        (lab.b, "pull", lab.b / ".dvc" / "cache" / "files"),
    ):
        working = lab.start(folder, word)
        while working.poll() is None and not any(path.is_file() for path in arrives.rglob("[0-9a-f]*")):
            time.sleep(0.002)
        lab.server.kill()
        said, _ = working.communicate(timeout=300)
        assert working.returncode != 0
        assert "Could not connect to the endpoint URL" in said
        assert "unreachable" in share_check(folder, keys=lab.keys)[1]
        assert sound(arrives / "md5") < whole
        lab.server.start()
        lab.dvc(folder, word)
    assert lab.objects() == sound(lab.b / ".dvc" / "cache" / "files" / "md5")
    assert 0 < lab.objects() <= objects_of(lab.a)
    code, said = share_check(lab.b, keys=lab.keys)
    assert code == 0, said
    assert "`dvc pull` brings them" in said
    said = lab.dvc(lab.b, "repro", "ensemble_apl_healthy", "ensemble_apl_aml")
    assert stages_run(said) == []
    assert "is cached" not in said
    assert run(lab.b, "git", "status", "--porcelain") == ""
    for folder in (lab.a, lab.b, lab.store):
        for path in folder.rglob("*"):
            assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.pipeline
def test_messages_of_dvc_about_wrong_keys_and_buckets_hold_no_key(lab: Lab) -> None:
    for word in ("push", "pull"):
        said = lab.dvc(lab.a if word == "push" else lab.b, word, key="another", ok=False)
        assert "Forbidden" in said
        assert SECRET not in said
    run(lab.a, "dvc", "remote", "modify", "lab", "url", "s3://none-such/apl")
    assert "bucket does not exist" in lab.dvc(lab.a, "push", ok=False)


@pytest.mark.pipeline
def test_a_folder_beside_the_repository_works_as_the_remote_of_a_clone(small: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a first", tmp_path / "a second"
    run(tmp_path, "git", "clone", "--quiet", str(small), first.name)
    run(first, "dvc", "config", "--local", "cache.dir", str(small / ".dvc" / "cache"))
    assert "not there yet" in share_check(first)[1]
    run(first, "dvc", "push")
    assert sound(tmp_path / "aplsmear-shared" / "files" / "md5") <= MOST_OBJECTS
    run(tmp_path, "git", "clone", "--quiet", str(small), second.name)
    run(second, "dvc", "pull")
    assert (second / "ensembles" / "apl_healthy" / "report.html").exists()


@pytest.mark.pipeline
def test_more_patients_do_not_make_more_files(small: Path) -> None:
    """With more patients, tables and arrays grow, and the number of files stays."""
    few, many = (
        {
            out["path"]: out["nfiles"]
            for out in outs_of(folder)
            if out["path"].startswith(("dataset", "features"))
        }
        for folder in (small, ROOT)
    )
    assert few
    assert few == {path: many[path] for path in few}


def test_the_whole_demo_has_few_objects() -> None:
    assert 0 < objects_of(ROOT) <= MOST_OBJECTS
    (data,) = yaml.safe_load((ROOT / "data.dvc").read_text(encoding="utf-8"))["outs"]
    assert data["cache"] is False
