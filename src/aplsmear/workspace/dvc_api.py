"""What commands read from DVC about the repository that they run in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pandas as pd

from aplsmear.errors import UserError
from aplsmear.params import flat
from aplsmear.runs.mend import refuse_leftovers
from aplsmear.tables import read_table
from aplsmear.words import nearest
from aplsmear.workspace import remote as share
from aplsmear.workspace.compare_page import Compared
from aplsmear.workspace.experiments import WORKSPACE, Experiment
from aplsmear.workspace.paired import gain

# Parts of the names of DVC's settings whose values must not be in a file that git shares.
_SECRETS = re.compile("secret|password|token|account_key|connection_string|customer_key|access_key_id")


@contextmanager
def _repository(folder: Path) -> Iterator[Any]:
    """The DVC repository that holds a folder."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(folder)) as repo:
            yield repo
    except NotDvcRepoError:
        raise UserError(f"{folder.resolve()} lies in no DVC repository: type this in a clone.") from None


def check_remote(folder: Path, name: str | None = None) -> list[str]:
    """Test a remote (None: the default one) of the repository of a folder; lines about a remote that works.

    Raises UserError if it does not work; the message says why, and how to fix it.
    """
    from dvc.exceptions import DvcException
    from dvc.fs import ConfigError, RemoteMissingDepsError

    try:
        with _repository(folder) as repo:
            return _check_remote(repo, name)
    except RemoteMissingDepsError as error:
        failure = f"what DVC needs for remotes of this kind is not installed: {error.missing_deps}"
    except (ConfigError, DvcException) as error:
        failure = f".dvc/config or .dvc/config.local cannot be used ({type(error).__name__}): check it."
    raise UserError(failure)


def _check_remote(repo: Any, asked: str | None) -> list[str]:
    from dvc.fs import get_cloud_fs

    known: dict[str, dict[str, Any]] = repo.config["remote"]
    name = (asked or repo.config["core"].get("remote", "")).lower()
    if name not in known:
        wanted = f"There is no remote {name}{nearest(name, known)}" if name else "There is no default remote"
        listed = ", ".join(sorted(known)) or "none"
        raise UserError(f"{wanted}; known: {listed}. A new one: `dvc remote add --default lab URL`.")
    url = urlsplit(str(known[name]["url"]))
    place = share.Place(name, url._replace(netloc=url.netloc.rpartition("@")[2]).geturl())
    shared = repo.config.read("repo").get("remote", {}).get(name, {})
    secrets = list(filter(_SECRETS.search, shared))
    if secrets or urlsplit(str(shared.get("url", ""))).password:
        raise place.error(
            f"{' and '.join(secrets) or 'a password in its url'} stands in .dvc/config, which git shares.",
            f"`dvc remote modify --unset {name} {secrets[0] if secrets else 'url'}`, and set it again with "
            "--local; if it was ever committed, get a new key.",
        )
    kind, settings, path = get_cloud_fs(repo.config, name=name)
    if kind.protocol == "local":
        if not share.look_for_folder(place, Path(path)):
            return [
                f"Remote {name} ({path}): fine, and not there yet: the first `dvc push` makes it.",
                "Until then `dvc pull` finds nothing in it. docs/share.md says how to use another remote.",
            ]
        files = kind(**settings).fs
    else:
        place, files = _signed_in(place, kind, settings)
    share.try_out(place, files, path)
    return [f"Remote {name} ({place.url}): fine.", _counted(repo, place)]


def _signed_in(place: share.Place, kind: Any, settings: dict[str, Any]) -> tuple[share.Place, Any]:
    """The file system of a store. The server of an S3 store is tested first."""
    s3 = kind.protocol == "s3"
    timeouts = {"connect_timeout": share.PATIENCE, "read_timeout": share.PATIENCE} if s3 else {}
    try:
        files = share.within(lambda: kind(**settings | timeouts).fs, 3 * share.PATIENCE)  # imports much
    except Exception as error:
        raise share.explained(place, error) from None
    if s3:
        place = share.Place(place.name, place.url, files.s3.meta.endpoint_url, _key_from(settings))
        share.look_for_server(place, settings.get("ssl_verify", True))
    return place, files


def _key_from(settings: dict[str, Any]) -> str:
    """Where boto takes the key from: the first of its places that has one."""
    if "access_key_id" in settings:
        return ".dvc/config.local"
    if "AWS_ACCESS_KEY_ID" in os.environ and "profile" not in settings:
        return "the environment, AWS_ACCESS_KEY_ID"
    return "~/.aws or this machine's own role"


def _counted(repo: Any, place: share.Place) -> str:
    """A line on how many outs of this revision the remote holds."""
    wanted = {out.hash_info.value for out in repo.index.outs if out.use_cache and out.hash_info}
    held = repo.cloud.get_remote_odb(place.name)
    try:
        there = len(set(share.within(lambda: held.list_oids_exists(wanted))))
    except TimeoutError:
        return f"It did not list in time which of the {len(wanted)} outs of this revision it holds."
    verdict = f"It holds {there} of the {len(wanted)} outs of this revision"
    if there == len(wanted):
        return f"{verdict}: `dvc pull` brings them."
    return f"{verdict}: `dvc push` where they were made adds the rest, or `dvc repro` makes it here."


def compare(folder: Path, revisions: Sequence[str]) -> Compared:
    """Read what DVC has of two or more experiments, branches, tags or commits, for a page.

    ``workspace`` is the present state of the folder, the top of a repository. It comes last if it has numbers
    that the present commit, one of the revisions, lacks. Raises UserError if a name is unknown, or DVC's
    cache does not hold the results of a revision.
    """
    from dvc.scm import resolve_rev

    with _repository(folder) as repo:
        _check_revisions(repo, revisions)
        # With the workspace hidden, DVC leaves it out if it has the numbers of its branch.
        read = list(dict.fromkeys([*revisions, WORKSPACE]))
        shown = [kind.show(revs=read, hide_workspace=False) for kind in (repo.metrics, repo.params)]
        head = repo.scm.get_rev()
        present = {name for name in read if name != WORKSPACE and resolve_rev(repo.scm, name) == head}
    numbers = {name: _numbers(shown[0], name) for name in read}
    *others, here = (numbers[name] for name in read)
    uncommitted = WORKSPACE not in revisions and any(
        here.keys() - numbers[name].keys() for name in present if here not in others
    )
    for revision in revisions:
        if not numbers[revision] and not (uncommitted and revision in present):
            raise UserError(
                f"the results of {revision} are not here: `dvc exp pull REMOTE {revision}` brings those of "
                "an experiment, `dvc fetch --all-commits` those of commits."
            )
    revisions = read if uncommitted else list(revisions)
    metrics, params = (_side_by_side(kind, revisions) for kind in shown)
    with TemporaryDirectory(prefix="aplsmear-") as temporary:
        command = [sys.executable, "-m", "dvc", "plots", "diff", "--json", "--out", temporary, *revisions]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"`dvc plots diff {' '.join(revisions)}` failed:\n{done.stderr}")
        plots, pictures = _drawn(json.loads(done.stdout)["data"], folder)
    return Compared(revisions, metrics, params, plots, pictures)


def gains(folder: Path, compared: Compared) -> Iterator[str]:
    """A line for each task whose heads differ: what was gained since the first revision, with interval."""
    first, *others = compared.revisions
    for file, numbers in sorted(compared.metrics.items()):
        folders = PurePosixPath(file).parts
        values = numbers.get("auroc.value", [])
        if folders[0] != "tuned" or None in values or len(set(values)) < 2:
            continue
        path = str(PurePosixPath(file).with_name("predictions.csv"))
        tables = [_table(folder, revision, path) for revision in compared.revisions]
        for other, table in zip(others, tables[1:], strict=True):
            if text := gain(tables[0], table):
                yield f"{folders[1]}, {other} beside {first}: {text}"


def _table(folder: Path, revision: str, path: str) -> pd.DataFrame:
    """A table of a revision or of the workspace."""
    if revision == WORKSPACE:
        return read_table(folder / path)
    with TemporaryDirectory(prefix="aplsmear-") as temporary:
        copy = Path(temporary) / "table.csv"
        fetch(folder, revision, {path: copy})
        return read_table(copy)


def check_repository(folder: Path) -> None:
    """Raise UserError if a folder lies in no repository, or a killed `dvc exp run` left it in disorder."""
    with _repository(folder):
        refuse_leftovers(folder)


def run_experiment(
    folder: Path, name: str, settings: Mapping[str, str | int], targets: Sequence[str]
) -> None:
    """Run stages as an experiment in a temporary copy of a repository (`dvc exp run --temp`).

    Stages whose results are in DVC's cache are not run again. An older experiment of this name is replaced.
    `settings` are dotted keys of params.yaml with values; a key that is not there is added. Raises UserError
    if a stage has failed or was ended.
    """
    with _repository(folder) as repo:
        if name in {each for found in repo.experiments.ls().values() for each, _ in found}:
            repo.experiments.remove(name)
    changes = [f"--set-param=++{key}={_as_hydra(value)}" for key, value in settings.items()]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", name, *changes, *targets]
    done = subprocess.run(command, cwd=folder, check=False)
    if done.returncode:
        raise UserError(
            f"The experiment {name} has failed: see above. The same command again goes on after the last "
            "stage that has finished."
        )


def _as_hydra(value: str | int) -> str:
    """A value in Hydra's grammar: text in quotes; a backslash escapes only where a quote follows."""
    if isinstance(value, int):
        return str(value)
    doubled = re.sub(r"(\\+)(?='|$)", r"\1\1", value)
    return "'" + doubled.replace("'", "\\'") + "'"


def fetch(folder: Path, revision: str, paths: Mapping[str, Path]) -> None:
    """Copy files of a revision out of DVC's cache: path in the repository -> path of the copy."""
    from dvc.api import DVCFileSystem
    from dvc.scm import resolve_rev

    with _repository(folder) as repo:
        files = DVCFileSystem(str(folder), rev=resolve_rev(repo.scm, revision))
    for path, copy in paths.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(path, str(copy))


def experiments(folder: Path, commits: int = 1) -> list[Experiment]:
    """The last commits of the branch, the newest first, each followed by its experiments.

    The newest commit is first followed by the workspace, if this has other parameters or numbers. Raises
    UserError if the folder lies in no repository.
    """
    with _repository(folder) as repo:
        workspace, *states = repo.experiments.show(num=commits, hide_workspace=False)
    found = []
    for state in states:
        found.append(_experiment(state, is_commit=True))
        here = _experiment(workspace)
        if len(found) == 1 and (here.params, here.metrics) != (found[0].params, found[0].metrics):
            found.append(here)
        for line in state.experiments or []:
            done = "" if line.executor is None or line.executor.state == "success" else line.executor.state
            found.append(_experiment(line.revs[0], state=done))
    return found


def _experiment(shown: Any, is_commit: bool = False, state: str = "") -> Experiment:
    """A row of `dvc exp show`."""
    params, metrics = (
        {file: dict(flat(read.get("data") or {})) for file, read in kind.items()}
        for kind in ((shown.data.params, shown.data.metrics) if shown.data else ({}, {}))
    )
    by_name = {name: value for values in params.values() for name, value in values.items()}
    name = shown.name or (shown.rev if shown.rev == WORKSPACE else shown.rev[:7])
    return Experiment(name, is_commit, state, by_name, {} if state else metrics)


def _check_revisions(repo: Any, revisions: Sequence[str]) -> None:
    from dvc.scm import RevError, resolve_rev

    unknown = []
    for revision in revisions:
        try:
            if revision != WORKSPACE:
                resolve_rev(repo.scm, revision)
        except RevError:
            unknown.append(revision)
    if unknown:
        names = sorted(
            {name for found in repo.experiments.ls(all_commits=True).values() for name, _ in found}
        )
        listed = ", ".join(names) or "none yet; `dvc exp run` makes one"
        known = {*names, *repo.scm.list_branches(), *repo.scm.list_tags(), WORKSPACE}
        asked = " or ".join(f"{name}{nearest(name, known)}" for name in unknown)
        raise UserError(
            f"no experiment, branch, tag or commit is called {asked}.\n"
            f"  Experiments (`dvc exp list --all-commits`): {listed}"
        )


def _numbers(shown: dict[str, Any], revision: str) -> dict[tuple[str, str], Any]:
    """What DVC shows of a revision: (file, dotted name) -> value."""
    files = shown.get(revision, {}).get("data", {}).items()
    return {(file, name): value for file, read in files for name, value in flat(read.get("data", {}))}


def _side_by_side(shown: dict[str, Any], revisions: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """What DVC shows: file -> dotted name -> a value for each revision, in order."""
    columns = [_numbers(shown, revision) for revision in revisions]
    found: dict[str, dict[str, list[Any]]] = {}
    for file, name in dict.fromkeys(key for column in columns for key in column):
        found.setdefault(file, {})[name] = [column.get((file, name)) for column in columns]
    return found


def _drawn(
    shown: dict[str, list[dict[str, Any]]], folder: Path
) -> tuple[dict[str, Any], dict[str, dict[str, bytes]]]:
    """The plots of `dvc plots diff --json`, and the pictures by name and revision."""
    plots: dict[str, Any] = {}
    pictures: dict[str, dict[str, bytes]] = {}
    for name, drawn in shown.items():
        for each in drawn:
            if each["type"] == "vega":
                plots[name] = each["content"]
            else:
                pictures.setdefault(name, {})[each["revisions"][0]] = (folder / each["url"]).read_bytes()
    return plots, pictures
