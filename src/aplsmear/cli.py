"""The command `aplsmear`, for what is not a stage of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from aplsmear.params import Params, ParamsError, read_params

app = typer.Typer(
    help="Recognise acute promyelocytic leukaemia in smears. The pipeline itself is run by dvc.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)

PARAMS = Path("params.yaml")
_MIN_BOX = 8  # px; where no params.yaml says otherwise


@app.callback()
def main() -> None:
    """Recognise acute promyelocytic leukaemia in smears. The pipeline itself is run by dvc."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that holds wsi.csv.")],
    params: Annotated[
        Path | None,
        typer.Option(help="Whose tasks must find their labels. Default: params.yaml here, if there is one."),
    ] = None,
) -> None:
    """Is this folder a valid data set? Says what it holds, or all that is to be mended (exit code 1).

    Example: `aplsmear check /data/our_smears`
    """
    from aplsmear.data.dataset import DataSetError, print_problems, read_data_set

    knobs = _knobs(params)
    try:
        found = read_data_set(
            folder,
            knobs.tasks if knobs else {},
            min_box=knobs.dataset.min_box if knobs else _MIN_BOX,
            skip_bad_images=knobs.dataset.skip_bad_images if knobs else False,
        )
    except DataSetError as error:
        print_problems(error.problems)
        raise typer.Exit(1) from None
    Console().print(_summary(found.report))
    if knobs is None:
        typer.echo("No params.yaml here: whether its tasks find their labels was not checked.")


@app.command("demo-data")
def demo_data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    patients: Annotated[int, typer.Option(min=3, help="A third each healthy, AML and APL.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other patients.")] = 1,
) -> None:
    """Draw synthetic smears of any number of patients, in the Kaggle layout.

    Example: `aplsmear demo-data /tmp/smears --patients 200 --seed 7`
    """
    from aplsmear.sources.drawn import draw_data_set

    try:
        draw_data_set(folder, patients, seed)
    except (ValueError, OSError) as error:
        _fail(str(error))


@app.command()
def cells(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Holds the folder wsi with the images.")],
    size: Annotated[float | None, typer.Option(metavar="PX", help="Diameter of a typical cell.")] = None,
    micrometres_per_pixel: Annotated[
        float | None, typer.Option(metavar="X", help="Instead of --size.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: labeled_cells.csv in DIR.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Put a new table in the place of one that is there.")
    ] = False,
) -> None:
    """Find the nucleated cells of smears that nobody has boxed, and write their boxes: labeled_cells.csv.

    Beside the table, a contact sheet to look at (PNG). Without --size or --micrometres-per-pixel the size of
    a cell is estimated. Where there is no wsi.csv, one is written: a row an image, its label left empty.

    Example: `aplsmear cells /data/our_smears --micrometres-per-pixel 0.11`
    """
    from aplsmear.data.dataset import DataSetError, print_problems
    from aplsmear.data.schema import CELLS_FILE
    from aplsmear.errors import UserError
    from aplsmear.sources import cell_finder as search

    table = out or folder / CELLS_FILE
    try:
        expected = search.expected_size(size, micrometres_per_pixel)
        kept = search.kept_name(table, overwrite)
        smears, listed = search.read_smears(folder)
        found = search.find_all(folder, smears, expected)
        sheet = search.write_search(table, kept, folder, smears, found)
    except DataSetError as error:
        print_problems(error.problems)
        raise typer.Exit(1) from None
    except (UserError, OSError) as error:
        _fail(str(error))
    if listed:
        typer.echo(f"{listed} was not there: it now has a row for each image, with an empty label")
    for line in search.summary(found, smears["smear"]):
        typer.echo(line)
    if found.cells.empty:
        _fail(f"No table was written. Look at {sheet}, and give the size of a cell with --size.")
    if kept:
        typer.echo(f"The table that was there is now {kept}")
    typer.echo(f"{table} holds the boxes. Look at {sheet} first: does each box hold one cell?")
    if listed:
        typer.echo(f"Then: fill in the labels in {listed} (new patients, to be judged only, need none)")
    typer.echo(f"Then: aplsmear check {folder}")


@app.command()
def profile(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A file of profiles/, without .yaml.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values to change on the way.")
    ] = None,
) -> None:
    """Write a profile into params.yaml, remarks included, and clear away what the old parameters had made.

    Example: `aplsmear profile demo dataset.root=/data/our_smears split.folds=10`
    """
    from aplsmear.errors import UserError
    from aplsmear.files import whole
    from aplsmear.workspace.profiles import read_profile, with_settings, with_sums

    try:
        text = read_profile(Path("profiles"), name)
        pairs = dict(_pair(setting) for setting in settings or [])
        text = with_sums(with_settings(text, pairs) if pairs else text)
        with whole(PARAMS) as part:
            part.write_text(text, encoding="utf-8")
            read_params(part)
    except UserError as error:
        _fail(str(error))
    typer.echo(
        f"params.yaml is now the profile {name}" + (f" with {', '.join(pairs)} changed" if pairs else "")
    )
    _clear_away_leftovers()


@app.command()
def tidy(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask about old searches: they go.")] = False,
) -> None:
    """Remove outs of backbones, tasks and members that params.yaml no longer names; DVC's cache keeps them.

    Then it offers to remove the searches in .studies that no `tuned/TASK/best.yaml` here goes back to. Keep
    one that was cut off and is to go on. One that is running is left alone.

    Example: `aplsmear tidy`
    """
    import sys
    from datetime import datetime

    import yaml

    from aplsmear.heads.study import past_studies, remove_study

    removed = _clear_away_leftovers()
    best = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in Path("tuned").glob("*/best.yaml")]
    past = past_studies(Path(".studies"), {each.get("study", "") for each in best})
    for path in past:
        state = path.stat()
        last = datetime.fromtimestamp(state.st_mtime)
        typer.echo(f"{path}: {state.st_size / 1e6:.1f} MB, last written {last:%Y-%m-%d %H:%M}")
    if not past:
        if not removed:
            typer.echo("Nothing to tidy.")
    elif yes or (sys.stdin.isatty() and typer.confirm("Nothing in tuned/ goes back to these. Remove them?")):
        for path in past:
            remove_study(path)
        typer.echo(f"{len(past)} searches removed")
    else:
        typer.echo("Nothing in tuned/ goes back to these searches: `aplsmear tidy --yes` removes them.")


def _clear_away_leftovers() -> int:
    """Remove what params.yaml no longer names, and say how many files and folders that were."""
    import shutil

    from aplsmear.workspace.profiles import leftovers

    found = leftovers(Path(), _knobs_here())
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        typer.echo(f"removed {path} (no longer in params.yaml; DVC keeps it in its cache)")
    return len(found)


@app.command()
def mend() -> None:
    """Put right what a kill, a power cut, a full or a failing disk left behind; then the same command again.

    Locks of a DVC that is no longer there; dvc.lock, params.yaml or data.dvc cut off while DVC wrote them;
    git off its branch, or your changes in its stash, after `dvc exp run`; outs and objects of DVC's cache
    that are not, to the bit, what they were. What is sound is not touched. It reads the whole cache, at the
    speed of the disk.

    Example: `aplsmear mend`
    """
    from aplsmear.errors import UserError
    from aplsmear.runs.mend import mend as put_right

    done = 0
    try:
        for line in put_right(Path()):
            typer.echo(line)
            done += 1
    except UserError as error:
        _fail(str(error))
    typer.echo("Now the same command again." if done else "Nothing to mend.")


@app.command()
def predict(
    ensemble: Annotated[
        Path, typer.Option(metavar="DIR", help="Such as ensembles/apl_aml, or a copy of its `model`.")
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds wsi.csv; no labels needed.")],
    out: Annotated[Path, typer.Option(metavar="CSV", help="A row a patient.")],
    report: Annotated[
        Path | None, typer.Option(metavar="HTML", help="The same for people, on a page.")
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(
            min=0, help="A check: judge by the models that never saw this fold of the training run."
        ),
    ] = None,
    adapt: Annotated[
        bool,
        typer.Option(
            "--adapt", help="Shift probabilities so that as many as in training are positive (below)."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace CSV and HTML.")] = False,
) -> None:
    """Judge patients whom the ensemble has never seen. For research only.

    The CSV file has, for each patient: the calibrated `probability` of the positive diagnosis; the calls at
    the balanced (`verdict`) and at the `sensitive` operating point; how many `cells` and `smears` were seen;
    the `distance` from the training patients by what cells look like, and by `stain` (beyond 1 it is further
    than nearly all of these are from each other); a `warning`. A name that a spreadsheet would take for a
    formula gets a ' in front.

    `--adapt` is for patients of another laboratory who are known to be a mixture like that of training: it
    moves all their probabilities together, without a label. Not for a screening, nor for few patients.

    Example: `aplsmear predict --ensemble ensembles/apl_aml --data /data/new --out predictions.csv --report
    report.html`
    """
    import numpy as np

    from aplsmear.compute.engine import engine_of
    from aplsmear.compute.runtime import start_tensorflow
    from aplsmear.data.dataset import DataSetError, print_problems, read_data_set
    from aplsmear.ensembles.bundle import read_bundle
    from aplsmear.errors import UserError
    from aplsmear.prediction.page import CARDS, write_page
    from aplsmear.prediction.predict import (
        Judge,
        check_input,
        judge_patients,
        keep_pictures,
        verdict_table,
    )
    from aplsmear.prediction.recalibration import adapted
    from aplsmear.tables import write_table

    _check_outs([path for path in (out, report) if path is not None], overwrite)
    try:
        bundle = read_bundle(ensemble)
        outer_fold = bundle.outer_fold_of(fold)
        judge = Judge(bundle, outer_fold)
        with engine_of(_knobs(None), [data, bundle.folder], networks=True) as engine:
            found = read_data_set(
                data,
                {},
                min_box=bundle.model.min_box,
                skip_bad_images=False,
                engine=engine,
                labelled=False,
            )
            check_input(bundle, found.cells, data)
            start_tensorflow()
            judged = keep_pictures(
                judge_patients(judge, data, found.smears, found.cells, engine), CARDS if report else 0
            )
        combination, remarks = judge.combination, []
        if fold is not None:
            remarks.append(f"A check: judged by the models that never saw fold {fold}.")
        if adapt:
            combination = adapted(combination, np.array([each.logits for each in judged]))
            share = combination.thresholds["balanced"]
            remarks.append(
                f"Adapted to these {len(judged)} patients: logits moved by "
                f"{combination.offset - judge.combination.offset:+.2f}, on the assumption that about "
                f"{share:.0%} of them are positive, as in training."
            )
        table = verdict_table(judged, combination)
        if report:
            write_page(report, bundle, combination, judged, table, found.report["left_out"], remarks)
        write_table(out, table)
    except DataSetError as error:
        print_problems(error.problems)
        raise typer.Exit(1) from None
    except (UserError, OSError) as error:
        _fail(str(error))
    left = {what: each["count"] for what, each in found.report["left_out"].items() if each["count"]}
    typer.echo(
        "".join(f"left out: {count:,} {what.replace('_', ' ')}\n" for what, count in left.items()), nl=False
    )
    for remark in remarks:
        typer.echo(remark)
    warned = int((table["warning"] != "").sum())
    typer.echo(f"{len(table)} patients judged, {warned} of them with a warning: {out}")


def _check_outs(paths: list[Path], overwrite: bool) -> None:
    """See, before the long work, that they can be written and that nothing is lost."""
    problems = [f"{path} is a folder" for path in paths if path.is_dir()]
    problems += ["CSV and HTML have the same name"] if len(set(paths)) < len(paths) else []
    if not overwrite:
        problems += [
            f"{path} is there already: another name, or --overwrite" for path in paths if path.is_file()
        ]
    if problems:
        _fail("\n".join(problems))


@app.command()
def names(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that holds wsi.csv.")],
) -> None:
    """Who is who under `dataset.pseudonymise`? A table (CSV) of names and pseudonyms, for those with the key.

    The key is that of the environment variable APLSMEAR_PSEUDONYM_KEY, or of the file .pseudonym-key here.

    Example: `aplsmear names /data/our_smears > names.csv`
    """
    import csv
    import os
    import sys

    from aplsmear.data.dataset import DataSetError, names_of, print_problems
    from aplsmear.data.pseudonyms import Pseudonyms, read_key
    from aplsmear.errors import UserError
    from aplsmear.tables import guarded

    try:
        hidden = Pseudonyms(read_key(os.environ, Path()))
        found = names_of(folder)
    except DataSetError as error:
        print_problems(error.problems)
        raise typer.Exit(1) from None
    except UserError as error:
        _fail(str(error))
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["kind", "name", "pseudonym"])
    table.writerows([kind, guarded(name), hidden.of(kind, name)] for kind, name in found)


@app.command("null-check")
def null_check(
    ensemble: Annotated[str, typer.Option(metavar="NAME", help="Of `ensembles` in params.yaml.")],
    repeats: Annotated[int, typer.Option(min=2, help="Permutations.")] = 30,
) -> None:
    """Does the ensemble find something where there is nothing? Needs `members/NAME`, changes nothing.

    Permuted: the diagnoses of the patients, within each fold. Done again: choice of the combination, its
    weights, calibration, held-out verdicts. Not done again: the members' scores. Exit code 1 where the mean
    AUROC is further from 0.5 than 0.03 and than three standard errors.

    Example: `aplsmear null-check --ensemble apl_healthy`
    """
    from aplsmear.ensembles import combination as ensembles
    from aplsmear.errors import UserError
    from aplsmear.params import named
    from aplsmear.tables import read_scores, read_table

    knobs = _knobs_here()
    try:
        asked = named(knobs.ensembles, ensemble, "ensembles")
        folds = _made(Path("splits/folds.csv"))
        level = {task: each.level for task, each in knobs.tasks.items()}
        weights = read_scores(_made(Path(f"tuned/{asked.weigh_by}/scores.parquet")))
        members = ensembles.read_members(
            _made(Path(f"members/{ensemble}")),
            {task: level[task] for task in asked.members},
            {level[asked.weigh_by]: weights},
        )
        patients = ensembles.patients_of(read_table(folds), asked.positive, asked.negative)
        candidates = ensembles.draw_candidates(knobs.combine, knobs.seed)
        found = ensembles.null_check(patients, members, candidates, repeats, knobs.seed)
    except UserError as error:
        _fail(str(error))
    failed = False
    for column, what in (("auroc", "all pairs of patients"), ("auroc_within_folds", "pairs within a fold")):
        mean, error_of_mean = found[column].mean(), found[column].std() / repeats**0.5
        failed |= abs(mean - 0.5) > max(0.03, 3 * error_of_mean)
        typer.echo(f"AUROC on permuted diagnoses, {what}: {mean:.3f} (standard error {error_of_mean:.3f})")
    if failed:
        _fail("This should be 0.5: something leaks from the held-out patients into their verdicts.")


@app.command()
def experiments(
    commits: Annotated[int, typer.Option(min=1, help="So many commits back, each with its own.")] = 1,
    tasks: Annotated[bool, typer.Option("--tasks", help="Also the tuned heads, where they differ.")] = False,
) -> None:
    """Which experiment is better? What each changed, and each AUROC that differs, with its 95 % interval.

    `dvc exp show` has every number and parameter, `aplsmear compare` what lies behind two of them. The runs
    and trials of an experiment in MLflow have its name in their tag DVC_EXP_NAME.

    Example: `aplsmear experiments --commits 3`
    """
    from aplsmear.errors import UserError
    from aplsmear.workspace.dvc_api import experiments as known
    from aplsmear.workspace.experiments import table

    try:
        found = known(Path(), commits)
    except UserError as error:
        _fail(str(error))
    Console().print(table(found, tasks))
    if len(found) <= commits:
        typer.echo("\nNo experiment on this commit yet: `dvc exp run -S KEY=VALUE --name NAME` makes one.")


@app.command()
def compare(
    revisions: Annotated[
        list[str],
        typer.Argument(metavar="A B [C]...", help="Experiments, branches, tags, commits, or `workspace`."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("compare.html"),
) -> None:
    """How do experiments differ? One page that opens offline: numbers, parameters, plots, pictures.

    Example: `aplsmear compare main more-trials --out compare.html`
    """
    from aplsmear.errors import UserError
    from aplsmear.workspace.compare_page import write_page
    from aplsmear.workspace.dvc_api import compare as compared

    if len(revisions) < 2:
        _fail("a comparison needs two names or more, such as: aplsmear compare main workspace")
    try:
        write_page(out, compared(Path(), revisions))
    except UserError as error:
        _fail(str(error))
    typer.echo(f"{out} is written: open it in a browser")


@app.command("share-check")
def share_check(
    remote: Annotated[
        str | None,
        typer.Argument(metavar="[REMOTE]", help="A name of `dvc remote list`; default: the default."),
    ] = None,
) -> None:
    """What is wrong with a remote, if anything (exit code 1)? Writes, reads and deletes a small object there.

    Example: `aplsmear share-check lab`
    """
    from aplsmear.errors import UserError
    from aplsmear.workspace.dvc_api import check_remote

    try:
        for line in check_remote(Path(), remote):
            typer.echo(line)
    except UserError as error:
        _fail(str(error))


def _made(path: Path) -> Path:
    """The path, if it is there."""
    if not path.exists():
        _fail(f"{path} is not there: `dvc repro` makes it")
    return path


def _pair(setting: str) -> tuple[str, str]:
    key, found, value = setting.partition("=")
    if not found or not key:
        _fail(f"{setting!r} is not KEY=VALUE, such as split.folds=10")
    return key, value


def _knobs_here() -> Params:
    knobs = _knobs(None)
    return knobs if knobs is not None else _fail("there is no params.yaml here")


def _knobs(path: Path | None) -> Params | None:
    """The parameters asked for, or those of the working directory if it has any."""
    if path is None and not PARAMS.exists():
        return None
    try:
        return read_params(path or PARAMS)
    except (ParamsError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    from aplsmear.secrets import without_secrets

    typer.echo(without_secrets(message), err=True)
    raise typer.Exit(1) from None


def _summary(report: Mapping[str, Any]) -> Table:
    """What a data set holds and what was left out, for people."""
    table = Table(title="A valid data set", title_justify="left", show_header=False, box=None)
    table.add_row("smears", f"{report['smears']:,} of {report['patients']:,} patients")
    table.add_row("cells", f"{report['cells']:,}, {report['cells_with_type']:,} of them with a type")
    for diagnosis, counts in report["by_diagnosis"].items():
        table.add_row(diagnosis, ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    for task, counts in report["tasks"].items():
        table.add_row(f"task {task}", f"{counts['positive']:,} positive, {counts['negative']:,} negative")
    for what, left in report["left_out"].items():
        if left["count"]:
            table.add_row("left out", f"{left['count']:,} {what.replace('_', ' ')}")
    clipped = report["changed"]["boxes_clipped"]["count"]
    if clipped:
        table.add_row("changed", f"{clipped:,} boxes cut at the edge of their image")
    for label, count in report["changed"]["labels_dropped"].items():
        table.add_row("changed", f"{count:,} times the label {label!r} dropped")
    for column, counts in report["unknown_labels"].items():
        for label, count in counts.items():
            table.add_row("no task asks for", f"{label!r} in {column}, {count:,} times")
    for remark in report["remarks"]:
        table.add_row("remark", remark)
    return table


if __name__ == "__main__":
    app()
