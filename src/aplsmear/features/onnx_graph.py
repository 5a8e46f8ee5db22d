"""A Keras network as an ONNX graph whose features are the same bytes on every processor.

TensorFlow sums in an order that depends on the processor, and batch normalisation uses the processor's own
estimate of a reciprocal root. ONNX Runtime's kernels for convolutions, products and sums give the same bits
on every x86-64 processor with AVX2 and FMA. So a network is built by Keras once, batch normalisation is
folded into the convolutions in float64, and the graph that is written here is run by ONNX Runtime.

A graph is data: a list of operations of the ONNX standard, `OPERATIONS`, and their weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aplsmear.errors import UserError

OPSET, IR_VERSION = 18, 10
PIXELS = "pixels"  # name of the input: uint8 (images, side, side, 3), RGB
OPERATIONS = frozenset(
    [
        *("Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Div", "Erf", "MaxPool", "Mul", "Pad"),
        *("ReduceMean", "Relu", "Reshape", "Sigmoid", "Slice", "Sqrt", "Sub", "Tanh", "Transpose"),
    ]
)


class GraphError(UserError, ValueError):
    """A network that cannot be written as a graph, or a graph that may not be run; the message says why."""


def as_graph(network: Any, preprocess: Callable[[Any], Any], size: int) -> onnx.ModelProto:
    """Write a Keras network as an ONNX graph.

    Args:
        network: keras.Model of `aplsmear.features.backbones.cut_network`: float32 (batch, size, size, 3) ->
            {layer: its map}.
        preprocess: from float32 RGB, 0 to 255, to what the network takes; an affine function of the pixel.
        size: side of the image in px.

    Returns:
        The graph: `PIXELS` -> for each layer float32 (images, channels), the mean of its map over the image.

    Raises:
        GraphError: a layer of a type, or with a setting, for which there is no operation here.
    """
    graph = _Graph()
    image = graph.add("Cast", [PIXELS], to=TensorProto.FLOAT)
    image = _preprocessed(graph, graph.add("Transpose", [image], perm=[0, 3, 1, 2]), preprocess)
    found = _write_network(graph, network, image)
    for layer, (name, rank) in found.items():
        if rank != 4:
            raise GraphError(
                f"layer {layer!r} gives no map of height, width and channels: cut at another one"
            )
        graph.add("ReduceMean", [name, graph.constant(np.array([2, 3]))], name=layer, keepdims=0)
    outputs = [helper.make_tensor_value_info(layer, TensorProto.FLOAT, ["images", None]) for layer in found]
    pixels = helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["images", size, size, 3])
    made = helper.make_graph(graph.nodes, "backbone", [pixels], outputs, graph.weights)
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="aplsmear"
    )
    onnx.checker.check_model(model)
    return model


def only(model: onnx.ModelProto, layers: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph that some of its layers need; what lies behind them is not computed.

    Raises:
        GraphError: the graph does not give such a layer.
    """
    outputs = {output.name: output for output in model.graph.output}
    if strangers := [layer for layer in layers if layer not in outputs]:
        raise GraphError(f"the graph gives no {', '.join(strangers)}; it gives {', '.join(outputs)}")
    wanted, nodes = set(layers), []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted.update(node.input)
            nodes.append(node)
    graph = helper.make_graph(
        nodes[::-1],
        model.graph.name,
        model.graph.input,
        [outputs[layer] for layer in layers],
        [each for each in model.graph.initializer if each.name in wanted],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def read_graph(content: bytes) -> onnx.ModelProto:
    """Read a graph from anywhere; nothing of it is run.

    Raises:
        GraphError: it is none, or one that does more than `as_graph` writes: another operation, a function, a
            subgraph, or weights in another file.
    """
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise classes of their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraphError(f"this is no ONNX graph ({reason}): copy the file again from its source") from None
    strange = sorted({node.op_type for node in model.graph.node} - OPERATIONS)
    if strange or any(node.domain for node in model.graph.node) or model.functions:
        raise GraphError(
            f"the graph has operations that no backbone has: {', '.join(strange) or 'functions'}"
        )
    if any(each.data_location == TensorProto.EXTERNAL for each in model.graph.initializer):
        raise GraphError("the graph takes weights from another file: put them into the graph")
    return model


class _Graph:
    """The operations and weights of a graph as they are written."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, values: Any, dtype: Any = None) -> str:
        """Add an array (floats as float32); returns its name."""
        array = np.asarray(values)
        array = array.astype(dtype or (np.float32 if array.dtype.kind == "f" else np.int64))
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def add(self, operation: str, inputs: list[str], name: str = "", **attributes: Any) -> str:
        """Add an operation; returns the name of its output."""
        name = name or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [name], **attributes))
        return name


def _preprocessed(graph: _Graph, image: str, preprocess: Callable[[Any], Any]) -> str:
    """The affine preprocessing of an application as a 1x1 convolution; its matrix is found by probing it."""
    probes = np.vstack([np.zeros(3), 255 * np.eye(3), [[10, 200, 77]]]).astype(np.float32)
    given = np.asarray(preprocess(probes.reshape(-1, 1, 1, 3).copy()), np.float64).reshape(-1, 3)
    offset = given[0]
    matrix = (given[1:4] - offset).T / 255
    if not np.allclose(matrix @ probes[4] + offset, given[4], atol=1e-3):
        raise GraphError("the preprocessing of this application is not an affine function of the pixel")
    return _convolved(graph, image, matrix[:, :, None, None], offset)


def _convolved(graph: _Graph, x: str, kernel: np.ndarray, bias: np.ndarray, **attributes: Any) -> str:
    """A convolution; `kernel` is (outputs, inputs, height, width)."""
    return graph.add("Conv", [x, graph.constant(kernel), graph.constant(bias)], **attributes)


def _write_network(graph: _Graph, network: Any, image: str) -> dict[str, tuple[str, int]]:
    """Write all layers of a functional network; for each output its name in the graph and its rank."""
    calls = _calls(network)
    outputs = network.output if isinstance(network.output, Mapping) else {"": network.output}
    names = {id(network.inputs[0]): image}
    uses = Counter(id(tensor) for _, taken, _ in calls for tensor in taken)
    uses.update(id(tensor) for tensor in outputs.values())
    normalised = {id(taken[0]): layer for layer, taken, _ in calls if _kind(layer) == "BatchNormalization"}
    folded = set()
    for layer, taken, given in calls:
        if id(layer) in folded:
            names[id(given)] = names[id(taken[0])]
            continue
        following = normalised.get(id(given)) if uses[id(given)] == 1 and _can_fold(layer) else None
        folded.add(id(following))
        if _kind(layer) not in _WRITERS:
            raise GraphError(
                f"layer {layer.name!r} is a {_kind(layer)}, which cannot be written as a graph; these can: "
                f"{', '.join(sorted(_WRITERS))}"
            )
        operands = [graph.constant(each) if np.isscalar(each) else names[id(each)] for each in taken]
        names[id(given)] = _WRITERS[_kind(layer)](graph, layer, operands, taken, following)
    return {layer: (names[id(tensor)], len(tensor.shape)) for layer, tensor in outputs.items()}


def _calls(network: Any) -> list[tuple[Any, list[Any], Any]]:
    """The layers and other operations of a network in order, each with its inputs and its output.

    Inputs are tensors; those of an operation that is no layer (``x + 3``) may be numbers.
    """
    import keras

    # Keras's public way to follow the calls (clone_model) does not show operations that are no layers.
    depths = sorted(network._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in network._nodes_by_depth[depth] if not node.is_input]
    found = []
    for node in nodes:
        is_layer = isinstance(node.operation, keras.Layer)
        taken = node.arguments.keras_tensors if is_layer else keras.tree.flatten(node.arguments.args)
        found.append((node.operation, list(taken), node.outputs[0]))
    return found


def _kind(layer: Any) -> str:
    return type(layer).__name__


# A writer takes the graph, the layer, the names and the Keras tensors of its inputs, and the batch
# normalisation to fold; it returns the name of its output. Maps are (images, channels, height, width).
_Writer = Callable[[_Graph, Any, list[str], list[Any], Any], str]


def _can_fold(layer: Any) -> bool:
    """Whether a batch normalisation behind this layer can be folded into its weights."""
    kinds = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D")
    return _kind(layer) in kinds and layer.activation.__name__ == "linear"


def _scale_and_offset(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Batch normalisation in inference as ``scale * x + offset``, float64 (channels,)."""
    mean, variance = (np.asarray(each, np.float64) for each in (layer.moving_mean, layer.moving_variance))
    scale = 1 / np.sqrt(variance + layer.epsilon)
    scale *= np.asarray(layer.gamma, np.float64) if layer.scale else 1.0
    return scale, (np.asarray(layer.beta, np.float64) if layer.center else 0.0) - mean * scale


def _window(layer: Any, size: Sequence[int], tensor: Any) -> dict[str, Any]:
    """Kernel, strides and padding of a convolution or pooling, as ONNX names them."""
    strides = list(layer.strides)
    before, after = [0, 0], [0, 0]
    if layer.padding == "same":
        for axis, side in enumerate(tensor.shape[1:3]):
            width = (size[axis] - 1) * getattr(layer, "dilation_rate", (1, 1))[axis] + 1
            missing = max((-(-side // strides[axis]) - 1) * strides[axis] + width - side, 0)
            before[axis], after[axis] = missing // 2, missing - missing // 2
    return {"kernel_shape": list(size), "strides": strides, "pads": before + after}


def _write_convolution(graph: _Graph, layer: Any, names: list[str], taken: list[Any], following: Any) -> str:
    kernel = np.asarray(layer.kernel, np.float64)
    groups = getattr(layer, "groups", 1)
    if _kind(layer) == "DepthwiseConv2D":  # (height, width, channels, multiplier)
        groups = kernel.shape[2]
        kernel = kernel.reshape(*kernel.shape[:2], 1, -1)
    kernel = kernel.transpose(3, 2, 0, 1)
    bias = np.asarray(layer.bias, np.float64) if layer.use_bias else np.zeros(len(kernel))
    if following is not None:
        scale, offset = _scale_and_offset(following)
        kernel, bias = kernel * scale[:, None, None, None], bias * scale + offset
    window = _window(layer, kernel.shape[2:], taken[0]) | {"dilations": list(layer.dilation_rate)}
    given = _convolved(graph, names[0], kernel, bias, group=groups, **window)
    return _activated(graph, layer, given)


def _write_separable(graph: _Graph, layer: Any, names: list[str], taken: list[Any], following: Any) -> str:
    depthwise = np.asarray(layer.depthwise_kernel, np.float64)
    channels = depthwise.shape[2]
    depthwise = depthwise.reshape(*depthwise.shape[:2], 1, -1).transpose(3, 2, 0, 1)
    window = _window(layer, depthwise.shape[2:], taken[0]) | {"dilations": list(layer.dilation_rate)}
    x = _convolved(graph, names[0], depthwise, np.zeros(len(depthwise)), group=channels, **window)
    pointwise = np.asarray(layer.pointwise_kernel, np.float64).transpose(3, 2, 0, 1)
    bias = np.asarray(layer.bias, np.float64) if layer.use_bias else np.zeros(len(pointwise))
    if following is not None:
        scale, offset = _scale_and_offset(following)
        pointwise, bias = pointwise * scale[:, None, None, None], bias * scale + offset
    return _activated(graph, layer, _convolved(graph, x, pointwise, bias))


def _write_dense(graph: _Graph, layer: Any, names: list[str], taken: list[Any], _: Any) -> str:
    """A dense layer on a map is a 1x1 convolution."""
    if len(taken[0].shape) != 4:
        raise GraphError(f"layer {layer.name!r}: a dense layer is written on maps only")
    kernel = np.asarray(layer.kernel, np.float64).T[:, :, None, None]
    bias = np.asarray(layer.bias, np.float64) if layer.use_bias else np.zeros(len(kernel))
    return _activated(graph, layer, _convolved(graph, names[0], kernel, bias))


def _by_channel(graph: _Graph, values: Any) -> str:
    return graph.constant(np.asarray(values, np.float64).reshape(1, -1, 1, 1))


def _write_batch_normalisation(graph: _Graph, layer: Any, names: list[str], taken: list[Any], _: Any) -> str:
    scale, offset = _scale_and_offset(layer)
    scaled = graph.add("Mul", [names[0], _by_channel(graph, scale)])
    return graph.add("Add", [scaled, _by_channel(graph, offset * np.ones(taken[0].shape[-1]))])


def _write_layer_normalisation(graph: _Graph, layer: Any, names: list[str], _: Any, __: Any) -> str:
    """Over the channels, by operations that are the same on every processor."""
    axes = graph.constant(np.array([1]))
    centred = graph.add("Sub", [names[0], graph.add("ReduceMean", [names[0], axes], keepdims=1)])
    variance = graph.add("ReduceMean", [graph.add("Mul", [centred, centred]), axes], keepdims=1)
    spread = graph.add("Sqrt", [graph.add("Add", [variance, graph.constant(np.float64(layer.epsilon))])])
    x = graph.add("Div", [centred, spread])
    x = graph.add("Mul", [x, _by_channel(graph, layer.gamma)]) if layer.scale else x
    return graph.add("Add", [x, _by_channel(graph, layer.beta)]) if layer.center else x


def _activated(graph: _Graph, layer: Any, x: str) -> str:
    """The activation function of a layer."""
    name = layer.activation.__name__
    if name not in _ACTIVATIONS:
        raise GraphError(
            f"layer {layer.name!r} has the activation {name}, which cannot be written as a graph; these can: "
            f"{', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name](graph, x)


def _number(graph: _Graph, value: float) -> str:
    return graph.constant(np.float64(value))


def _relu6(graph: _Graph, x: str) -> str:
    return graph.add("Clip", [x, _number(graph, 0), _number(graph, 6)])


def _silu(graph: _Graph, x: str) -> str:
    return graph.add("Mul", [x, graph.add("Sigmoid", [x])])


def _hard_sigmoid(graph: _Graph, x: str) -> str:
    return graph.add("Mul", [_relu6(graph, graph.add("Add", [x, _number(graph, 3)])), _number(graph, 1 / 6)])


def _hard_silu(graph: _Graph, x: str) -> str:
    return graph.add("Mul", [x, _hard_sigmoid(graph, x)])


def _gelu(graph: _Graph, x: str) -> str:
    erf = graph.add("Erf", [graph.add("Mul", [x, _number(graph, 0.5**0.5)])])
    half = graph.add("Mul", [x, _number(graph, 0.5)])
    return graph.add("Mul", [half, graph.add("Add", [erf, _number(graph, 1)])])


_ACTIVATIONS: dict[str, Callable[[_Graph, str], str]] = {
    "gelu": _gelu,
    "hard_sigmoid": _hard_sigmoid,
    "hard_silu": _hard_silu,
    "linear": lambda _, x: x,
    "relu": lambda graph, x: graph.add("Relu", [x]),
    "relu6": _relu6,
    "sigmoid": lambda graph, x: graph.add("Sigmoid", [x]),
    "silu": _silu,
    "tanh": lambda graph, x: graph.add("Tanh", [x]),
}


def _write_relu(graph: _Graph, layer: Any, names: list[str], _: Any, __: Any) -> str:
    if layer.negative_slope or layer.threshold:
        raise GraphError(f"layer {layer.name!r} is a ReLU with a slope or a threshold")
    if layer.max_value is None:
        return graph.add("Relu", names)
    limits = [graph.constant(np.float64(value)) for value in (0, layer.max_value)]
    return graph.add("Clip", [names[0], *limits])


def _write_padding(graph: _Graph, layer: Any, names: list[str], _: Any, __: Any) -> str:
    (top, bottom), (left, right) = layer.padding
    return graph.add("Pad", [names[0], graph.constant(np.array([0, 0, top, left, 0, 0, bottom, right]))])


def _write_cropping(graph: _Graph, layer: Any, names: list[str], taken: list[Any], _: Any) -> str:
    (top, bottom), (left, right) = layer.cropping
    height, width = taken[0].shape[1:3]
    ends = [np.array([top, left]), np.array([height - bottom, width - right]), np.array([2, 3])]
    return graph.add("Slice", [names[0], *map(graph.constant, ends)])


def _write_pooling(graph: _Graph, layer: Any, names: list[str], taken: list[Any], _: Any) -> str:
    window = _window(layer, layer.pool_size, taken[0])
    kind = "MaxPool" if _kind(layer) == "MaxPooling2D" else "AveragePool"
    return graph.add(kind, names, **window)


def _write_global_pooling(graph: _Graph, layer: Any, names: list[str], _: Any, __: Any) -> str:
    axes = graph.constant(np.array([2, 3]))
    return graph.add("ReduceMean", [names[0], axes], keepdims=int(layer.keepdims))


def _write_reshape(graph: _Graph, layer: Any, names: list[str], taken: list[Any], _: Any) -> str:
    shape = layer.target_shape
    if len(taken[0].shape) != 2 or len(shape) != 3 or tuple(shape[:2]) != (1, 1):
        raise GraphError(
            f"layer {layer.name!r} reshapes to {tuple(shape)}: only (1, 1, channels) can be written"
        )
    return graph.add("Reshape", [names[0], graph.constant(np.array([-1, shape[2], 1, 1]))])


def _write_rescaling(graph: _Graph, layer: Any, names: list[str], taken: list[Any], _: Any) -> str:
    ones = np.ones(taken[0].shape[-1])
    scaled = graph.add("Mul", [names[0], _by_channel(graph, np.asarray(layer.scale, np.float64) * ones)])
    return graph.add("Add", [scaled, _by_channel(graph, np.asarray(layer.offset, np.float64) * ones)])


def _write_normalisation(graph: _Graph, layer: Any, names: list[str], _: Any, __: Any) -> str:
    spread = np.sqrt(np.maximum(np.asarray(layer.variance, np.float64), 1e-14))
    centred = graph.add("Sub", [names[0], _by_channel(graph, layer.mean)])
    return graph.add("Div", [centred, _by_channel(graph, spread)])


def _write_layer_scale(graph: _Graph, layer: Any, names: list[str], _: Any, __: Any) -> str:
    return graph.add("Mul", [names[0], _by_channel(graph, layer.gamma)])


def _write_nested(graph: _Graph, layer: Any, names: list[str], _: Any, __: Any) -> str:
    inner = layer._functional if _kind(layer) == "Sequential" else layer
    ((name, _rank),) = _write_network(graph, inner, names[0]).values()
    return name


def _write_custom_scale(graph: _Graph, layer: Any, names: list[str], _: Any, __: Any) -> str:
    """``first + scale * second``, of InceptionResNetV2."""
    return graph.add("Add", [names[0], graph.add("Mul", [names[1], graph.constant(np.float64(layer.scale))])])


def _folded_sum(operation: str) -> _Writer:
    """Add or Mul of two or more inputs, from left to right."""

    def write(graph: _Graph, _: Any, names: list[str], __: Any, ___: Any) -> str:
        x = names[0]
        for name in names[1:]:
            x = graph.add(operation, [x, name])
        return x

    return write


_WRITERS: dict[str, _Writer] = {
    "Activation": lambda graph, layer, names, _, __: _activated(graph, layer, names[0]),
    "Add": _folded_sum("Add"),
    "AveragePooling2D": _write_pooling,
    "BatchNormalization": _write_batch_normalisation,
    "Concatenate": lambda graph, _, names, __, ___: graph.add("Concat", names, axis=1),
    "Conv2D": _write_convolution,
    "Cropping2D": _write_cropping,
    "CustomScaleLayer": _write_custom_scale,
    "Dense": _write_dense,
    "DepthwiseConv2D": _write_convolution,
    "Dropout": lambda _, __, names, ___, ____: names[0],
    "Functional": _write_nested,
    "GlobalAveragePooling2D": _write_global_pooling,
    "LayerNormalization": _write_layer_normalisation,
    "LayerScale": _write_layer_scale,
    "MaxPooling2D": _write_pooling,
    "Multiply": _folded_sum("Mul"),
    "Normalization": _write_normalisation,
    "ReLU": _write_relu,
    "Rescaling": _write_rescaling,
    "Reshape": _write_reshape,
    "SeparableConv2D": _write_separable,
    "Sequential": _write_nested,
    "StochasticDepth": lambda _, __, names, ___, ____: names[0],
    "ZeroPadding2D": _write_padding,
}
