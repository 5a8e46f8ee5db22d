"""Small ONNX files of other programs for tests: a network of convolutions, and a transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aplsmear.params import Backbone

ROWS: dict[str, Any] = {
    "source": "onnx",
    "input_size": {"cell": 32, "smear": 32},
    "layer": ["features"],
    "batch": 4,
    "onnx": {
        "layout": "NCHW",
        "scale": 255.0,
        "mean": [0.5, 0.4, 0.6],
        "std": [0.2, 0.25, 0.3],
        "pooling": "map",
        "tokens": 1,
    },
}


def backbone(path: Path, **changed: object) -> Backbone:
    """A row of `backbones` for a file; `changed` has keys of the row or of its table `onnx`."""
    table = {key: changed.pop(key) for key in list(changed) if key in ROWS["onnx"]}
    return Backbone(**ROWS | {"weights": str(path), "onnx": ROWS["onnx"] | table} | changed)


class Writer:
    """Collects the nodes and weights of a file."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._rng = np.random.default_rng(3)

    def weight(self, *shape: int, shift: float = 0.0) -> str:
        """A random weight; with `shift`, a positive one."""
        spread = max(int(np.prod(shape[1:])), 1) ** -0.5
        values = self._rng.normal(0, spread, shape) if not shift else self._rng.uniform(shift, 1.5, shape)
        return self.constant(values.astype(np.float32))

    def constant(self, values: Any) -> str:
        """A constant, int64 unless it is an array."""
        array = (
            np.asarray(values) if isinstance(values, (np.ndarray, np.generic)) else np.array(values, np.int64)
        )
        self.weights.append(numpy_helper.from_array(array, f"weight_{len(self.weights)}"))
        return str(self.weights[-1].name)

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node, and the name of its output."""
        output = output or f"/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def normalised(self, x: str, channels: int, output: str = "") -> str:
        """Batch normalisation."""
        weights = [self.weight(channels, shift=each) for each in (0.5, -0.5, -0.5, 0.5)]
        return self.add("BatchNormalization", x, *weights, output=output)

    def save(self, path: Path, shape: list[int | str], axes: int, opset: int = 17) -> Path:
        """Write the file, whose output has so many axes."""
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "g",
            [info("image", TensorProto.FLOAT, shape)],
            [info("features", TensorProto.FLOAT, [shape[0], *[None] * (axes - 1)])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.save(model, path)
        return path


def convolutions(path: Path, layout: str = "NCHW", batch: int | str = "n") -> Path:
    """Convolutions of odd numbers of channels, of groups, with batch normalisation and squeeze-excitation."""
    net = Writer()
    x = net.add("Transpose", "image", perm=[0, 3, 1, 2]) if layout == "NHWC" else "image"
    x = net.add("Conv", x, net.weight(20, 3, 3, 3), net.weight(20), strides=[2, 2], pads=[0, 0, 1, 1])
    x = net.add("HardSwish", net.normalised(x, 20))
    y = net.add("Conv", x, net.weight(20, 1, 3, 3), group=20, auto_pad="SAME_UPPER")
    y = net.add("Clip", net.normalised(y, 20), net.constant(np.float32(0)), net.constant(np.float32(6)))
    mean = net.add("ReduceMean", y, axes=[2, 3], keepdims=1)
    gate = net.add("Sigmoid", net.add("Conv", mean, net.weight(20, 20, 1, 1)))
    x = net.add("Add", x, net.add("Mul", y, gate))
    x = net.add("Relu", net.add("Conv", x, net.weight(36, 20, 1, 1), net.weight(36)))
    x = net.add("Conv", x, net.weight(36, 9, 3, 3), group=4, pads=[1, 1, 1, 1])
    x = net.add("Concat", x, net.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), axis=1)
    x = net.add("Conv", x, net.weight(24, 72, 3, 3), dilations=[2, 2])
    x = net.normalised(x, 24, output="" if layout == "NHWC" else "features")
    if layout == "NHWC":
        net.add("Transpose", x, perm=[0, 2, 3, 1], output="features")
    image: list[int | str] = [batch, 3, "h", "w"] if layout == "NCHW" else [batch, 32, 32, 3]
    return net.save(path, image, 4)


def transformer(path: Path, batch: int | str = "n", opset: int = 17) -> Path:
    """One block of a vision transformer of 16 patches, written as PyTorch does, with sizes from the image."""
    net = Writer()
    x = net.add("Conv", "image", net.weight(32, 3, 8, 8), net.weight(32), strides=[8, 8])
    size = net.add("Shape", x)
    pick = [net.add("Gather", size, net.constant([n]), axis=0) for n in (0, 1)]
    flat = net.add("Concat", *pick, net.constant([-1]), axis=0)
    x = net.add("Transpose", net.add("Reshape", x, flat), perm=[0, 2, 1])
    count = net.add("Concat", pick[0], net.constant([1]), net.constant([32]), axis=0)
    token = net.weight(1, 1, 32) if batch == 1 else net.add("Expand", net.weight(1, 1, 32), count)
    x = net.add("Add", net.add("Concat", token, x, axis=1), net.weight(1, 17, 32))
    y = net.add("LayerNormalization", x, net.weight(32, shift=0.5), net.weight(32), axis=-1)
    wide = net.add("Add", net.add("MatMul", y, net.weight(32, 96)), net.weight(96))
    heads = net.add("Concat", pick[0], net.constant([17]), net.constant([3, 2, 16]), axis=0)
    wide = net.add("Transpose", net.add("Reshape", wide, heads), perm=[2, 0, 3, 1, 4])
    q, k, v = (net.add("Gather", wide, net.constant(n), axis=0) for n in range(3))
    scores = net.add("MatMul", q, net.add("Transpose", k, perm=[0, 1, 3, 2]))
    scaled = net.add("Mul", scores, net.constant(np.float32(0.25)))
    y = net.add("MatMul", net.add("Softmax", scaled, axis=-1), v)
    y = net.add("Reshape", net.add("Transpose", y, perm=[0, 2, 1, 3]), net.constant([0, 17, 32]))
    x = net.add("Add", x, net.add("MatMul", y, net.weight(32, 32)))
    y = net.add("MatMul", x, net.weight(32, 64))
    half = net.add("Erf", net.add("Div", y, net.constant(np.float32(2**0.5))))
    y = net.add(
        "Mul",
        net.add("Mul", y, net.add("Add", half, net.constant(np.float32(1)))),
        net.constant(np.float32(0.5)),
    )
    x = net.add("Add", x, net.add("MatMul", y, net.weight(64, 32)))
    net.add("LayerNormalization", x, net.weight(32, shift=0.5), net.weight(32), axis=-1, output="features")
    return net.save(path, [batch, 3, 32, 32], 3, opset)
