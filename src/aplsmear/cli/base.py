"""The application that all commands belong to, and what they share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from aplsmear.data.problems import DataSetError, print_problems
from aplsmear.errors import UserError
from aplsmear.params import Params, read_params
from aplsmear.secrets import without_secrets

PARAMS = Path("params.yaml")
MIN_BOX = 8  # px; where no params.yaml says otherwise


class _Commands(TyperGroup):
    """Shows an error that the user can fix as a message, without a traceback, and ends with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except DataSetError as error:
            print_problems(error.problems)
        except BrokenPipeError:  # the reader of a pipe has ended: click ends quietly, too
            raise
        except (UserError, OSError) as error:
            typer.echo(without_secrets(str(error)), err=True)
        raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Recognise acute promyelocytic leukaemia in smears. The pipeline itself is run by dvc.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)


def params_if_any(*used: str) -> Params | None:
    """The parameters of the working directory under these top-level keys, if it has a params.yaml."""
    return read_params(PARAMS, *used) if PARAMS.exists() else None


def file_to_write(path: Path | None) -> Path | None:
    """As `folder_to_write` for the folder of a file, whose own path must not be a folder."""
    if path is None:
        return None
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file.")
    folder_to_write(path.parent)
    return path


def folder_to_write(path: Path | None) -> Path | None:
    """The path of a folder, checked before the work starts: it can be written to, or made; else UserError."""
    if path is None:
        return None
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{path}: {place} is no folder. Choose another place.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path}: you may not write in {place}. Choose another place.")
    return path
