"""Commands about data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aplsmear import words
from aplsmear.cli.base import MIN_BOX, app, file_to_write, folder_to_write, params_if_any
from aplsmear.errors import UserError

_PANEL = "Data sets"
_DATA_SET = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the tables and images.")]


@app.command(rich_help_panel=_PANEL)
def check(
    folder: _DATA_SET,
    against: Annotated[
        Path | None, typer.Option(metavar="DIR2", help="Another data set: no patient may be in both.")
    ] = None,
) -> None:
    """Check a data set: print what it holds, or every problem and how to fix it (exit code 1).

    If there is a params.yaml here, its tasks must find their labels.

    Example: `aplsmear check /data/our_smears`
    """
    from aplsmear.data.dataset import DataSetError, in_both, read_data_set

    found = params_if_any("dataset", "tasks")
    data_set = read_data_set(
        folder,
        found.tasks if found else {},
        min_box=found.dataset.min_box if found else MIN_BOX,
        skip_bad_images=found.dataset.skip_bad_images if found else False,
    )
    if against:
        other = read_data_set(against, {}, min_box=MIN_BOX, skip_bad_images=True, labelled=False)
        if problems := in_both(data_set, other):
            raise DataSetError(problems)
    Console().print(summary(data_set.report))
    if found is None:
        typer.echo("There is no params.yaml here, so it was not checked whether its tasks find their labels.")


def summary(report: Mapping[str, Any]) -> Table:
    """What a data set holds and what was left out."""
    table = Table(title="A valid data set", title_justify="left", show_header=False, box=None)
    table.add_row("patients", f"{report['patients']:,}")
    table.add_row("smears", f"{report['smears']:,}")
    table.add_row("cells", f"{report['cells']:,}, {report['cells_with_type']:,} of them with a type")
    for diagnosis, counts in report["by_diagnosis"].items():
        table.add_row(diagnosis, ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    for task, counts in report["tasks"].items():
        table.add_row(f"task {task}", f"{counts['positive']:,} positive, {counts['negative']:,} negative")
    for line in words.left_out(report["left_out"]):
        table.add_row("left out", line)
    clipped = report["changed"]["boxes_clipped"]["count"]
    if clipped:
        table.add_row("changed", f"{clipped:,} boxes cut at the edge of their image")
    for label, count in report["changed"]["labels_dropped"].items():
        table.add_row("changed", f"label {label!r} dropped, {count:,} times")
    for column, counts in report["unknown_labels"].items():
        for label, count in counts.items():
            table.add_row("used by no task", f"{label!r} in {column}, {count:,} times")
    for remark in report["remarks"]:
        table.add_row("remark", remark)
    return table


@app.command("demo-data", rich_help_panel=_PANEL)
def demo_data(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", callback=folder_to_write, help="A new or empty folder.")
    ],
    patients: Annotated[int, typer.Option(min=3, help="A third each: healthy, AML, APL.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other patients.")] = 1,
) -> None:
    """Draw synthetic smears of any number of patients, in the Kaggle layout.

    Example: `aplsmear demo-data /tmp/smears --patients 200 --seed 7`
    """
    from aplsmear.sources.drawn import draw_data_set

    draw_data_set(folder, patients, seed)


@app.command(rich_help_panel=_PANEL)
def cells(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that contains the folder wsi.")],
    size: Annotated[float | None, typer.Option(metavar="PX", help="Diameter of a typical cell.")] = None,
    micrometres_per_pixel: Annotated[
        float | None, typer.Option(metavar="X", help="Scale of the images, instead of --size.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: labeled_cells.csv in DIR.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a table; the old one is renamed.")] = False,
) -> None:
    """Find the nucleated cells of smears without boxes, and write their boxes to labeled_cells.csv.

    It also draws a contact sheet of the boxes (PNG). Without --size and --micrometres-per-pixel the size of
    a cell is estimated. If there is no wsi.csv, it writes one: a row for each image, with an empty label.

    Example: `aplsmear cells /data/our_smears --micrometres-per-pixel 0.11`
    """
    from aplsmear.data.schema import CELLS_FILE, SMEARS_FILE
    from aplsmear.sources import cell_folder

    table = out or folder / CELLS_FILE
    file_to_write(table)
    if not (folder / SMEARS_FILE).exists():
        file_to_write(folder / SMEARS_FILE)
    cell_folder.refuse_single_cells(folder)
    expected = cell_folder.expected_size(size, micrometres_per_pixel)
    kept = cell_folder.kept_name(table, overwrite)
    smears, listed = cell_folder.read_smears(folder)
    found = cell_folder.find_all(folder, smears, expected)
    sheet = cell_folder.write_search(table, kept, folder, smears, found)
    if listed:
        typer.echo(f"{listed} was not there: it now has a row for each image, with an empty label")
    for line in cell_folder.summary(found, smears["smear"], table):
        typer.echo(line)
    if found.cells.empty:
        raise UserError(f"No table was written. Look at {sheet}, and give the size of a cell with --size.")
    if kept:
        typer.echo(f"The old table is now {kept}")
    typer.echo(f"{table} holds the boxes. Look at {sheet} first: does each box hold one cell?")
    for line in cell_folder.next_steps(folder):
        typer.echo(line)


@app.command(rich_help_panel=_PANEL)
def names(folder: _DATA_SET) -> None:
    """Print a table (CSV) of names and their pseudonyms under `dataset.pseudonymise`. It needs the key.

    The key is in the environment variable APLSMEAR_PSEUDONYM_KEY, or in the file .pseudonym-key here.

    Example: `aplsmear names /data/our_smears > names.csv`
    """
    import csv
    import os
    import sys

    from aplsmear.data.dataset import names_of
    from aplsmear.data.pseudonyms import Pseudonyms, read_key
    from aplsmear.tables import guarded

    hidden = Pseudonyms(read_key(os.environ, Path()))
    table = csv.writer(sys.stdout, lineterminator="\n")
    rows = [[kind, guarded(name), hidden.of(kind, name)] for kind, name in names_of(folder)]
    table.writerows([["kind", "name", "pseudonym"], *rows])
