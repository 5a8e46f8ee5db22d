"""Commands about weights of published networks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML

from aplsmear.cli.base import app, folder_to_write

weights = typer.Typer(
    help="Use published weights of DINOv2, DINOv3 and DinoBloom.\n\n"
    "Example: `aplsmear weights convert DinoBloom-B.pth --to weights`",
    no_args_is_help=True,
)
app.add_typer(weights, name="weights", rich_help_panel="The repository")


@weights.callback()
def _group() -> None:
    """Keeps `convert` a command of its own."""


@weights.command()
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".safetensors, .pth or .pt")],
    to: Annotated[
        Path, typer.Option(metavar="DIR", callback=folder_to_write, help="Folder of the converted weights.")
    ],
    heads: Annotated[
        int, typer.Option(min=0, help="Heads of the attention; 0: channels / 64, as in published networks.")
    ] = 0,
) -> None:
    """Write weights of DINOv2, DINOv3 or DinoBloom for Keras, and print the row of `backbones` for them.

    The file is read without PyTorch, and nothing in it is run. Names of facebookresearch, timm and
    transformers are known. The same file gives the same bytes.

    Example: `aplsmear weights convert DinoBloom-B.pth --to weights`
    """
    from aplsmear.compute.runtime import start_tensorflow
    from aplsmear.errors import UserError
    from aplsmear.sources.published_weights import read_published, row_of, write_weights

    name = re.sub(r"[^a-z0-9]+", "_", file.stem.lower()).strip("_")
    target = to / f"{name}.weights.h5"
    if target.exists():
        raise UserError(f"{target} exists: choose another folder, or remove it")
    converted = read_published(file, heads)
    start_tensorflow()
    row = row_of(converted, name, target, write_weights(converted, target))
    typer.echo(f"{target} is written. Put this row into params.yaml:\n")
    editor = YAML()
    editor.indent(mapping=2, sequence=4, offset=2)
    editor.dump({"backbones": row}, sys.stdout)
