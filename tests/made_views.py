"""The views of a whole data set, for tests."""

from collections.abc import Collection, Iterator
from pathlib import Path

import pandas as pd

from aplsmear.compute.engine import HERE, Engine
from aplsmear.images.view_store import View
from aplsmear.images.views import parts_of, views_of_parts
from aplsmear.params import LEVELS, Augment, Level


def all_views(
    root: Path,
    smears: pd.DataFrame,
    cells: pd.DataFrame,
    settings: Augment,
    seed: int,
    engine: Engine = HERE,
    levels: Collection[Level] = LEVELS,
) -> Iterator[dict[Level, list[View]]]:
    return views_of_parts(parts_of(root, smears, cells, settings), settings, seed, engine, levels)
