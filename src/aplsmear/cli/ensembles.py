"""Commands about trained ensembles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aplsmear import cpu, words
from aplsmear.cli.base import PARAMS, app, file_to_write, folder_to_write, params_if_any
from aplsmear.compute.runtime import device_note
from aplsmear.errors import UserError
from aplsmear.files import is_taken

if TYPE_CHECKING:
    from aplsmear.compute.engine import Engine
    from aplsmear.data.dataset import DataSet
    from aplsmear.ensembles.bundle import Bundle
    from aplsmear.prediction.answer import Panel
    from aplsmear.prediction.page import Alone
    from aplsmear.prediction.predict import Verdict

_PANEL = "Ensembles"
_ENSEMBLE = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Folder of the ensemble, such as ensembles/apl_aml, or a copy of its `model`."
    ),
]
_ENSEMBLES = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="DIR",
        help="Folder of an ensemble, such as ensembles/apl_aml, or a copy of its `model`. Several give one "
        "answer. Without this option: all ensembles of the one answer.",
    ),
]
_ANSWER = Annotated[
    Path, typer.Option(metavar="JSON", help="The fit of the one answer, made by the stage `answer`.")
]
_PREVALENCE = Annotated[
    str,
    typer.Option(
        metavar="SHARES",
        help="Only for the one answer: the shares of the diagnoses among your patients, such as "
        "apl=0.05,aml=0.15; the rest is healthy.",
    ),
]
_CELLS = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV", callback=file_to_write, help="Table with a row for each cell: scores and evidence."
    ),
]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]


@app.command(rich_help_panel=_PANEL)
def predict(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds wsi.csv; no labels needed.")],
    out: Annotated[
        Path, typer.Option(metavar="CSV", callback=file_to_write, help="Table with a row for each patient.")
    ],
    ensemble: _ENSEMBLES = None,
    answer: _ANSWER = Path("answer/answer.json"),
    prevalence: _PREVALENCE = "",
    report: Annotated[
        Path | None, typer.Option(metavar="HTML", callback=file_to_write, help="Page of the same results.")
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(min=0, help="A check: use the models trained without this fold of the training run."),
    ] = None,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Shift all probabilities to the share of positives in training.")
    ] = False,
    cells: _CELLS = None,
    geojson: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", callback=folder_to_write, help="The same for QuPath: a file for each smear."
        ),
    ] = None,
    overwrite: _OVERWRITE = False,
) -> None:
    """Classify new patients with trained ensembles. For research only.

    One answer of several ensembles: the CSV file has for each patient the `answer` (healthy, aml, apl, or
    unsure with the `reason`) and the probabilities of `healthy`, `aml` (other AML) and `apl`, which add to 1.
    `--prevalence` gives the shares of the diagnoses among your patients, if they are other than in training.

    One ensemble alone (one `--ensemble`) is for patients with one of its two diagnoses: the calibrated
    `probability` of the positive one and its 95 % interval (`low`, `high`); the calls at the balanced
    (`verdict`) and `sensitive` operating points; `more_cells`: how many would settle an unsure call.
    `--adapt` shifts its logits by one number, without labels, for patients of another laboratory with about
    the same mixture of diagnoses as in training. Do not use it for screening or for few patients.

    Both tables have: the numbers of `cells` and `smears` used; the `distance` from the training patients in
    features of cells, and in `stain` (above 1: farther out than 99 % of them); a `warning`. A text that a
    spreadsheet would run as a formula gets a ' in front.

    `--cells` and `--geojson` say which cells decided (docs/cells.md): the scores of each member, and the
    evidence of a cell for the positive diagnosis of each ensemble.

    Example: `aplsmear predict --data /data/new --out new.csv --report new.html --cells cells.csv`
    """
    files = [path for path in (out, report, cells) if path]
    if len(set(files)) < len(files):
        raise UserError("--out, --report and --cells must be three different files: change one")
    _refuse_to_replace(*files, geojson, overwrite=overwrite)
    panel = _panel(ensemble or [], answer, prevalence, fold, adapt, bool(report or cells or geojson))
    _judge(panel, data, out, report, cells, geojson, fold)


def _panel(
    ensembles: list[Path], answer: Path, prevalence: str, fold: int | None, adapt: bool, evidence: bool
) -> Alone | Panel:
    """The ensemble, or the ensembles of one answer; without any: all of the one answer that are there."""
    from aplsmear.answer.coupling import prevalence_of, read_answers
    from aplsmear.ensembles.bundle import MANIFEST, read_bundle
    from aplsmear.prediction.answer import Panel
    from aplsmear.prediction.page import Alone

    if len(ensembles) == 1:
        if prevalence:
            raise UserError("--prevalence is for the one answer: leave out --ensemble, or give several.")
        return Alone(read_bundle(ensembles[0]), fold, adapt, evidence)
    if adapt:
        raise UserError("--adapt works with one ensemble: give one --ensemble.")
    shares = prevalence_of(prevalence) if prevalence else None
    answers = read_answers(answer)
    known = [answer.parent.parent / "ensembles" / name for name in answers.pairs]
    folders = ensembles or [each for each in known if (each / "model" / MANIFEST).is_file()]
    return Panel([read_bundle(each) for each in folders], answers, fold, shares, evidence)


def _judge(
    panel: Alone | Panel,
    data: Path,
    out: Path,
    report: Path | None,
    cells: Path | None,
    geojson: Path | None,
    fold: int | None,
) -> None:
    """Judge new patients, and write and print the results."""
    from aplsmear.prediction.predict import CARDS, keep_pictures
    from aplsmear.reports import pages
    from aplsmear.tables import write_table

    _print_notes()
    with _new_patients(panel.bundles, data, geojson is not None) as (found, engine):
        each = panel.judge(data, found.smears, found.cells, engine)
        judged = keep_pictures(each, CARDS if report else 0)
    panel = panel.adapted(judged)
    table, left_out = panel.table(judged), found.report["left_out"]
    remarks = [*panel.remarks, *found.report["remarks"]]
    if fold is not None:
        remarks.append(f"A check: these are scores of the models trained without fold {fold}.")
    if report:
        pages.write(report, panel.page(judged, table, left_out, remarks))
    write_table(out, table)
    _print_remarks(left_out, remarks)
    for line in panel.lines(table):
        typer.echo(line)
    if cells or geojson:
        _write_cells(found, panel.verdicts(judged), cells, geojson)
    warned = int((table["warning"] != "").sum())
    typer.echo(f"{len(table)} patients judged, {warned} of them with a warning: {out}")


def _write_cells(
    found: DataSet, judged: Mapping[str, Sequence[Verdict]], cells: Path | None, geojson: Path | None
) -> None:
    """Write the table and the boxes of the cells that are wanted."""
    from aplsmear.ensembles.evidence import evidence_table
    from aplsmear.prediction.cells import write_boxes
    from aplsmear.tables import write_table

    evidence = {name: [each.evidence for each in verdicts] for name, verdicts in judged.items()}
    table = evidence_table(found.smears, found.cells, evidence)
    if cells:
        write_table(cells, table)
        typer.echo(f"{len(table):,} cells: {cells}")
    if geojson:
        write_boxes(geojson, found, table)
        typer.echo(f"{len(found.smears):,} files for QuPath: {geojson}")


@contextmanager
def _new_patients(
    bundles: Sequence[Bundle], data: Path, boxes: bool = False
) -> Iterator[tuple[DataSet, Engine]]:
    """The data set of new patients, checked for these ensembles, and the engine that judges them.

    With `boxes`, cells must lie in smears.
    """
    from aplsmear.compute.engine import engine_of
    from aplsmear.data.dataset import read_data_set
    from aplsmear.prediction.cells import check_boxes
    from aplsmear.prediction.predict import check_input

    folders = [data, *(bundle.folder for bundle in bundles)]
    with engine_of(params_if_any("engine"), folders, networks=True) as engine:
        min_box = bundles[0].model.min_box
        found = read_data_set(data, {}, min_box=min_box, skip_bad_images=False, engine=engine, labelled=False)
        for bundle in bundles:
            check_input(bundle, found.smears, found.cells, data)
        if boxes:
            check_boxes(found)
        yield found, engine


@app.command(rich_help_panel=_PANEL)
def view(
    patient: Annotated[
        str, typer.Argument(metavar="PATIENT", help="The name of the patient in the table of cells.")
    ],
    to: Annotated[
        Path | None,
        typer.Option(metavar="HTML", callback=file_to_write, help="The page. Default: PATIENT.html."),
    ] = None,
    ensemble: _ENSEMBLE = Path("ensembles/apl_aml"),
    cells: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Table of `predict --cells`. Default: evidence.parquet of the ensemble, of models that "
            "never saw the patient.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The data set. Default: that of this clone.")
    ] = None,
    overwrite: _OVERWRITE = False,
) -> None:
    """Show the cells that decided about one patient, on a page that opens offline.

    The page has the smears with a box around each cell, coloured by its evidence, and the cells beside them,
    sorted by evidence. A click on a cell shows its scores. The arrow keys go through the cells.

    Example: `aplsmear view P004 --ensemble ensembles/apl_healthy`

    Example: `aplsmear view P77-003 --cells cells.csv --data new`
    """
    from aplsmear.ensembles.bundle import read_bundle
    from aplsmear.prediction.view import cells_of, read_cells, view_page
    from aplsmear.reports import pages

    to = to or Path(f"{patient.replace('/', '_')}.html")
    file_to_write(to)
    _refuse_to_replace(to, overwrite=overwrite)
    if data is None:
        if cells is not None:
            raise UserError("--cells needs --data, the folder of the pictures of these cells.")
        params = params_if_any("dataset")
        if params is None:
            raise UserError("There is no params.yaml here: name the folder of the pictures by --data.")
        if params.dataset.pseudonymise:
            raise UserError(
                "dataset.pseudonymise hides which pictures these are. Show the patient by the table of "
                "`aplsmear predict --data DIR --cells CSV` and --cells CSV --data DIR."
            )
        data = Path(params.dataset.root)
    model = read_bundle(ensemble).model
    mine = cells_of(read_cells(_made(cells or ensemble / "evidence.parquet")), patient)
    pages.write(to, view_page(mine, data, model.name, model.positive))
    typer.echo(f"{to}: {len(mine):,} cells. Open it in a browser.")


@app.command(rich_help_panel=_PANEL)
def evaluate(
    ensemble: _ENSEMBLE,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds wsi.csv, with diagnoses.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", callback=folder_to_write, help="Folder for tables, numbers and the page."
        ),
    ],
    trained_on: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR2",
            help="The training data set: no patient may be in both. Default: that of this clone.",
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=100, help="How often the bootstrap resamples the patients.")
    ] = 2000,
    overwrite: _OVERWRITE = False,
) -> None:
    """Judge a trained ensemble on a labelled cohort of another laboratory.

    The ensemble stays as it was trained, with its calibration and its operating points. The folder gets
    metrics.json, intervals.json (each number with its 95 % interval over patients), predictions.csv,
    comparison.csv (plain baselines on the same patients), the curves, and report.html, which also shows the
    numbers after the adaptation of `predict --adapt`. Patients with other diagnoses than those two of the
    ensemble are left out.

    Example: `aplsmear evaluate --ensemble ensembles/apl_aml --data /data/dresden --out evaluated/dresden`
    """
    from aplsmear.compute.engine import engine_of
    from aplsmear.ensembles.bundle import read_bundle
    from aplsmear.prediction.cohort import evaluate as evaluated
    from aplsmear.prediction.cohort import write_evaluation

    _refuse_to_replace(out, overwrite=overwrite)
    _print_notes()
    bundle = read_bundle(ensemble)
    trained_on = trained_on or _trained_on(bundle)
    folders = [data, bundle.folder, *filter(None, [trained_on])]
    with engine_of(params_if_any("engine"), folders, networks=True) as engine:
        found = evaluated(bundle, data, resamples, bundle.model.seed, engine, trained_on=trained_on)
    write_evaluation(out, found)
    _print_remarks(found.left_out, found.remarks)
    auroc, counts = found.measured["auroc"], found.table["diagnosis"].value_counts().sort_index()
    patients = ", ".join(f"{count} {diagnosis}" for diagnosis, count in counts.items())
    typer.echo(
        f"{len(found.table)} patients ({patients}): AUROC {auroc['value']:.3f}, 95 % interval "
        f"{auroc['low']:.3f} to {auroc['high']:.3f}. Open {out / 'report.html'} in a browser."
    )


@app.command(rich_help_panel=_PANEL)
def cross(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR [DIR2]...", help="Labelled data sets, each of one cohort.")
    ],
    ensemble: Annotated[str, typer.Option(metavar="NAME", help="Name of an ensemble in params.yaml.")],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=folder_to_write, help="For the page and the tables.")
    ] = Path("crossed"),
) -> None:
    """Train on each cohort, judge all others: report.html and cross.csv, each number with its interval.

    Of one data set with three or more sites (column `site` of wsi.csv), each site is judged by an ensemble
    trained on the other sites.

    Each training is the pipeline with the parameters of params.yaml, as an experiment of DVC named
    cross-NAME-COHORT: `dvc exp show` and `aplsmear compare` show it, and `dvc exp run`'s limits hold. The
    stages' results stay in DVC's cache. After an interruption, the same command goes on from there. Cohorts
    that share patients, by name or by a picture, are refused; all of them are named.

    Time: each cohort takes as long as `dvc repro ensemble_NAME`; with the profile deepapl, 15 minutes of CPU
    time for 82 patients. Judging adds seconds for each pair of cohorts.

    Example: `aplsmear cross /data/dresden /data/leipzig --ensemble apl_aml`
    """
    from aplsmear.params import named, read_params
    from aplsmear.runs.data_root import check_root
    from aplsmear.workspace import cross as crossed
    from aplsmear.workspace.dvc_api import check_repository, fetch, run_experiment

    params = read_params(PARAMS)
    named(params.ensembles, ensemble, "ensembles")
    check_repository(Path())
    cohorts = crossed.cohorts_of(folders)
    for root in cohorts.values():
        check_root(root, Path())
    trainings = crossed.plan(cohorts, crossed.read_cohorts(cohorts, params), ensemble, params)
    found: list[crossed.Judged] = []
    for place, training in enumerate(trainings, 1):
        typer.echo(
            f"{place} of {len(trainings)}: the ensemble {ensemble} is trained on {training.trained_on}"
        )
        run_experiment(Path(), training.name, training.settings, training.targets)
        fetch(Path(), training.name, training.files(out))
        found += training.judged(out, params)
    crossed.write_cross(out, found, params, ensemble)
    typer.echo(f"{out / 'report.html'} is written: open it in a browser")


def _trained_on(bundle: Bundle) -> Path | None:
    """The data set of the clone that the command was typed in, if the ensemble was made from it."""
    from aplsmear.runs.checksums import md5

    params, cells = params_if_any("dataset"), Path("dataset/cells.csv")
    made_here = cells.is_file() and bundle.model.inputs.get(cells.as_posix()) == md5(cells)
    return Path(params.dataset.root) if params and made_here else None


@app.command(rich_help_panel=_PANEL)
def adapt(
    ensemble: _ENSEMBLE,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds wsi.csv.")],
    labels: Annotated[
        Path,
        typer.Option(metavar="CSV", help="Columns `patient` and `diagnosis`, of 5 to 50 of its patients."),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", callback=folder_to_write, help="Folder of the recalibrated ensemble."),
    ] = Path("adapted"),
    overwrite: _OVERWRITE = False,
) -> None:
    """Recalibrate an ensemble to another hospital by the diagnoses of a few of its patients.

    It fits the intercept of the logits to these patients (also the slope, if each diagnosis has 10 patients).
    Then it sets the operating points and the alarm again. The heads do not change. The gain is measured on
    each patient by a fit to the other patients. If the gain may be chance, nothing is written. Label
    consecutive patients, not chosen ones: the share of positive patients among them counts.

    Example: `aplsmear adapt --ensemble ensembles/apl_aml --data /data/new --labels known.csv --out adapted`
    """
    from aplsmear.ensembles.bundle import read_bundle
    from aplsmear.prediction import local

    _refuse_to_replace(out, overwrite=overwrite)
    known = local.read_labels(labels)
    _print_notes()
    bundle = read_bundle(ensemble)
    if out.resolve() in (bundle.folder.resolve(), bundle.folder.resolve().parent):
        raise UserError(f"{out} is the ensemble itself: choose another folder")
    with _new_patients([bundle], data) as (found, engine):
        changed = local.adapt(bundle, found, data, known, engine)
    local.write_adapted(out / "model", bundle, changed)
    _print_remarks(found.report["left_out"], found.report["remarks"])
    alarm, line = changed.combination.alarm, changed.line
    typer.echo(
        f"{changed.patients} labelled patients, {changed.positive} of them {bundle.model.positive}: "
        f"new logit = {line.slope:.2f} x logit {line.intercept:+.2f}."
    )
    typer.echo(f"Each patient judged by a fit to the others: {local.in_words(changed)}.")
    typer.echo(
        f"The alarm now promises to miss at most {alarm.miss_rate:.0%} of {bundle.model.positive} patients "
        f"(confidence {alarm.confidence:.0%}, from {alarm.patients} patients). To use the new ensemble: "
        f"aplsmear predict --ensemble {out}"
    )


def _print_notes() -> None:
    """Say on stderr what makes the last digits of results differ on this machine."""
    for line in filter(None, (cpu.note(), device_note())):
        typer.echo(line, err=True)


def _print_remarks(left_out: Mapping[str, Any], remarks: Sequence[str]) -> None:
    """Print how much of the data set was left out, and the remarks."""
    for line in (*(f"left out: {each}" for each in words.left_out(left_out)), *remarks):
        typer.echo(line)


def _refuse_to_replace(*paths: Path | None, overwrite: bool) -> None:
    """End the command before the long work if a file, or those of a folder, would be lost."""
    taken = [path for path in paths if path and is_taken(path)]
    if taken and not overwrite:
        lines = [f"{path} exists{' and is not empty' if path.is_dir() else ''}" for path in taken]
        raise UserError("\n".join(f"{line}: choose another name, or add --overwrite" for line in lines))


@app.command("null-check", rich_help_panel=_PANEL)
def null_check(
    ensemble: Annotated[str, typer.Option(metavar="NAME", help="Name of an ensemble in params.yaml.")],
    repeats: Annotated[int, typer.Option(min=2, help="Number of permutations.")] = 80,
) -> None:
    """Test for leaks: train the ensemble on permuted diagnoses; the AUROC must be 0.5. It changes no file.

    It needs `members/NAME`. It permutes the diagnoses of the patients within each fold, and repeats the
    choice of the combination, its weights, the calibration and the held-out probabilities. It does not repeat
    the scores of the members.

    There is a leak if the mean AUROC within folds is more than 0.03 above or below 0.5, or the mean AUROC of
    all pairs more than 0.03 above it, and chance alone goes as far in at most 3 of 1000 checks. With too few
    permutations there is no verdict, and the command says how many are needed. Exit code 1 for a leak and
    without a verdict.

    Example: `aplsmear null-check --ensemble apl_healthy`
    """
    import pandas as pd

    from aplsmear.ensembles import combination as ensembles
    from aplsmear.params import named, read_params
    from aplsmear.progress import progress
    from aplsmear.tables import read_table

    params = read_params(PARAMS, "seed", "tasks", "ensembles", "combine")
    asked = named(params.ensembles, ensemble, "ensembles")
    folds = _made(Path("splits/folds.csv"))
    level = {task: each.level for task, each in params.tasks.items()}
    weights = pd.read_parquet(_made(Path(f"tuned/{asked.weigh_by}/scores.parquet")))
    members = ensembles.read_members(
        _made(Path(f"members/{ensemble}")),
        {task: level[task] for task in asked.members},
        {level[asked.weigh_by]: weights},
    )
    patients = ensembles.patients_of(read_table(folds), asked.positive, asked.negative)
    candidates = ensembles.draw_candidates(params.combine, params.seed)
    running = ensembles.null_check(patients, members, candidates, repeats, params.seed)
    permuted = list(progress(running, "permutations", repeats))
    typer.echo("Mean AUROC on permuted diagnoses, with its 95 % interval:")
    found = []
    for place, what in enumerate(("all pairs of patients", "pairs within a fold")):
        values = [each[place] for each in permuted]
        found.append(ensembles.null_verdict(values, within_folds=place == 1))
        typer.echo(f"  {what}: {found[-1].mean:.3f} ({found[-1].low:.3f} to {found[-1].high:.3f})")
    if any(each.leaks for each in found):
        raise UserError("A leak: held-out patients have a part in the training of their own models.")
    needed = max(each.needed for each in found)
    if needed > repeats:
        raise UserError(
            f"No verdict: {repeats} permutations are too few to tell a leak from chance. "
            f"It takes about {needed}: add `--repeats {needed}`."
        )
    typer.echo("No leak. Over all pairs, a mean a little below 0.5 is usual.")


def _made(path: Path) -> Path:
    """The path, if it exists."""
    if not path.exists():
        raise UserError(f"{path} does not exist: `dvc repro` makes it")
    return path
