"""One forward pass of one frozen backbone over all views of cells and smears; its graph is kept.

Usage: python stages/bottleneck.py BACKBONE   (a name of `backbones` in params.yaml)
"""

import sys
from pathlib import Path

from aplsmear.compute.engine import engine_of
from aplsmear.compute.runtime import device_note, start_tensorflow
from aplsmear.features.backbones import UNTRAINED, weight_files, write_graph
from aplsmear.features.forward import FeatureRequest, batch_of, features_of_file, partition
from aplsmear.features.store import write_features
from aplsmear.files import sha256
from aplsmear.images.view_store import count_views, read_index
from aplsmear.params import LEVELS, named, read_params
from aplsmear.progress import progress
from aplsmear.runs.stage import run


def main(name: str) -> None:
    params = read_params(Path("params.yaml"))
    backbone = named(params.backbones, name, "backbones")
    views = {level: Path(f"augmented/{level}/views.parquet") for level in LEVELS}
    if backbone.source != "onnx":
        start_tensorflow(gpus=False)
    if device_note():
        print(device_note(), file=sys.stderr)
    if backbone.source != "onnx" and backbone.weights == UNTRAINED:
        print(
            f"{name} is untrained (`weights: none`): its filters are random. For real smears set `weights` "
            "in params.yaml to imagenet or to a file.",
            file=sys.stderr,
        )
    for file in filter(Path.is_file, weight_files(backbone)):
        if not backbone.sha256:
            print(
                f"Add `sha256: {sha256(file)}` below `weights` of {name} in params.yaml: then this stage "
                "runs again if the file changes.",
                file=sys.stderr,
            )
    graphs = {level: Path(f"backbones/{name}/{level}.onnx") for level in LEVELS}
    same_bits = [write_graph(graph, backbone, level, params.seed) for level, graph in graphs.items()]
    if not all(same_bits):
        print(
            f"The features of {name} differ between processors in their last digits: its network has "
            "operations without the same bits everywhere.",
            file=sys.stderr,
        )
    with engine_of(params, list(views.values()), networks=True) as engine:
        for level, path in views.items():
            layers = tuple(backbone.layer)
            request = FeatureRequest(name, graphs[level], level, layers, batch_of(backbone, level))
            found = features_of_file(path, request, engine)
            parts = -(-count_views(path) // partition(request))
            features = progress(found, f"partitions of {level}s", parts)
            write_features(Path(f"features/{level}/{name}"), read_index(path), backbone.layer, features)


if __name__ == "__main__":
    run(main)
