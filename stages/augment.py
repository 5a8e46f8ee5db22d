"""Cut the cells out of their pictures; make the views of cells and smears that tasks ask for."""

import os
import sys
from pathlib import Path

from aplsmear.compute.engine import engine_of
from aplsmear.data.pseudonyms import Pseudonyms, read_key
from aplsmear.images.view_store import view_writer
from aplsmear.images.views import parts_of, unused_labels, views_of_parts
from aplsmear.params import LEVELS, read_params
from aplsmear.runs.stage import home, run
from aplsmear.tables import read_table


def main() -> None:
    params = read_params(Path("params.yaml"))
    root = Path(params.dataset.root)
    smears = read_table(Path("dataset/smears.csv"))
    cells = read_table(Path("dataset/cells.csv"))
    for label in unused_labels(params.augment.extra_views, [smears, cells]):
        print(f"augment.extra_views: no item has the label {label!r}", file=sys.stderr)
    names = Pseudonyms(read_key(os.environ, home())) if params.dataset.pseudonymise else None
    levels = list(read_table(Path("dataset/levels.csv"))["level"])
    files = names.files(root, smears, cells) if names else None
    out = {level: Path(f"augmented/{level}/views.parquet") for level in LEVELS}
    with engine_of(params, [root]) as engine, view_writer(out) as write:
        parts = parts_of(root, smears, cells, params.augment, files)
        for views in views_of_parts(parts, params.augment, params.seed, engine, levels):
            write(views)


if __name__ == "__main__":
    run(main)
