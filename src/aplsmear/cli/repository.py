"""Commands about the repository: its parameters, leftovers, experiments and remotes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aplsmear.cli.base import PARAMS, app, file_to_write
from aplsmear.errors import UserError
from aplsmear.params import read_params

_PANEL = "The repository"


@app.command(rich_help_panel=_PANEL)
def profile(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A file of profiles/, without .yaml.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Parameters to change as well.")
    ] = None,
) -> None:
    """Write the parameters of a profile into params.yaml, and remove outputs that it no longer names.

    Example: `aplsmear profile demo dataset.root=/data/our_smears split.folds=10`
    """
    from aplsmear.files import whole
    from aplsmear.runs.data_root import check_root
    from aplsmear.workspace.profiles import read_profile, with_files, with_settings

    text = read_profile(Path("profiles"), name)
    pairs = dict(_pair(setting) for setting in settings or [])
    text = with_files(with_settings(text, pairs) if pairs else text)
    with whole(PARAMS) as part:
        part.write_text(text, encoding="utf-8")
        check_root(Path(read_params(part).dataset.root), Path())
    typer.echo(
        f"params.yaml is now the profile {name}" + (f" with {', '.join(pairs)} changed" if pairs else "")
    )
    _remove_leftovers()


def _pair(setting: str) -> tuple[str, str]:
    key, found, value = setting.partition("=")
    if not found or not key:
        raise UserError(f"{setting!r} is not KEY=VALUE, such as split.folds=10")
    return key, value


@app.command(rich_help_panel=_PANEL)
def tidy(
    yes: Annotated[bool, typer.Option("--yes", help="Remove old searches without a question.")] = False,
) -> None:
    """Remove outputs that params.yaml no longer names. DVC's cache keeps them.

    These are outputs of backbones, tasks and members. Then it asks whether to remove the searches in .studies
    that no `tuned/TASK/best.yaml` here comes from. Answer no if an interrupted search is to continue. A
    search that is running stays.

    Example: `aplsmear tidy`
    """
    import sys
    from datetime import datetime

    import yaml

    from aplsmear.heads.study import past_studies, remove_study

    removed = _remove_leftovers()
    best = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in Path("tuned").glob("*/best.yaml")]
    past = past_studies(Path(".studies"), {each.get("study", "") for each in best})
    for path in past:
        state = path.stat()
        last = datetime.fromtimestamp(state.st_mtime)
        typer.echo(f"{path}: {state.st_size / 1e6:.1f} MB, last written {last:%Y-%m-%d %H:%M}")
    if not past:
        if not removed:
            typer.echo("Nothing to tidy.")
    elif yes or (sys.stdin.isatty() and typer.confirm("Nothing in tuned/ comes from these. Remove them?")):
        for path in past:
            remove_study(path)
        typer.echo(f"{len(past)} searches removed")
    else:
        typer.echo("Nothing in tuned/ comes from these searches: `aplsmear tidy --yes` removes them.")


def _remove_leftovers() -> int:
    """Remove outputs that params.yaml no longer names, and return how many files and folders they were.

    What holds other files than those that stages write is named, and stays.
    """
    import shutil

    from aplsmear.workspace.profiles import leftovers, others_files

    removed = 0
    for path in leftovers(Path(), read_params(PARAMS)):
        if others := others_files(path):
            typer.echo(
                f"{path} is no longer in params.yaml, but no stage wrote {others[0]}: move it, or remove it"
            )
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        typer.echo(f"removed {path} (no longer in params.yaml; DVC keeps it in its cache)")
        removed += 1
    return removed


@app.command(rich_help_panel=_PANEL)
def mend() -> None:
    """Repair the repository after a kill, a power cut, a full or failing disk. Then type your command again.

    It repairs: locks of a DVC that no longer runs; dvc.lock, params.yaml and data.dvc that DVC wrote only in
    part; git off its branch, or your changes in git's stash, after `dvc exp run`; outputs and objects of
    DVC's cache whose content changed. It does not touch what is intact. It reads the whole cache.

    Example: `aplsmear mend`
    """
    from aplsmear.runs.mend import mend as repair

    done = 0
    for line in repair(Path()):
        typer.echo(line)
        done += 1
    typer.echo("Now type your command again." if done else "Nothing to mend.")


@app.command(rich_help_panel=_PANEL)
def experiments(
    commits: Annotated[int, typer.Option(min=1, help="How many of the last commits to show.")] = 1,
) -> None:
    """Show what each experiment changed, and each AUROC that differs, with its 95 % interval.

    `dvc exp show` shows every number and parameter, `aplsmear compare` also the plots. In MLflow, the runs of
    an experiment have its name in the tag DVC_EXP_NAME.

    Example: `aplsmear experiments --commits 3`
    """
    from rich.console import Console

    from aplsmear.workspace.dvc_api import experiments as known
    from aplsmear.workspace.experiments import advice, table

    found = known(Path(), commits)
    console = Console()
    console.print(table(found))
    for line in advice(found):
        console.print(line, markup=False, highlight=False)


@app.command(rich_help_panel=_PANEL)
def compare(
    revisions: Annotated[
        list[str],
        typer.Argument(metavar="A B [C]...", help="Experiments, branches, tags, commits, or `workspace`."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", callback=file_to_write, help="The page.")] = Path(
        "compare.html"
    ),
) -> None:
    """Write one page about the differences of experiments: numbers, parameters, plots, pictures.

    It prints for each task what the AUROC of its heads has gained since A on the same items, with the 95 %
    interval over patients.

    Example: `aplsmear compare main more-trials --out compare.html`
    """
    from aplsmear.reports import pages
    from aplsmear.workspace.compare_page import page
    from aplsmear.workspace.dvc_api import compare as compared
    from aplsmear.workspace.dvc_api import gains

    if len(revisions) < 2:
        raise UserError("A comparison needs two names or more, such as: aplsmear compare main workspace")
    found = compared(Path(), revisions)
    pages.write(out, page(found))
    if len(found.revisions) > len(revisions):
        typer.echo(
            "The workspace has results that its commit lacks, so it is on the page, too. "
            "`git commit --all --message 'Results'` keeps them."
        )
    for line in gains(Path(), found):
        typer.echo(line)
    typer.echo(f"{out} is written: open it in a browser")


@app.command("share-check", rich_help_panel=_PANEL)
def share_check(
    remote: Annotated[
        str | None,
        typer.Argument(
            metavar="[REMOTE]", help="Its name in `dvc remote list`. Default: the default remote."
        ),
    ] = None,
) -> None:
    """Test a remote: write, read and delete a small object there. A problem ends it with exit code 1.

    Example: `aplsmear share-check lab`
    """
    from aplsmear.workspace.dvc_api import check_remote

    for line in check_remote(Path(), remote):
        typer.echo(line)
