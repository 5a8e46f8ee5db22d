"""One forward pass of one frozen backbone over every view of cells and smears; a table of what there is.

Usage: python stages/bottleneck.py BACKBONE   (a name of `backbones` in params.yaml)
"""

from pathlib import Path

from aplsmear.backbones import batch_of, features_of
from aplsmear.features import overview, write_features
from aplsmear.params import LEVELS, named, read_params
from aplsmear.progress import progress
from aplsmear.runtime import start_tensorflow
from aplsmear.shards import count_views, read_index, read_views
from aplsmear.stage import run
from aplsmear.tables import write_table


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    backbone = named(params.backbones, name, "backbones")
    folders = {level: Path(f"features/{level}/{name}") for level in LEVELS}
    start_tensorflow()
    for level in LEVELS:
        views = Path(f"augmented/{level}/views.parquet")
        batch = batch_of(backbone, level)
        batches = progress(read_views(views, batch), f"batches of {level}s", -(-count_views(views) // batch))
        features = features_of(batches, backbone, level, params.seed)
        write_features(folders[level], read_index(views), backbone.layer, features)
    write_table(Path(f"bottleneck/{name}.csv"), overview(folders))


if __name__ == "__main__":
    run(main)
