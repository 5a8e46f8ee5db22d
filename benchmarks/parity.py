"""Do our DINOv2 and DINOv3 give the features of the published implementations? On random weights.

Usage: python benchmarks/parity.py --python /tmp/parity/bin/python [--blocks N] [--only NAME]

The other Python needs an environment of its own with torch, transformers, timm and safetensors:

    python3.11 -m venv /tmp/parity && /tmp/parity/bin/pip install torch transformers timm safetensors

For every variant and source of weights, benchmarks/published.py writes a checkpoint and the features by
PyTorch. `aplsmear weights convert` reads the checkpoint, and the Keras network gives its features and, where
it fits into a graph, so does ONNX Runtime. The largest differences are added to
benchmarks/results/parity.json. A case of 24 blocks takes about a minute; DINOv2 G and DINOv3 H+ need 16 GB.
--blocks N cuts the depth.
"""

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
from record import ROOT, commit, machine

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.dino_variants import CLASS, PATCHES, VARIANTS, variant_of
from aplsmear.features.backbones import cut_network, write_graph
from aplsmear.features.onnx_graph import PIXELS
from aplsmear.params import Backbone
from aplsmear.sources.published_weights import read_published, row_of, write_weights

RESULTS = ROOT / "benchmarks" / "results" / "parity.json"
LIMIT = 1e-4
GRAPH = 2**31  # bytes; a graph is one protobuf message


def cases(blocks: int) -> dict[str, dict]:
    """Name -> variant, source of the weights, side of the image in px. `blocks`: 0 for all."""
    found = {}
    for name, plain in VARIANTS.items():
        depth = min(blocks, plain.depth) if blocks else plain.depth
        for registers in (0, 4) if plain.grid else (plain.registers,):
            variant = variant_of(name, {"depth": depth, "registers": registers})
            for source, grid in (("transformers", 37), ("timm", 37), ("dinobloom", 16)):
                if source == "dinobloom" and (registers or not plain.grid):
                    continue
                shape = asdict(variant) | ({"grid": grid} if plain.grid else {})
                title = (
                    f"{name}{f' with {registers} registers' if registers and plain.grid else ''}, {source}"
                )
                found[title] = shape | {"source": source, "size": 16 * plain.patch}
    return found


def difference(case: dict, python: str, folder: Path) -> dict[str, float]:
    """The largest differences of features to the published implementation, by Keras and by the graph.

    Args:
        case: of `cases`.
        python: of an environment with torch.
        folder: scratch.
    """
    images = np.random.Generator(np.random.Philox(4)).integers(0, 256, (2, case["size"], case["size"], 3))
    np.save(folder / "images.npy", images.astype(np.uint8))
    subprocess.run(
        [python, "-W", "ignore", ROOT / "benchmarks" / "published.py", folder, json.dumps(case)],
        check=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    checkpoint = next(folder.glob("weights.*"))
    converted = read_published(checkpoint, case["heads"])
    weights = folder / "converted.weights.h5"
    row = row_of(converted, "network", weights, write_weights(converted, weights), case["size"])
    checkpoint.unlink()
    settings = Backbone(**row["network"] | {"layer": [CLASS, PATCHES]})
    with np.load(folder / "features.npz") as expected:
        found = {"keras": by_keras(settings, images.astype(np.uint8))}
        if sum(path.stat().st_size for path in [weights]) < GRAPH:
            found["graph"] = by_graph(settings, images.astype(np.uint8), folder)
        return {
            kind: float(max(np.abs(each[layer] - expected[layer]).max() for layer in (CLASS, PATCHES)))
            for kind, each in found.items()
        }


def by_keras(settings: Backbone, images: np.ndarray) -> dict[str, np.ndarray]:
    network, preprocess = cut_network(settings, "cell", 1)
    found = network(preprocess(images.astype(np.float32)), training=False)
    return {layer: np.asarray(each).mean(axis=(1, 2)) for layer, each in found.items()}


def by_graph(settings: Backbone, images: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    write_graph(folder / "graph.onnx", settings, "cell", 1)
    session = onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
    return dict(zip((CLASS, PATCHES), session.run([CLASS, PATCHES], {PIXELS: images}), strict=True))


def record(found: dict[str, dict[str, float]]) -> None:
    """Add differences to those of earlier runs."""
    earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["differences"] if RESULTS.exists() else {}
    every = dict(sorted((earlier | found).items()))
    largest = max(max(each.values()) for each in every.values())
    RESULTS.write_text(
        json.dumps(
            {"largest": largest, "differences": every, "machine": machine(), "commit": commit()}, indent=2
        )
        + "\n",
        encoding="utf-8",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of the other environment")
    parser.add_argument("--blocks", type=int, default=0, help="depth (default: that of the variant)")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    asked = parser.parse_args()
    start_tensorflow()
    found = {}
    for name, case in cases(asked.blocks).items():
        if name.startswith(asked.only):
            with tempfile.TemporaryDirectory() as scratch:
                each = difference(case, asked.python, Path(scratch))
            found[f"{name}, {case['depth']} blocks"] = each
            print(name, each, flush=True)
            record(found)
    largest = max(max(each.values()) for each in found.values())
    print(f"largest difference {largest:.2e}, limit {LIMIT:.0e}")
    return int(largest > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
