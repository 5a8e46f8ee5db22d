"""Writes a Keras network as an ONNX graph with the same results on every x86-64 processor with AVX2 and FMA.

TensorFlow sums in an order that depends on the processor. ONNX Runtime does so, too, unless the graph
prevents it: it stores channels in blocks of 8 (AVX2) or 16 (AVX-512), and the order of its sums depends on
them. So a network is built by Keras once and written here by three rules:

- All channel counts are filled up to multiples of 16, so each processor stores the same maps in blocks.
- A pointwise or depthwise convolution has the same order with both blocks. Any other convolution of many
  channels has not: its weights are written as inputs with a default value, so ONNX Runtime computes it
  without blocks.
- Batch normalisation is folded into the convolution before it, by NumPy in float64: the estimates of 1/sqrt
  that processors make differ between manufacturers.

Vision transformers are written with the operations that `aplsmear.features.onnx_graph` names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aplsmear.features.onnx_graph import BLOCK, PIXELS, GraphError

OPSET, IR_VERSION = 18, 10  # fixed, so a later release of onnx writes the same bytes
_NONE = (0, 0, 0, 0)
_LARGEST = 2**31 - 2**20  # bytes of weights; a graph is one protobuf message

Ints = Sequence[int]
Preprocess = Callable[[Any], Any]


def as_graph(network: Any, preprocess: Preprocess, size: int) -> onnx.ModelProto:
    """Write a Keras network as a graph: `PIXELS` -> the means of its maps, float32 (images, channels) each.

    Args:
        network: of `aplsmear.features.backbones.cut_network`.
        preprocess: as there: a factor and an offset for each channel, perhaps in another order.
        size: side of an image in px.

    Raises GraphError: a layer or the preprocessing cannot be written.
    """
    graph = GraphWriter()
    maps = {id(network.inputs[0]): graph.image(preprocess)}
    _walk(graph, network, maps)
    for layer, tensor in network.output.items():
        if len(tensor.shape) != 4:
            raise GraphError(
                f"layer {layer!r} gives no map of height, width and channels: cut at another layer"
            )
        graph.feature(layer, maps[id(tensor)])
    return graph.model(size, list(network.output))


@dataclass(frozen=True)
class FeatureMap:
    """A feature map in the graph: (images, width, rows, columns), or tokens: (images, tokens, width)."""

    name: str  # of its tensor
    places: np.ndarray  # position of each channel of Keras among the stored ones; other positions are unused
    width: int  # number of stored channels
    pads: tuple[int, int, int, int] = _NONE  # zeros around it, not stored: top, left, bottom, right


@dataclass(frozen=True)
class _Call:
    """One use of a Keras layer."""

    layer: Any
    inputs: list[FeatureMap]
    numbers: list[float]  # constants among its arguments
    sides: tuple[int, int]  # rows and columns of its first map
    norm: Any = None  # the batch normalisation that is folded into it


# --- the graph ------------------------------------------------------------------------------------------


class GraphWriter:
    """An ONNX graph under construction."""

    def __init__(self) -> None:
        """A graph without operations."""
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._open: list[str] = []  # weights that are inputs as well

    def model(self, size: int, outputs: Sequence[str]) -> onnx.ModelProto:
        """The graph from `PIXELS`, images of this size in px, to outputs; a GraphError from 2 GiB on."""
        if (size_of := sum(len(each.raw_data) for each in self._weights)) > _LARGEST:
            raise GraphError(
                f"the weights of the network are {size_of / 2**30:.1f} GiB; a graph holds less than 2 GiB: "
                "cut at an earlier layer, or take a smaller network"
            )
        info, shapes = helper.make_tensor_value_info, {each.name: list(each.dims) for each in self._weights}
        graph = helper.make_graph(
            self._nodes,
            "backbone",
            [
                info(PIXELS, TensorProto.UINT8, ["images", size, size, 3]),
                *(info(name, TensorProto.FLOAT, shapes[name]) for name in self._open),
            ],
            [info(name, TensorProto.FLOAT, ["images", None]) for name in outputs],
            self._weights,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="aplsmear",
        )
        onnx.checker.check_model(model)
        return model

    def constant(self, values: Any, dtype: Any = np.float32, name: str = "") -> str:
        """Write a constant, and return its name. A number becomes an array of one number."""
        name = name or f"w{len(self._weights)}"
        array = np.asarray(values, dtype, "C") if isinstance(values, np.ndarray) else np.atleast_1d(values)
        self._weights.append(numpy_helper.from_array(array.astype(dtype), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Write an operation, and return the name of its output."""
        output = output or f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def product(self, x: str, kernel: np.ndarray, bias: np.ndarray) -> str:
        """A product of tokens with a matrix (channels, units), and a bias."""
        return self.node("Add", [self.node("MatMul", [x, self.constant(kernel)]), self.constant(bias)])

    def normalised(self, x: str, layer: Any) -> str:
        """A layer normalisation over the last axis."""
        weights = [self.constant(layer.gamma), self.constant(layer.beta)]
        return self.node("LayerNormalization", [x, *weights], epsilon=layer.epsilon, axis=-1)

    def reshaped(self, x: str, *shape: int) -> str:
        """Other sides; 0 keeps one, -1 is what is left."""
        return self.node("Reshape", [x, self.constant(shape, np.int64)])

    def image(self, preprocess: Preprocess) -> FeatureMap:
        """The preprocessed input."""
        factor, offset = _affine(preprocess)
        order = np.abs(factor).argmax(axis=1)  # the channel of the image for each channel of the network
        name = self.node("Cast", [PIXELS], to=TensorProto.FLOAT)
        name = self.node("Transpose", [name], perm=[0, 3, 1, 2])
        if order.tolist() != [0, 1, 2]:
            name = self.node("Gather", [name, self.constant(order, np.int64)], axis=1)
        return self.scaled(FeatureMap(name, np.arange(3), 3), factor[np.arange(3), order], offset)

    def scaled(self, x: FeatureMap, factor: np.ndarray, offset: np.ndarray) -> FeatureMap:
        """A factor and an offset for each channel."""
        x = self.stored(x)
        if x.width % BLOCK == 0:  # as a convolution, into which ONNX Runtime fuses an activation function
            return self.convolved(x, factor[:, None, None, None], offset, depthwise=True)
        name, shape = x.name, (1, -1, 1, 1)
        if (factor != 1).any():
            name = self.node("Mul", [name, self.constant(factor.reshape(shape))])
        if (offset != 0).any():
            name = self.node("Add", [name, self.constant(offset.reshape(shape))])
        return replace(x, name=name)

    def stored(self, x: FeatureMap) -> FeatureMap:
        """The map with its surrounding zeros."""
        if x.pads == _NONE:
            return x
        top, left, bottom, right = x.pads
        pads = self.constant([0, 0, top, left, 0, 0, bottom, right], np.int64)
        return replace(x, name=self.node("Pad", [x.name, pads]), pads=_NONE)

    def convolved(
        self,
        x: FeatureMap,
        kernel: np.ndarray,
        bias: np.ndarray,
        *,
        depthwise: bool = False,
        pads: tuple[int, int, int, int] = _NONE,
        **attributes: Any,
    ) -> FeatureMap:
        """Write a convolution with a kernel (filters, channels of a filter, rows, columns).

        If it is `depthwise`, each filter has one channel, that of its own number. `pads` are of zeros: top,
        left, bottom, right; other attributes: strides and dilations.
        """
        count, _, *window = kernel.shape
        width = x.width if depthwise else -(-count // BLOCK) * BLOCK
        places = x.places if depthwise else np.arange(count)
        weights = np.zeros((width, 1 if depthwise else x.width, *window))
        weights[places[:, None], [[0]] if depthwise else x.places] = kernel
        biases = np.zeros(width)
        biases[places] = bias
        name = self.constant(weights)
        # Also a map of the network of a file can have any number of channels; an image has three.
        if not depthwise and x.width > 3 and (window != [1, 1] or x.width % BLOCK):
            self._open.append(name)
        name = self.node(
            "Conv",
            [x.name, name, self.constant(biases)],
            group=width if depthwise else 1,
            kernel_shape=window,
            pads=[sum(each) for each in zip(x.pads, pads, strict=True)],
            **attributes,
        )
        return FeatureMap(name, places, width)

    def grouped(self, name: str, kernel: np.ndarray, bias: np.ndarray, group: int, **attributes: Any) -> str:
        """Write a convolution of groups of channels, without blocks; arguments as of `convolved`."""
        weights = self.constant(kernel)
        self._open.append(weights)
        names = [name, weights, self.constant(bias)]
        return self.node("Conv", names, group=group, kernel_shape=kernel.shape[2:], **attributes)

    def softmax(self, x: str, length: int) -> str:
        """Write a softmax over the last axis, of this length: the operation Softmax has no fixed bits."""
        output = f"t{len(self._nodes)}"
        axis = self.constant([-1], np.int64, f"{output}_axis")
        ones = self.constant(np.ones((length, 1)), name=f"{output}_ones")
        largest = self.node("ReduceMax", [x, axis], f"{output}_max", keepdims=1)
        raised = self.node("Exp", [self.node("Sub", [x, largest], f"{output}_shifted")], f"{output}_exp")
        return self.node("Div", [raised, self.node("MatMul", [raised, ones], f"{output}_sum")], output)

    def applied(
        self, kind: str, *inputs: FeatureMap, constants: Sequence[float] = (), **attributes: Any
    ) -> FeatureMap:
        """Write an operation that keeps the channels."""
        first, *others = map(self.stored, inputs)
        names = [first.name, *(self._like(each, first) for each in others), *map(self.constant, constants)]
        return replace(first, name=self.node(kind, names, **attributes))

    def _like(self, x: FeatureMap, other: FeatureMap) -> str:
        """The map with its channels in the places of another map."""
        if x.width == other.width and np.array_equal(x.places, other.places):
            return x.name
        order = np.zeros(other.width)
        order[other.places] = x.places
        return self.node("Gather", [x.name, self.constant(order, np.int64)], axis=1)

    def joined(self, maps: Sequence[FeatureMap]) -> FeatureMap:
        """The channels of maps one after another."""
        maps = [self.stored(each) for each in maps]
        starts = np.cumsum([0, *(each.width for each in maps)])
        places = [each.places + start for each, start in zip(maps, starts[:-1], strict=True)]
        name = self.node("Concat", [each.name for each in maps], axis=1)
        return FeatureMap(name, np.concatenate(places), int(starts[-1]))

    def feature(self, name: str, x: FeatureMap) -> None:
        """Write an output: the mean over a map, in the order of Keras's channels."""
        mean = self.node("GlobalAveragePool", [self.stored(x).name])
        if x.width == len(x.places):
            self.node("Flatten", [mean], name)
        else:
            flat = self.node("Flatten", [mean])
            self.node("Gather", [flat, self.constant(x.places, np.int64)], name, axis=1)


def window_of(sides: Ints, size: Ints, strides: Ints, dilations: Ints, pads: str | Ints) -> dict[str, Any]:
    """Strides, dilations and pads of a window of this size on a map with these sides, as ONNX names them.

    `pads`: top, left, bottom, right, or ``SAME_UPPER`` (an odd zero comes last) or ``SAME_LOWER`` (first).
    """
    if isinstance(pads, str):
        totals = [
            max((-(-side // stride) - 1) * stride + (span - 1) * dilation + 1 - side, 0)
            for side, stride, span, dilation in zip(sides, strides, size, dilations, strict=True)
        ]
        less, more = [each // 2 for each in totals], [each - each // 2 for each in totals]
        pads = [*less, *more] if pads == "SAME_UPPER" else [*more, *less]
    found = {"strides": list(strides), "pads": tuple(pads)}
    return found if list(dilations) == [1, 1] else found | {"dilations": list(dilations)}


def _affine(preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """Preprocessing as a float64 matrix (3, 3) with one factor in each row, and an offset (3,)."""

    def of(colours: np.ndarray) -> np.ndarray:
        return np.asarray(preprocess(colours.copy().reshape(1, 1, -1, 3)), np.float64).reshape(-1, 3)

    offset = of(np.zeros((1, 3)))[0]
    factor = (of(255 * np.eye(3)) - offset).T / 255
    probe = np.random.Generator(np.random.Philox(1)).uniform(0, 255, (100, 3))
    one_each = ((factor != 0).sum(axis=1) == 1).all()
    if not one_each or not np.allclose(of(probe), probe @ factor.T + offset):
        raise GraphError("its preprocessing is not a factor and an offset for each channel")
    return factor, offset


# --- from Keras -----------------------------------------------------------------------------------------


def _walk(graph: GraphWriter, network: Any, maps: dict[int, FeatureMap]) -> None:
    """Write the layers of a model. `maps`, by `id` of a Keras tensor, has its inputs and gets its layers."""
    network = getattr(network, "_functional", network)
    nodes = [node for _, each in sorted(network._nodes_by_depth.items(), reverse=True) for node in each]
    uses = Counter(id(tensor) for node in nodes for tensor in node.arguments.keras_tensors)
    uses.update(map(id, network.outputs))
    after = {id(tensor): node for node in nodes for tensor in node.arguments.keras_tensors}
    folded = set()
    for node in nodes:
        kind, output = _kind(node.operation), node.outputs[0]
        if kind == "InputLayer" or id(node) in folded:
            continue
        call = _call(node, maps)
        if kind in ("Functional", "Sequential"):
            inner = getattr(node.operation, "_functional", node.operation)
            maps[id(inner.inputs[0])] = call.inputs[0]
            _walk(graph, inner, maps)
            maps[id(output)] = maps[id(inner.outputs[0])]
            continue
        if kind not in _WRITERS:
            raise _unsupported(call.layer, f"is a {kind}")
        only = after.get(id(output)) if uses[id(output)] == 1 else None
        if kind in _FOLDING and only is not None and _kind(only.operation) == "BatchNormalization":
            folded.add(id(only))
            call, output = replace(call, norm=only.operation), only.outputs[0]
        maps[id(output)] = _WRITERS[kind](graph, call)


def _kind(operation: Any) -> str:
    return type(operation).__name__


def _call(node: Any, maps: Mapping[int, FeatureMap]) -> _Call:
    tensors = node.arguments.keras_tensors
    numbers = [each for each in node.arguments.args if isinstance(each, (int, float))]
    shape = [*tensors[0].shape, None, None]
    return _Call(node.operation, [maps[id(each)] for each in tensors], numbers, (shape[1], shape[2]))


def _unsupported(layer: Any, what: str) -> GraphError:
    return GraphError(
        f"layer {layer.name!r} {what}, which cannot be written as a graph: cut at an earlier layer, or "
        "take another application"
    )


def _float64(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64)


def _normalisation(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of each channel of a batch normalisation."""
    factor = 1 / np.sqrt(_float64(layer.moving_variance) + layer.epsilon)
    if layer.scale:
        factor = factor * _float64(layer.gamma)
    offset = -_float64(layer.moving_mean) * factor
    return factor, offset + _float64(layer.beta) if layer.center else offset


def _window(call: _Call, size: Sequence[int]) -> dict[str, Any]:
    """Strides, dilations and pads of a layer with a window, as ONNX names them."""
    layer = call.layer
    pads = "SAME_UPPER" if layer.padding == "same" else _NONE
    return window_of(call.sides, size, layer.strides, getattr(layer, "dilation_rate", (1, 1)), pads)


def _convolution(graph: GraphWriter, call: _Call) -> FeatureMap:
    """Conv2D and DepthwiseConv2D, with the batch normalisation after them."""
    layer = call.layer
    kernel, depthwise = _float64(layer.kernel), _kind(layer) == "DepthwiseConv2D" or layer.groups > 1
    if _kind(layer) == "DepthwiseConv2D":
        kernel = kernel.swapaxes(2, 3)
    if depthwise and (kernel.shape[2] != 1 or kernel.shape[3] != len(call.inputs[0].places)):
        raise _unsupported(layer, "has groups of several channels")
    window = _window(call, layer.kernel_size)
    return _product(graph, call, call.inputs[0], kernel.transpose(3, 2, 0, 1), depthwise=depthwise, **window)


def _separable_convolution(graph: GraphWriter, call: _Call) -> FeatureMap:
    layer, first = call.layer, _float64(call.layer.depthwise_kernel).transpose(2, 3, 0, 1)
    if first.shape[1] != 1:
        raise _unsupported(layer, "has several filters for each channel")
    window = _window(call, layer.kernel_size)
    x = graph.convolved(call.inputs[0], first, np.zeros(len(first)), depthwise=True, **window)
    return _product(graph, call, x, _float64(layer.pointwise_kernel).transpose(3, 2, 0, 1))


def _dense(graph: GraphWriter, call: _Call) -> FeatureMap:
    kernel = _float64(call.layer.kernel).T[:, :, None, None]
    return _product(graph, call, graph.stored(call.inputs[0]), kernel)


def _product(
    graph: GraphWriter, call: _Call, x: FeatureMap, kernel: np.ndarray, **attributes: Any
) -> FeatureMap:
    """A convolution with the bias, the batch normalisation and the activation function of a layer."""
    bias = _float64(call.layer.bias) if call.layer.use_bias else np.zeros(len(kernel))
    if call.norm is not None:
        factor, offset = _normalisation(call.norm)
        kernel, bias = kernel * factor[:, None, None, None], bias * factor + offset
    return _activated(graph, call.layer, graph.convolved(x, kernel, bias, **attributes))


def _activated(graph: GraphWriter, layer: Any, x: FeatureMap) -> FeatureMap:
    """The map after the activation function of a layer."""
    name = getattr(layer.activation, "__name__", str(layer.activation))
    if name not in _ACTIVATIONS:
        raise _unsupported(layer, f"has the activation {name}")
    return _ACTIVATIONS[name](graph, x)


def _gelu(graph: GraphWriter, x: FeatureMap) -> FeatureMap:
    """x (erf(x / sqrt(2)) / 2 + 1/2), a form that ONNX Runtime does not replace by a kernel of its own."""
    erf = graph.applied("Erf", graph.applied("Mul", x, constants=[2**-0.5]))
    half = graph.applied("Add", graph.applied("Mul", erf, constants=[0.5]), constants=[0.5])
    return graph.applied("Mul", x, half)


def _hard_sigmoid(graph: GraphWriter, x: FeatureMap) -> FeatureMap:
    return graph.applied("HardSigmoid", x, alpha=1 / 6, beta=0.5)


_ACTIVATIONS: dict[str, Callable[[GraphWriter, FeatureMap], FeatureMap]] = {
    "linear": lambda _, x: x,
    "relu": lambda graph, x: graph.applied("Relu", x),
    "relu6": lambda graph, x: graph.applied("Clip", x, constants=[0, 6]),
    "sigmoid": lambda graph, x: graph.applied("Sigmoid", x),
    "tanh": lambda graph, x: graph.applied("Tanh", x),
    "silu": lambda graph, x: graph.applied("Mul", x, graph.applied("Sigmoid", x)),
    "hard_sigmoid": _hard_sigmoid,
    "hard_silu": lambda graph, x: graph.applied("Mul", x, _hard_sigmoid(graph, x)),
    "gelu": _gelu,
}


def _relu(graph: GraphWriter, call: _Call) -> FeatureMap:
    if call.layer.negative_slope or call.layer.threshold:
        raise _unsupported(call.layer, "is a ReLU with a slope or a threshold")
    limit = call.layer.max_value
    if limit is None:
        return graph.applied("Relu", call.inputs[0])
    return graph.applied("Clip", call.inputs[0], constants=[0, limit])


def _pooling(graph: GraphWriter, call: _Call) -> FeatureMap:
    kind, size = _kind(call.layer).removesuffix("ing2D"), list(call.layer.pool_size)  # MaxPool, AveragePool
    return graph.applied(kind, call.inputs[0], kernel_shape=size, **_window(call, size))


def _binary(kind: str) -> Callable[[GraphWriter, _Call], FeatureMap]:
    """Addition or multiplication of maps, or of a map and numbers."""

    def write(graph: GraphWriter, call: _Call) -> FeatureMap:
        found, *others = call.inputs
        for other in others:
            found = graph.applied(kind, found, other)
        for number in call.numbers:
            found = graph.applied(kind, found, constants=[number])
        if len(others) + len(call.numbers) == 0:
            raise _unsupported(call.layer, "has one argument")
        return found

    return write


def _each_channel(of: Callable[[Any], tuple[Any, Any]]) -> Callable[[GraphWriter, _Call], FeatureMap]:
    """A layer with a factor and an offset for each channel."""

    def write(graph: GraphWriter, call: _Call) -> FeatureMap:
        count = len(call.inputs[0].places)
        factor, offset = (np.broadcast_to(_float64(each).ravel(), count) for each in of(call.layer))
        return graph.scaled(call.inputs[0], factor, offset)

    return write


def _standardisation(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    spread = np.sqrt(_float64(layer.variance))
    return 1 / spread, -_float64(layer.mean) / spread


def _layer_normalisation(graph: GraphWriter, call: _Call) -> FeatureMap:
    layer, x = call.layer, graph.stored(call.inputs[0])
    if _kind(layer.input) == "KerasTensor" and len(layer.input.shape) == 3:
        return replace(x, name=graph.normalised(x.name, layer))
    if list(layer.axis) not in ([-1], [3]) or x.width != len(x.places):
        raise _unsupported(layer, f"does not normalise over a multiple of {BLOCK} channels")
    name = graph.normalised(graph.node("Transpose", [x.name], perm=[0, 2, 3, 1]), layer)
    return replace(x, name=graph.node("Transpose", [name], perm=[0, 3, 1, 2]))


def _patch_tokens(graph: GraphWriter, call: _Call) -> FeatureMap:
    """A map as tokens with positions, behind the class token and the registers."""
    layer, x = call.layer, graph.stored(call.inputs[0])
    prefix = [_float64(layer.first), *([_float64(layer.extra)] if layer.registers else [])]
    added = np.concatenate([*prefix, np.zeros((1, layer.side**2, x.width))], axis=1)
    if layer.grid:
        positions = _float64(layer.resizing()) @ _float64(layer.positions)[0]
        added[0, 0] += positions[0]
        added[0, -(layer.side**2) :] += positions[1:]
    tokens = graph.node("Transpose", [graph.reshaped(x.name, 0, x.width, -1)], perm=[0, 2, 1])
    pads = graph.constant([0, 1 + layer.registers, 0, 0, 0, 0], np.int64)
    tokens = graph.node("Add", [graph.node("Pad", [tokens, pads]), graph.constant(added)])
    return replace(x, name=tokens)


def _transformer_block(graph: GraphWriter, call: _Call) -> FeatureMap:
    """A block of `aplsmear.features.dino`. Its factors are folded into the products before them."""
    layer, x = call.layer, call.inputs[0]
    for norm, branch, last, scale in (
        (layer.norm_1, _attention, layer.project, layer.scale_1),
        (layer.norm_2, _perceptron, layer.narrow, layer.scale_2),
    ):
        found = branch(graph, call, graph.normalised(x.name, norm))
        kernel, bias = (_float64(each) * _float64(scale) for each in (last.kernel, last.bias))
        x = replace(x, name=graph.node("Add", [x.name, graph.product(found, kernel, bias)]))
    return x


def _attention(graph: GraphWriter, call: _Call, x: str) -> str:
    """Attention up to its last product."""
    layer, count, width = call.layer, call.sides[0], call.inputs[0].width
    channels = width // layer.heads
    kernels = np.split(_float64(layer.qkv.kernel), 3, axis=1)
    biases = np.split(_float64(layer.qkv.bias), 3)
    parts = []
    for kernel, bias, factor in zip(kernels, biases, (channels**-0.5, 1, 1), strict=True):
        tokens = graph.product(x, kernel * factor, bias * factor)
        tokens = graph.reshaped(tokens, 0, count, layer.heads, channels)
        parts.append(graph.node("Transpose", [tokens], perm=[0, 2, 1, 3]))
    query, key, value = parts
    if layer.rotary_side:
        query, key = (_rotated(graph, layer, each, count, channels) for each in (query, key))
    scores = graph.node("MatMul", [query, graph.node("Transpose", [key], perm=[0, 1, 3, 2])])
    found = graph.node("MatMul", [graph.softmax(scores, count), value])
    return graph.reshaped(graph.node("Transpose", [found], perm=[0, 2, 1, 3]), 0, count, width)


def _rotated(graph: GraphWriter, layer: Any, x: str, count: int, channels: int) -> str:
    """Queries or keys after rotation by their positions."""
    cosine, sine = layer.rotation(count, channels)
    half = channels // 2
    signed = np.concatenate([-sine[:, :half], sine[:, half:]], axis=1)
    order = np.roll(np.arange(channels), -half)
    turned = graph.node("Gather", [x, graph.constant(order, np.int64)], axis=3)
    pairs = ((x, cosine), (turned, signed))
    return graph.node("Add", [graph.node("Mul", [name, graph.constant(factor)]) for name, factor in pairs])


def _perceptron(graph: GraphWriter, call: _Call, x: str) -> str:
    """The perceptron of a block up to its last product."""
    widen = call.layer.widen
    kernel, bias = _float64(widen.kernel), _float64(widen.bias)
    if not call.layer.gated:
        return _gelu(graph, replace(call.inputs[0], name=graph.product(x, kernel, bias))).name
    halves = zip(np.split(kernel, 2, axis=1), np.split(bias, 2), strict=True)
    gate, units = (graph.product(x, *half) for half in halves)
    gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])
    return graph.node("Mul", [gate, units])


def _part_of_tokens(graph: GraphWriter, call: _Call) -> FeatureMap:
    layer, x = call.layer, call.inputs[0]
    bounds = ([layer.start], [layer.start + layer.side**2], [1])
    found = graph.node("Slice", [x.name, *(graph.constant(each, np.int64) for each in bounds)])
    return replace(x, name=graph.node("Transpose", [found], perm=[0, 2, 1]))


def _cropping(graph: GraphWriter, call: _Call) -> FeatureMap:
    (top, bottom), (left, right) = call.layer.cropping
    rows, columns = call.sides
    parts = ([top, left], [rows - bottom, columns - right], [2, 3])  # from, to, axes
    x = graph.stored(call.inputs[0])
    return replace(x, name=graph.node("Slice", [x.name, *(graph.constant(each, np.int64) for each in parts)]))


def _reshaping(_: GraphWriter, call: _Call) -> FeatureMap:
    """Means over a map as a map of one pixel, which they already are here."""
    if tuple(call.layer.target_shape) != (1, 1, len(call.inputs[0].places)):
        raise _unsupported(call.layer, f"is a Reshape to {call.layer.target_shape}")
    return call.inputs[0]


def _zero_padding(_: GraphWriter, call: _Call) -> FeatureMap:
    (top, bottom), (left, right) = call.layer.padding
    before = call.inputs[0].pads
    return replace(
        call.inputs[0], pads=(before[0] + top, before[1] + left, before[2] + bottom, before[3] + right)
    )


def _custom_scale(graph: GraphWriter, call: _Call) -> FeatureMap:
    """The CustomScaleLayer of InceptionResNetV2: the first map plus a multiple of the second."""
    first, second = call.inputs
    return graph.applied("Add", first, graph.applied("Mul", second, constants=[call.layer.scale]))


_FOLDING = {"Conv2D", "DepthwiseConv2D", "SeparableConv2D"}
_WRITERS: dict[str, Callable[[GraphWriter, _Call], FeatureMap]] = {
    "Activation": lambda graph, call: _activated(graph, call.layer, call.inputs[0]),
    "Add": _binary("Add"),
    "AveragePooling2D": _pooling,
    "BatchNormalization": _each_channel(_normalisation),
    "Block": _transformer_block,
    "Concatenate": lambda graph, call: graph.joined(call.inputs),
    "Conv2D": _convolution,
    "Cropping2D": _cropping,
    "CustomScaleLayer": _custom_scale,
    "Dense": _dense,
    "DepthwiseConv2D": _convolution,
    "Dropout": lambda _, call: call.inputs[0],
    "GlobalAveragePooling2D": lambda graph, call: graph.applied("GlobalAveragePool", call.inputs[0]),
    "LayerNormalization": _layer_normalisation,
    "LayerScale": _each_channel(lambda layer: (layer.gamma, 0.0)),
    "MaxPooling2D": _pooling,
    "Multiply": _binary("Mul"),
    "Normalization": _each_channel(_standardisation),
    "Part": _part_of_tokens,
    "ReLU": _relu,
    "Rescaling": _each_channel(lambda layer: (layer.scale, layer.offset)),
    "Reshape": _reshaping,
    "SeparableConv2D": _separable_convolution,
    "StochasticDepth": lambda _, call: call.inputs[0],
    "Tokens": _patch_tokens,
    "ZeroPadding2D": _zero_padding,
}
