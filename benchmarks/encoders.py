"""Backbones on real cells: AUROC, time and size of each layer, as Keras networks and as ONNX files.

Usage: python benchmarks/encoders.py --run FOLDER --weights FOLDER [--work FOLDER]
       python benchmarks/encoders.py --onnx --weights FOLDER

`--run` is a finished run of the profile deepapl: its plain views of cells and its folds are used. `--weights`
has the files of MobileNet named in `BACKBONES`. Each network is also written as an ONNX file by other code
than the project's (`write_plain_file`) and read as a backbone with `source: onnx`. `--work` keeps features.

A logistic regression on the features is trained for each task: on the mean of a patient's cells for APL
against other AML, on cells for the others. Patients of a fold are scored by a model that never saw them; the
penalty is chosen on the other folds (of cells: on the next fold). Results go to
benchmarks/results/encoders.json.

`--onnx` takes a minute and needs no run: the float32 features of squares of the demo's smears by each Keras
network and by its ONNX file, and the peak memory of processes with one backbone, the other one and both.
Results go to benchmarks/results/encoders_onnx.json.
"""

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
from onnx import TensorProto, helper, numpy_helper
from record import ROOT, commit, machine
from sklearn.linear_model import LogisticRegression

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.data.tasks import task_items, task_labels
from aplsmear.ensembles.baselines import pooled_baseline, pooled_features
from aplsmear.ensembles.combination import patients_of
from aplsmear.evaluation.auroc import auroc, delong_interval
from aplsmear.evaluation.intervals import bootstrap_interval
from aplsmear.features.backbones import cut_network, write_graph
from aplsmear.features.forward import Network, batch_of
from aplsmear.features.onnx_graph import PIXELS
from aplsmear.features.store import Columns, Features
from aplsmear.files import write_arrays, write_json
from aplsmear.images.reading import read_image
from aplsmear.images.view_store import read_index, read_views
from aplsmear.params import Backbone, read_params
from aplsmear.tables import read_table

RESULTS = ROOT / "benchmarks" / "results" / "encoders.json"
OF_ONNX = RESULTS.with_name("encoders_onnx.json")
SIDE, SEED = 160, 1
BACKBONES = {  # name -> alpha, file of weights, layers
    "mobilenet": (
        1.0,
        "mobilenet_1_0_224_imagenet_to_conv_pw_12.weights.h5",
        ["conv_pw_6_relu", "conv_pw_11_relu", "conv_pw_12_relu"],
    ),
    "mobilenet_quarter": (
        0.25,
        "mobilenet_2_5_224_tf_no_top.h5",
        ["conv_pw_6_relu", "conv_pw_12_relu", "conv_pw_13_relu"],
    ),
}
JOINT = [  # features behind one another
    ["mobilenet/conv_pw_6_relu", "mobilenet/conv_pw_11_relu", "mobilenet/conv_pw_12_relu"],
    ["mobilenet/conv_pw_12_relu", "mobilenet_quarter/conv_pw_13_relu"],
]
TASKS = ("blast", "promyelocyte")
STRENGTHS = (0.0001, 0.001, 0.01)  # C of the regressions on cells
CELLS = 40  # of a patient and class that a regression trains on
IMAGES = 500  # whose time is measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path)
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where features stay; otherwise a folder that goes")
    asked = parser.parse_args()
    start_tensorflow(gpus=False)
    if asked.onnx:
        write_json(OF_ONNX, {"machine": machine(), "commit": commit()} | as_files(asked.weights))
        return
    views = asked.run / "augmented/cell/views.parquet"
    index = read_index(views)
    plain = index[index["view"] == 0].reset_index(drop=True)
    found: dict[str, Any] = {"machine": machine(), "commit": commit(), "cells": len(plain), "rows": {}}
    features: dict[str, Features] = {}
    cost: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = asked.work or Path(folder)
        for name in BACKBONES:
            keras, file = rows_of_params(name, asked.weights, Path(folder))
            first, cost[name] = computed(keras, views, Path(folder), IMAGES)
            others, seconds = computed(file, views, Path(folder), IMAGES)
            found[f"{name} as a file"] = seconds | {"difference": largest_difference(first, others)}
            kept = work / f"{name}.npz"
            if not kept.is_file():
                every, _ = computed(keras, views, Path(folder), len(plain))
                write_arrays(kept, dict(zip(keras.layer, every, strict=True)))
            with np.load(kept, allow_pickle=False) as arrays:
                for layer in keras.layer:
                    features[f"{name}/{layer}"] = Features(f"{name}/{layer}", plain, arrays[layer])
    for names in [*([each] for each in features), *JOINT]:
        joint = Columns([features[each].values for each in names])[:]
        used = sorted({each.split("/")[0] for each in names})
        row: dict[str, Any] = {"channels": joint.shape[1]}
        row |= {key: sum(cost[each][key] for each in used) for key in cost[used[0]]}
        found["rows"]["+".join(names)] = row | judged(asked.run, Features("+".join(names), plain, joint))
        print("+".join(names), found["rows"]["+".join(names)], file=sys.stderr, flush=True)
        write_json(RESULTS, found)


def rows_of_params(name: str, weights: Path, folder: Path) -> tuple[Backbone, Backbone]:
    """A network as a row of `backbones`, and as a file."""
    alpha, file, layers = BACKBONES[name]
    shared = {"input_size": {"cell": SIDE, "smear": 480}, "layer": layers, "batch": 64}
    keras = Backbone(application="MobileNet", options={"alpha": alpha}, weights=str(weights / file), **shared)
    path = folder / f"{name}.onnx"
    write_plain_file(path, cut_network(keras, "cell", SEED)[0], SIDE)
    table = {"layout": "NHWC", "scale": 255.0, "mean": [0.5] * 3, "std": [0.5] * 3, "pooling": "map"}
    return keras, Backbone(source="onnx", weights=str(path), onnx=table, **shared)


def as_files(weights: Path) -> dict[str, Any]:
    """Of each network: the difference of float32 features as a file; peak GB of processes with backbones."""
    images = squares()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        graphs: dict[str, list[str]] = {}
        for name in BACKBONES:
            rows = rows_of_params(name, weights, Path(folder))
            made = []
            for row, kind in zip(rows, ("keras", "file"), strict=True):
                graph = Path(folder) / f"{name}-{kind}.onnx"
                write_graph(graph, row, "cell", SEED)
                graphs[str(graph)] = row.layer
                made.append(float32_features(graph, row.layer, images))
            apart = (1e6 * largest_difference([a], [b]) for a, b in zip(*made, strict=True))
            found[f"millionths by which features of {name} differ"] = dict(zip(row.layer, apart, strict=True))
        of_keras = {graph: layers for graph, layers in graphs.items() if graph.endswith("-keras.onnx")}
        for used in ([], *([each] for each in of_keras), list(of_keras)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_of, ({each: of_keras[each] for each in used}, images))
            found[" and ".join(Path(each).stem for each in used) or "no backbone"] = {"peak_gb": peak}
    return found


def squares() -> np.ndarray:
    """64 squares of the demo's smears at the size of the input, uint8 RGB."""
    smears = sorted((ROOT / "demo" / "wsi").iterdir())[:16]
    pages = [read_image(path) for path in smears]
    return np.stack(
        [page[y : y + SIDE, x : x + SIDE] for page in pages for y in (0, SIDE) for x in (0, SIDE)]
    )


def float32_features(graph: Path, layers: Sequence[str], images: np.ndarray) -> list[np.ndarray]:
    """The features as the graph gives them, before they become float16."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in session.run(list(layers), {PIXELS: images})]


def peak_of(graphs: Mapping[str, Sequence[str]], images: np.ndarray) -> float:
    """GB of this process at its peak, after features of 640 images behind one another by these backbones."""
    networks = [Network(Path(graph), layers) for graph, layers in graphs.items()]
    for _ in range(10):
        parts = [each for network in networks for each in network.features(images)]
        np.hstack(parts or [np.empty((len(images), 0))])
    status = Path("/proc/self/status").read_text(
        encoding="utf-8"
    )  # `getrusage` counts the parent's peak, too
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024 / 1e9


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest difference of features, over the largest feature of the layer."""
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in zip(ours, theirs, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def computed(
    settings: Backbone, views: Path, folder: Path, count: int
) -> tuple[list[np.ndarray], dict[str, float]]:
    """The features of the first plain views by layer, and CPU seconds for 1,000 cells and MB of the graph."""
    graph = folder / "graph.onnx"
    write_graph(graph, settings, "cell", SEED)
    network = Network(graph, settings.layer)
    parts: list[list[np.ndarray]] = []
    seconds, measured = 0.0, 0
    for batch in read_views(views, batch_of(settings, "cell")):
        if measured == count:
            break
        plain = [view for view in batch if view.view == 0][: count - measured]
        if not plain:
            continue
        images = network.pixels(plain)
        start = time.process_time()
        parts.append(network.features(images))
        seconds, measured = seconds + time.process_time() - start, measured + len(plain)
    values = [np.concatenate(each) for each in zip(*parts, strict=True)]
    return values, {
        "cpu_seconds_per_1000_cells": 1000 * seconds / measured,
        "megabytes": graph.stat().st_size / 1e6,
    }


def judged(run: Path, features: Features) -> dict[str, Any]:
    """AUROC of held-out patients or cells in each task, with its 95 % interval."""
    params = read_params(run / "params.yaml")
    folds = read_table(run / "splits/folds.csv")
    items = task_items(read_table(run / "dataset/cells.csv"), "cell")
    patients = patients_of(folds, "apl", "aml")
    pooled = pooled_features([features], items[["item", "patient"]], patients)
    score, _ = pooled_baseline(patients, pooled)
    found = {"apl_aml_patient": list(map(float, delong_interval(patients["label"], score)))}
    fold = items["patient"].map(folds.set_index("patient")["fold"]).to_numpy()
    for task in TASKS:
        label = task_labels(items, params.tasks[task])
        known = label >= 0
        score = cell_scores(features.values, label, fold, items["patient"])[known]
        interval = bootstrap_interval(
            auroc, label[known], score, groups=items["patient"][known], resamples=1000, seed=SEED
        )
        found[task] = list(map(float, interval))
    return found


def cell_scores(values: np.ndarray, label: np.ndarray, fold: np.ndarray, patient: pd.Series) -> np.ndarray:
    """Held-out logits of cells, float64 (cells,); the penalty is chosen on the next fold."""
    random = np.random.default_rng(SEED).random(len(label))
    order = pd.DataFrame({"patient": patient.to_numpy(), "label": label, "random": random})
    rank = order.groupby(["patient", "label"])["random"].rank().to_numpy()
    trains = (label >= 0) & (rank <= CELLS)
    out = np.zeros(len(label))
    for outer in np.unique(fold):
        held = (outer + 1) % (fold.max() + 1)
        judges = (label >= 0) & (fold == held)
        train = trains & (fold != outer) & (fold != held)
        aurocs = [auroc(label[judges], each) for each in logits(values, label, train, judges, STRENGTHS)]
        best = int(np.argmax(aurocs))
        train = trains & (fold != outer)
        out[fold == outer] = logits(values, label, train, fold == outer, STRENGTHS[best : best + 1])[0]
    return out


def logits(
    values: np.ndarray, label: np.ndarray, train: np.ndarray, test: np.ndarray, strengths: Sequence[float]
) -> np.ndarray:
    """Logits of some cells by one regression for each strength, float64 (strengths, cells)."""
    x = values[train].astype(np.float32)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    x, others = (x - mean) / scale, (values[test].astype(np.float32) - mean) / scale
    model = LogisticRegression(max_iter=300, tol=1e-3, warm_start=True)
    return np.array(
        [model.set_params(C=each).fit(x, label[train]).decision_function(others) for each in strengths]
    )


# --- a Keras MobileNet as a file of plain operations, as other programs write it --------------------------


def write_plain_file(path: Path, network: Any, size: int) -> None:
    """Write a MobileNet as an ONNX file: one operation for each layer, opset 17, a free batch, NHWC.

    `network` is the model of `cut_network`. Its outputs get the names of their layers.
    """
    nodes: list[Any] = []
    weights: list[Any] = []

    def constant(values: Any, dtype: Any = np.float32) -> str:
        weights.append(numpy_helper.from_array(np.asarray(values, dtype), f"weight_{len(weights)}"))
        return str(weights[-1].name)

    nodes.append(helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]))
    last = "nchw"
    for layer in network.layers[1:]:
        kind, out = type(layer).__name__, f"/{layer.name}/out"
        given = [last, *(constant(each) for each in tensors(layer, kind))]
        if kind == "ZeroPadding2D":
            (top, bottom), (left, right) = layer.padding
            given.append(constant([0, 0, top, left, 0, 0, bottom, right], np.int64))
        nodes.append(helper.make_node(OPERATION[kind], given, [out], **attributes(layer, kind)))
        last = out
        if layer.name in network.output:
            nodes.append(helper.make_node("Transpose", [out], [layer.name], perm=[0, 2, 3, 1]))
    info = helper.make_tensor_value_info
    outputs = [info(name, TensorProto.FLOAT, ["n", None, None, None]) for name in network.output]
    image = info("image", TensorProto.FLOAT, ["n", size, size, 3])
    graph = helper.make_graph(nodes, "mobilenet", [image], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


OPERATION: Mapping[str, str] = {
    "BatchNormalization": "BatchNormalization",
    "Conv2D": "Conv",
    "DepthwiseConv2D": "Conv",
    "ReLU": "Clip",
    "ZeroPadding2D": "Pad",
}


def tensors(layer: Any, kind: str) -> list[Any]:
    """The weights of a layer, in the order and form of ONNX."""
    if kind == "BatchNormalization":
        return [layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance]
    if kind == "ReLU":
        return [np.float32(0), np.float32(layer.max_value)]
    if kind == "ZeroPadding2D":
        return []
    kernel = np.asarray(layer.kernel)
    return [kernel.transpose(2, 3, 0, 1) if kind == "DepthwiseConv2D" else kernel.transpose(3, 2, 0, 1)]


def attributes(layer: Any, kind: str) -> dict[str, Any]:
    """The attributes of a layer, as ONNX names them."""
    if kind == "BatchNormalization":
        return {"epsilon": layer.epsilon}
    if not kind.endswith("Conv2D"):
        return {}
    pads = {"auto_pad": "SAME_UPPER" if layer.padding == "same" else "VALID"}
    groups = layer.kernel.shape[2] if kind == "DepthwiseConv2D" else 1
    return {"strides": list(layer.strides), "group": groups, **pads}


if __name__ == "__main__":
    main()
