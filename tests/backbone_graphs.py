"""Small backbones for tests: their settings, pictures, graphs and features."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aplsmear.features.backbones import write_graph
from aplsmear.features.forward import FeatureRequest, batch_of, features_of
from aplsmear.images.reading import encode_jpeg
from aplsmear.images.view_store import View
from aplsmear.params import Backbone, Level


def mobilenet(**changed: object) -> Backbone:
    plain = {
        "application": "MobileNet",
        "options": {"alpha": 0.25},
        "input_size": {"cell": 32, "smear": 48},
        "layer": ["conv_pw_1_relu", "conv_pw_2_relu"],
        "weights": "none",
        "batch": 4,
    }
    return Backbone(**plain | changed)


def pictures(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def views(count: int, size: int = 32) -> list[View]:
    return [View(str(n), 0, encode_jpeg(image)) for n, image in enumerate(pictures(count, size))]


def request_of(settings: Backbone, folder: Path, level: Level = "cell", seed: int = 1) -> FeatureRequest:
    """All layers of a backbone, whose graph is written into a folder."""
    graph = folder / f"{level}_{seed}.onnx"
    write_graph(graph, settings, level, seed)
    return FeatureRequest("net", graph, level, tuple(settings.layer), batch_of(settings, level))


def features(settings: Backbone, found: list[View], folder: Path) -> list[np.ndarray]:
    """All rows of each layer, float16."""
    request = request_of(settings, folder)
    batches = [found[start : start + request.batch] for start in range(0, len(found), request.batch)]
    rows = list(features_of(iter(batches), request))
    assert [len(batch[0]) for batch in rows] == [len(batch) for batch in batches]
    return [np.concatenate(layer) for layer in zip(*rows, strict=True)]
