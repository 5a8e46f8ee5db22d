"""One forward pass of one frozen backbone over every view of cells and smears; its weights are kept.

Usage: python stages/bottleneck.py BACKBONE   (a name of `backbones` in params.yaml)
"""

import sys
from pathlib import Path

from aplsmear.backbones import batch_of, features_of, write_weights
from aplsmear.features import write_features
from aplsmear.files import sha256
from aplsmear.params import LEVELS, named, read_params
from aplsmear.progress import progress
from aplsmear.runtime import start_tensorflow
from aplsmear.shards import count_views, read_index, read_views
from aplsmear.stage import run


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    backbone = named(params.backbones, name, "backbones")
    start_tensorflow()
    weights = Path(backbone.weights)
    if weights.is_file() and not backbone.sha256:
        print(
            f"With `sha256: {sha256(weights)}` next to `weights` of {name} in params.yaml, another file in "
            "its place is noticed.",
            file=sys.stderr,
        )
    for level in LEVELS:
        views = Path(f"augmented/{level}/views.parquet")
        batch = batch_of(backbone, level)
        batches = progress(read_views(views, batch), f"batches of {level}s", -(-count_views(views) // batch))
        features = features_of(batches, backbone, level, params.seed)
        write_features(Path(f"features/{level}/{name}"), read_index(views), backbone.layer, features)
        write_weights(Path(f"backbones/{name}/{level}.weights.h5"), backbone, level, params.seed)


if __name__ == "__main__":
    run(main)
