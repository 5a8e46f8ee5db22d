"""Commands that read and write the annotations of other programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aplsmear.cli.base import MIN_BOX, PARAMS, app, folder_to_write
from aplsmear.cli.data_sets import summary
from aplsmear.errors import UserError

_PANEL = "Data sets"
Kind = Literal["voc", "coco", "labelme", "geojson", "label-studio", "yolo", "kitti", "csv"]


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """What a column of a CSV file holds -> its title, from the options --column."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [what for what, sign, title in pairs if not (what and sign and title)]:
        raise UserError(f"--column {wrong[0]!r} must be WHAT=TITLE, such as picture=filename.")
    return {what: title for what, _, title in pairs}


_ClassFrom = Annotated[
    Literal["folder", "above", "name", "none"] | None,
    typer.Option(
        help="The part of the path of a single cell that is its class. Default: that with most known classes."
    ),
]
_Column = Annotated[
    list[str] | None,
    typer.Option(metavar="WHAT=TITLE", help="What a column of a CSV file holds; may be repeated."),
]
_Pattern = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="The group of this pattern is the patient in the path of a picture."),
]
_Diagnosis = Annotated[
    str | None,
    typer.Option(
        help="healthy, aml, apl or {'aml', 'm2'} for all; or a REGEX whose group is the diagnosis in a path."
    ),
]
_Facts = Annotated[
    Path | None, typer.Option(help="CSV file of pictures or patients: patient, diagnosis, site.")
]
_KeepUnknown = Annotated[bool, typer.Option(help="An unknown class becomes a cell type as it is.")]
_Update = Annotated[
    Path | None, typer.Option(metavar="DIR2", help="A data set: write it again, with the classes of SOURCE.")
]
_Classes = Annotated[
    Path | None,
    typer.Option(metavar="CSV", help="Table of your names: the columns class (your name) and cellType."),
]


@app.command("import", rich_help_panel=_PANEL)
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file of annotations, or a folder.")],
    to: Annotated[Path, typer.Option(metavar="DIR", callback=folder_to_write, help="A new or empty folder.")],
    kind: Annotated[Kind | None, typer.Option("--format", help="If SOURCE holds several formats.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures, if it is another one.")] = None,
    patient: _Pattern = None,
    table: _Facts = None,
    column: _Column = None,
    diagnosis: _Diagnosis = None,
    classes: _Classes = None,
    keep_unknown: _KeepUnknown = False,
    class_from: _ClassFrom = None,
    size: Annotated[
        float | None, typer.Option(metavar="PX", min=1, help="Side of the box that each point gets.")
    ] = None,
    cohort: Annotated[str | None, typer.Option(help="DeepAPL only: a cohort, such as Discovery.")] = None,
    unsigned: Annotated[bool, typer.Option(help="DeepAPL only: take unsigned slides, too.")] = False,
    update: _Update = None,
    copy: Annotated[bool, typer.Option(help="Copy the pictures. Default: relative links.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only print what is found and would be written.")] = False,
) -> None:
    """Make a data set from the pictures and annotations of another program or laboratory.

    Read are boxes (Pascal VOC, COCO, YOLO, KITTI, CSV, Label Studio, QuPath GeoJSON, LabelMe), folders of
    single-cell pictures, and the published layout of DeepAPL. docs/import.md has a walk.

    Example: `aplsmear import /data/annotations.csv --to /data/ours --patient '([^/_]+)_[^/]*$'`
    """
    from aplsmear.exchange import importing, sources
    from aplsmear.exchange.classes import known_classes
    from aplsmear.words import named

    if update and (patient or table or diagnosis):
        raise UserError(
            "With --update, patients and diagnoses are those of DIR2: leave out the other options."
        )
    images = update / "wsi" if update and not images else images
    columns = _pairs(column or ())
    of_source, of_table = ({}, columns) if table else (columns, {})
    known = known_classes(classes)
    found, root = sources.read_source(
        source, known, kind=kind, images=images, columns=of_source, size=size,
        class_from=class_from, cohort=cohort, unsigned=unsigned,
    )  # fmt: skip
    if update:
        plan = importing.updated(found, update, known, keep_unknown=keep_unknown)
    else:
        facts = importing.FactSources(patient, table, of_table, diagnosis)
        plan = importing.planned(found, root, known, facts, keep_unknown=keep_unknown)
    _show(plan, to, copy)
    if unknown := [label for label, (meaning, _) in plan.classes.items() if meaning is None]:
        raise UserError(
            f"Unknown classes: {named(map(repr, unknown), 20)}. Write a table with the columns class and "
            "cellType, and name it with --classes. Or keep the names as types of cells with --keep-unknown."
        )
    if not dry_run:
        importing.write(plan, to, copy=copy)
        _check(plan, to)


def _show(plan: Any, to: Path, copy: bool) -> None:
    """Print what was found, and what is written."""
    from aplsmear.words import named

    typer.echo(f"Found: {named([plan.what])}")
    rows = Table(box=None, pad_edge=False)
    for title in ("class", "cellType", "specialCharacteristics", "objectType", "cells"):
        rows.add_column(title, justify="right" if title == "cells" else "left")
    for label, (meaning, count) in plan.classes.items():
        texts = [named([label]) or "(none)", *(meaning or ("unknown", "", "")), f"{count:,}"]
        rows.add_row(*map(Text, texts))
    Console().print(rows)
    for why, names in plan.left_out.items():
        typer.echo(f"Left out: {len(names):,} {why}: {named(names)}")
    tables = [table for table in (plan.smears, plan.cells) if "patient" in table]
    patients = {name for table in tables for name in table["patient"]} - {""}
    typer.echo(
        f"Patients: {len(patients):,}"
        if patients
        else "Patients: not known, so each picture counts as a patient. Cells of one patient can then be in "
        "training and test at once, and results look too good. Name them with --patient or --table."
    )
    for name, rows_of in (("wsi.csv", plan.smears), ("labeled_cells.csv", plan.cells)):
        if len(rows_of):
            typer.echo(f"{to / name}: {len(rows_of):,} rows")
    typer.echo(f"{to / plan.folder}: {len(plan.pictures):,} {'copies' if copy else 'links'}")


def _check(plan: Any, folder: Path) -> None:
    """Read what was written, as `aplsmear check` does, and print what it holds."""
    from aplsmear.data.dataset import read_data_set

    labelled = plan.smears.empty or bool((plan.smears["label"] != "").any())
    unlabelled = (
        "" if labelled else " No smear has a diagnosis, so pictures and boxes are checked, but no labels."
    )
    typer.echo(f"{folder} is written.{unlabelled}")
    data_set = read_data_set(folder, {}, min_box=MIN_BOX, skip_bad_images=True, labelled=labelled)
    Console().print(summary(data_set.report))


@app.command(rich_help_panel=_PANEL)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A data set.")],
    kind: Annotated[
        Literal["geojson", "coco", "label-studio", "yolo"],
        typer.Option("--format", help="The format to write; CVAT reads coco."),
    ],
    to: Annotated[
        Path, typer.Option(metavar="PATH", help="A new file (coco, label-studio) or folder (geojson, yolo).")
    ],
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="Scores of cells: of `predict --cells`, or tuned/TASK/predictions.csv."
        ),
    ] = None,
    score: Annotated[str, typer.Option(metavar="COLUMN", help="Column of --predictions.")] = "probability",
) -> None:
    """Write the boxes and types of a data set, and scores, for QuPath, CVAT, Label Studio or YOLO.

    `aplsmear import PATH --images DIR/wsi --table DIR/wsi.csv --to DIR2` gives the same tables again.

    Example: `aplsmear export data --format geojson --to /tmp/qupath`

    Example: `aplsmear export new --format geojson --to out --predictions cells.csv --score evidence_apl_aml`
    """
    from aplsmear.exchange import export as exporting

    folder_to_write(to.parent)
    scores = exporting.scores_of(predictions, score) if predictions else None
    shots = exporting.export(folder, kind, to, scores, score)
    cells = [cell for shot in shots for cell in shot.cells]
    scored = f", {sum(cell.score is not None for cell in cells):,} with a score" if predictions else ""
    typer.echo(f"{to}: {len(cells):,} cells in {len(shots):,} pictures{scored}")


@app.command(rich_help_panel=_PANEL)
def fields(
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDE", help="Files of a scanner.")],
    to: Annotated[Path, typer.Option(metavar="DIR", callback=folder_to_write, help="A new or empty folder.")],
    count: Annotated[
        int, typer.Option("--fields", metavar="N", min=1, help="Largest number for each slide.")
    ] = 20,
    mpp: Annotated[
        float | None,
        typer.Option(
            min=0.02, help="Micrometres per pixel of the fields. Default: those of the coarsest slide."
        ),
    ] = None,
    size: Annotated[int, typer.Option(metavar="PX", min=128, max=8192, help="Side of a field.")] = 1024,
    slide_mpp: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0.02, help="Micrometres per pixel of slides whose files do not give it."
        ),
    ] = None,
    patient: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The patient of all slides, or a REGEX whose group is the patient in a path. Default: each "
            "slide is of another patient.",
        ),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV file of slides: picture (the slide), patient, diagnosis.")
    ] = None,
    column: _Column = None,
    diagnosis: _Diagnosis = None,
) -> None:
    """Take fields of one sharp layer of cells from the slides of a scanner, as smears of a data set.

    Read are .svs, .ndpi, .mrxs, .scn, .bif, .vms, .czi, .ome.tif and pyramids in .tif. DIR then has wsi.csv,
    the fields (wsi/*.png), fields.csv (where each was taken) and a picture of each slide with its fields.
    Look at these first. docs/slides.md has a walk.

    Example: `aplsmear fields /data/*.svs --to /data/ours --mpp 0.25 --table slides.csv`
    """
    from aplsmear.sources import fields as taking
    from aplsmear.sources.slide import opened

    facts = _facts_of_slides(slides, patient, table, _pairs(column or ()), diagnosis)
    with opened(slides, slide_mpp) as there:
        scale = taking.resolution(there, mpp)
        choices = taking.write_fields(there, to, facts, count=count, mpp=scale, size=size)
    for fact, choice in zip(facts, choices, strict=True):
        found = len(choice.fields)
        typer.echo(f"{fact.name}: {found} fields. Other squares: {taking.reasons(choice.left_out)}")
        if found < count:
            typer.echo(f"{fact.name}: only these {found} show one sharp layer of cells; {count} were wanted.")
    if not (patient or table):
        typer.echo("Patients: not named, so each slide counts as one. If one has two, correct wsi.csv.")
    width = f"{size * scale:.0f} micrometres"
    typer.echo(f"{to}: fields of {size} px, {scale:.4g} micrometres per pixel, so {width} wide")
    typer.echo(f"Look at {to / facts[0].name}.png first. Then find the cells:")
    typer.echo(f"aplsmear cells {to} --micrometres-per-pixel {scale:.4g}")


def _facts_of_slides(
    slides: Sequence[Path],
    patient: str | None,
    table: Path | None,
    columns: dict[str, str],
    diagnosis: str | None,
) -> list[Any]:
    """The name of each slide, its patient (by default this name) and its label."""
    from aplsmear.exchange.found import Found
    from aplsmear.exchange.importing import FactSources, facts_of

    names = [re.sub(r"(?i)(\.ome)?\.[^.]*$", "", path.name) for path in slides]
    if len(set(names)) < len(names):
        raise UserError("Two slides have the same name, and their fields would, too. Rename one of them.")
    one = patient if patient and "(" not in patient else None
    sources = FactSources(None if one else patient, table, columns, diagnosis)
    known = facts_of(Found("the slides", [path.as_posix() for path in slides]), sources)
    found = [known[path.as_posix()] for path in slides]
    return [
        replace(fact, name=name, patient=one or fact.patient or name)
        for name, fact in zip(names, found, strict=True)
    ]


@app.command(rich_help_panel=_PANEL)
def ask(
    task: Annotated[str, typer.Option(metavar="TASK", help="A task of cells, in params.yaml.")],
    to: Annotated[Path, typer.Option(metavar="DIR", callback=folder_to_write, help="A new or empty folder.")],
    cells: Annotated[int, typer.Option(min=2, help="How many cells.")] = 50,
) -> None:
    """Choose the unlabelled cells whose labels help a task most, and write them for a person to label.

    They are the cells that the heads of the task (`dvc repro tune@TASK`) are least sure of, with few cells of
    each patient. DIR gets a project of Label Studio (tasks.json, config.xml) and a folder for QuPath. Label
    the cells in one of them. Then `aplsmear import ANSWERS --update DATA --to DATA2` writes the data set with
    the new labels. docs/ask.md says what such labels gain, and how an experiment measures it.

    Example: `aplsmear ask --task auer_rod --cells 50 --to asked`
    """
    from aplsmear.exchange import asking
    from aplsmear.params import read_params
    from aplsmear.tables import read_table
    from aplsmear.words import nearest

    params = read_params(PARAMS)
    if task not in params.tasks:
        raise UserError(f"There is no task {task}{nearest(task, params.tasks)} in {PARAMS}.")
    if params.dataset.pseudonymise:
        raise UserError("dataset.pseudonymise hides which cells these are: `ask` works without it only.")
    chosen = asking.chosen_cells(task, params.tasks[task], cells)
    answers = asking.answers_to(read_table(Path("dataset/cells.csv")), params.tasks[task])
    pictures = asking.write_questions(Path(params.dataset.root), to, chosen, answers)
    typer.echo(
        f"{to}: {len(chosen):,} cells of {chosen['patient'].nunique():,} patients in {pictures:,} pictures; "
        f"answers: {', '.join(answers)}"
    )
