"""Cut the cells out of their smears and make plain and augmented views of cells and smears."""

import os
import sys
from pathlib import Path

from aplsmear.compute.engine import engine_of
from aplsmear.data.pseudonyms import Pseudonyms, read_key
from aplsmear.images.view_store import ViewWriter
from aplsmear.images.views import all_views, unused_labels
from aplsmear.params import LEVELS, read_params
from aplsmear.progress import progress
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
    files = names.files(root, smears["image"]) if names else None
    out = {level: Path(f"augmented/{level}/views.parquet") for level in LEVELS}
    with engine_of(params, [root]) as engine, ViewWriter(out) as writer:
        views = all_views(root, smears, cells, params.augment, params.seed, engine, files)
        for of_smear in progress(views, "smears", len(smears)):
            writer.write(of_smear)


if __name__ == "__main__":
    run(main)
