"""Speed of `bottleneck`, from encoded views to features on disk, beside bare forward passes.

Usage: python benchmarks/forward.py [NAME ...]   (names of backbones, as demo/mobilenet; otherwise all)

For each backbone of params.yaml and profiles/, and for MobileNet at 64 px, with cells of a drawn smear and
untrained filters (see `networks.write_live_weights`):

- `stage`: decoding, forward pass and features on disk, as the stage `bottleneck` does it once it has started;
- `onnx_runtime`: its forward pass alone, on decoded views in memory, by as many threads;
- `tensorflow`: the Keras network, traced, as TensorFlow starts on this processor, on decoded views in memory;
  also with TF_ENABLE_ONEDNN_OPTS 0 and 1. The limits of `aplsmear.cpu` do not apply to it;
- `sgemm`: a product of two large matrices by OpenBLAS with all instructions of the processor, in one thread:
  the limit of the machine's arithmetic.

Each runs in a process of its own. They take turns, so that other work on the machine slows all of them; what
counts is CPU time. Results: benchmarks/results/forward.json.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import yaml
from networks import gflop, keras_network, write_live_weights
from record import ROOT, commit, machine

from aplsmear.cpu import PINNED
from aplsmear.features.backbones import cut_network, write_graph
from aplsmear.features.forward import FeatureRequest, Network, features_of_file
from aplsmear.features.store import write_features
from aplsmear.files import write_json
from aplsmear.images.augmentation import Pyramid
from aplsmear.images.reading import decode_jpeg, read_image
from aplsmear.images.view_store import View, read_index, read_views, view_writer
from aplsmear.images.views import cell_views
from aplsmear.params import Backbone, read_params
from aplsmear.sources.drawn import draw_data_set

RESULTS = ROOT / "benchmarks" / "results" / "forward.json"
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
WAYS = {  # -> environment variables
    "stage": {},
    "onnx_runtime": {},
    "tensorflow": {},
    "tensorflow_onednn_0": {ONEDNN: "0"},
    "tensorflow_onednn_1": {ONEDNN: "1"},
    "sgemm": {"OPENBLAS_NUM_THREADS": "1"},
}
ROUNDS, GFLOP, SIDE = 5, 150, 2048  # rounds; arithmetic of a network in a round; side of the matrices
EXTRA = {  # beside the backbones of the profiles
    "mobilenet-64": {
        "application": "MobileNet",
        "input_size": {"cell": 64, "smear": 192},
        "layer": ["conv_pw_12_relu"],
        "weights": "none",
        "batch": 64,
    }
}


def main() -> None:
    wanted = sys.argv[1:] or list(backbones())
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        draw_data_set(work / "drawn", 3, 1)
        smear = next((work / "drawn" / "wsi").iterdir())
        for backbone in wanted:
            settings = Backbone.model_validate(backbones()[backbone] | {"weights": "none", "sha256": ""})
            weights = work / f"{backbone.replace('/', '-')}.weights.h5"
            write_live_weights(weights, settings, smear)
            settings = settings.model_copy(update={"weights": str(weights)})
            views = drawn_views(smear, settings.input_size["cell"])
            found[backbone] = {"machine": machine(), "commit": commit()} | compare(settings, views)
            write_json(RESULTS, found)
            print(backbone, json.dumps(found[backbone]), flush=True)


def backbones() -> dict[str, dict[str, Any]]:
    """The backbones of params.yaml and of the profiles, by profile and name."""
    files = {"demo": ROOT / "params.yaml"} | {
        path.stem: path for path in sorted((ROOT / "profiles").glob("*.yaml"))
    }
    every = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in files.items()}
    of_profiles = {
        f"{profile}/{name}": settings
        for profile, params in every.items()
        for name, settings in params.get("backbones", {}).items()
    }
    return EXTRA | of_profiles


def drawn_views(smear: Path, size: int) -> Iterator[View]:
    """Views of squares of a smear, three each: two of them augmented as in the demo."""
    pyramid = Pyramid(read_image(smear))
    height, width = pyramid.image.shape[:2]
    settings = read_params(ROOT / "params.yaml").augment.model_copy(update={"size": {"cell": size}})
    number = 0
    while True:
        y0, x0 = 97 * number % (height - 120), 131 * number % (width - 120)
        yield from cell_views(pyramid, (y0, x0, y0 + 120, x0 + 120), str(number), 2, settings, 1)
        number += 1


def compare(settings: Backbone, views: Iterable[View]) -> dict[str, Any]:
    """Images per CPU second of each way, and their ratios.

    Args:
        settings: of the backbone, with the path of its weights.
        views: at least as many as one round takes.
    """
    amount = gflop(cut_network(settings, "cell", 1)[0])
    count = math.ceil(GFLOP / amount / settings.batch) * settings.batch
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_graph(work / "cell.onnx", settings, "cell", 1)
        (work / "settings.json").write_text(settings.model_dump_json(), encoding="utf-8")
        with view_writer({"cell": work / "views.parquet"}) as write:
            chosen = islice(views, count)
            while group := list(islice(chosen, 256)):
                write({"cell": group})
        workers = {way: _Worker(way, work) for way in WAYS}
        took = dict.fromkeys(WAYS, 0.0)
        for _ in range(ROUNDS):
            for way, worker in workers.items():
                took[way] += worker.run()
        for worker in workers.values():
            worker.close()
    speed = {way: ROUNDS * count / seconds for way, seconds in took.items() if way != "sgemm"}
    limit = ROUNDS * 2 * SIDE**3 / 1e9 / took["sgemm"]
    return {
        "images_per_cpu_second": {way: round(value, 1) for way, value in speed.items()},
        "vs_tensorflow": {
            way.removeprefix("tensorflow").lstrip("_") or "as_it_starts": speed["stage"] / speed[way]
            for way in speed
            if way.startswith("tensorflow")
        },
        "forward_fraction": speed["stage"] / speed["onnx_runtime"],
        "gflop_per_image": amount,
        "sgemm_gflop_per_cpu_second": limit,
        "arithmetic_fraction": amount * speed["stage"] / limit,
        "images": count,
    }


# --- one way, in a process of its own -------------------------------------------------------------------


class _Worker:
    """A process that runs one way, once for each line that it reads."""

    def __init__(self, way: str, work: Path) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--worker", way, str(work)]
        # `aplsmear.cpu` has set its limits in this process, and NumPy has been loaded before.
        environment = {key: value for key, value in os.environ.items() if key not in {*PINNED, ONEDNN}}
        self._process = subprocess.Popen(
            command, env=environment | WAYS[way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._asks: Any = self._process.stdin
        self._answers: Any = self._process.stdout
        self._number()  # it is ready

    def _number(self) -> float:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"{self._process.args} failed")
        return float(line)

    def run(self) -> float:
        """CPU seconds of one round."""
        print(file=self._asks, flush=True)
        return self._number()

    def close(self) -> None:
        """End the process."""
        self._asks.close()
        self._process.wait()


def work_for(way: str, work: Path) -> None:
    """Prepare a way and print a 0; then, for each line of stdin, its CPU seconds."""
    prepare = {"sgemm": _sgemm, "stage": _stage, "onnx_runtime": _onnx_runtime}.get(way, _tensorflow)
    function = prepare(work)
    function()
    print(0, flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        function()
        print(time.process_time() - started, flush=True)


def _sgemm(_: Path) -> Callable[[], object]:
    a, b = np.random.default_rng(1).random((2, SIDE, SIDE), dtype=np.float32)
    return lambda: a @ b


def _request(work: Path) -> tuple[Any, Any]:
    settings = Backbone.model_validate_json((work / "settings.json").read_text(encoding="utf-8"))
    return settings, FeatureRequest("b", work / "cell.onnx", "cell", tuple(settings.layer), settings.batch)


def _pixels(work: Path) -> tuple[Any, Any, list[np.ndarray]]:
    settings, request = _request(work)
    batches = read_views(work / "views.parquet", settings.batch)
    return settings, request, [np.stack([decode_jpeg(view.image) for view in each]) for each in batches]


def _stage(work: Path) -> Callable[[], object]:
    settings, request = _request(work)
    path = work / "views.parquet"
    return lambda: write_features(
        work / "features", read_index(path), settings.layer, features_of_file(path, request)
    )


def _onnx_runtime(work: Path) -> Callable[[], object]:
    _, request, pixels = _pixels(work)
    network = Network(request.graph, request.layers)
    pool = ThreadPoolExecutor(joblib.cpu_count())
    return lambda: list(pool.map(network.features, pixels))


def _tensorflow(work: Path) -> Callable[[], object]:
    settings, _, pixels = _pixels(work)
    for name in PINNED:
        os.environ.pop(name, None)  # TensorFlow reads them after its import
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    network = keras_network(settings, "cell", 1)
    traced = tf.function(lambda images: network(images, training=False))
    return lambda: [[each.numpy() for each in traced(images).values()] for images in pixels]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work_for(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
