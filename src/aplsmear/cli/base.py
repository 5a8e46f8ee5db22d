"""The application that all commands belong to, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from aplsmear.data.problems import DataSetError, print_problems
from aplsmear.errors import UserError
from aplsmear.params import Params, read_params
from aplsmear.secrets import without_secrets

PARAMS = Path("params.yaml")


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


def params_if_any() -> Params | None:
    """The parameters of the working directory, if it has any."""
    return read_params(PARAMS) if PARAMS.exists() else None
