"""The networks of keras.applications and of `aplsmear.dino_variants` and their layers, without Keras.

params.yaml is checked at the start of every stage, and to import Keras takes seconds. tools/keras_layers.py
writes `layers.json` from the installed Keras.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from aplsmear import dino_variants
from aplsmear.dino_variants import VARIANTS, variant_of

TABLE = Path(__file__).with_suffix(".json")


def applications() -> list[str]:
    """The names of all networks, sorted."""
    return sorted([*_table(), *VARIANTS])


def options_of(application: str) -> list[str]:
    """The options of a network that params.yaml can set; the pipeline sets the others."""
    return dino_variants.OPTIONS if application in VARIANTS else list(_table()[application]["options"])


def smallest_side(application: str) -> int:
    """The smallest side of an image, in px, that a network accepts."""
    return VARIANTS[application].patch if application in VARIANTS else int(_table()[application]["smallest"])


def layers_of(application: str, options: Mapping[str, Any]) -> list[str]:
    """The layers of a network whose output is a map of height, width and channels.

    Of the options of keras.applications, only those that are true or false change the layers.

    Raises:
        ValueError: options of a vision transformer that do not fit together.
    """
    if application in VARIANTS:
        return dino_variants.layers_of(variant_of(application, options))
    row = _table()[application]
    switches = {key: bool(options.get(key, default)) for key, default in row["switches"].items()}
    without = set(row["without"][json.dumps(switches, sort_keys=True)].split())
    return [name for name in row["layers"].split() if name not in without]


@cache
def _table() -> dict[str, Any]:
    return dict(json.loads(TABLE.read_text(encoding="utf-8"))["applications"])
