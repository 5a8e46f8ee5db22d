"""Backbones as ONNX graphs: data, a list of operations of the ONNX standard and their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from aplsmear.errors import UserError, brief

PIXELS = "pixels"  # name of the input: uint8 (images, side, side, 3), RGB
# Each gives the same bits on every x86-64 processor with AVX2 and FMA. Softmax, for one, does not: see
# `aplsmear.features.portable`.
OPERATIONS = frozenset(
    {
        "Add",
        "AveragePool",
        "Cast",
        "Clip",
        "Concat",
        "Conv",
        "Div",
        "Erf",
        "Exp",
        "Flatten",
        "Gather",
        "GlobalAveragePool",
        "HardSigmoid",
        "LayerNormalization",
        "MatMul",
        "MaxPool",
        "Mul",
        "Pad",
        "ReduceMax",
        "Relu",
        "Reshape",
        "Sigmoid",
        "Slice",
        "Sub",
        "Tanh",
        "Transpose",
    }
)
BLOCK = 16  # channels; ONNX Runtime stores maps in blocks of as many with AVX-512, of half as many with AVX2
_LARGEST = 2**28  # numbers in one tensor of a graph, for one image


class GraphError(UserError, ValueError):
    """A network cannot be written as a graph, or a graph must not be run; the message says why."""


def only(model: onnx.ModelProto, layers: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph that some layers need; the rest is not computed.

    Args:
        model: of `aplsmear.features.export.as_graph`.
        layers: wanted outputs.

    Raises:
        GraphError: the graph has no such output.
    """
    outputs = {output.name: output for output in model.graph.output}
    if unknown := [layer for layer in layers if layer not in outputs]:
        raise GraphError(f"the graph gives no {', '.join(unknown)}; it gives {', '.join(outputs)}")
    wanted, nodes = {PIXELS, *layers}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted.update(node.input)
            nodes.append(node)
    graph = helper.make_graph(
        nodes[::-1],
        model.graph.name,
        [each for each in model.graph.input if each.name in wanted],
        [outputs[layer] for layer in layers],
        [each for each in model.graph.initializer if each.name in wanted],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def read_graph(content: bytes) -> onnx.ModelProto:
    """Read a graph that may come from a stranger; nothing of it is run.

    Raises:
        GraphError: it is no graph, or does more than a graph of `aplsmear.features.export`: another
            operation, a function, a convolution whose bits depend on the processor, weights in another file,
            or a tensor that is too large for memory.
    """
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise classes of their own
        raise GraphError(
            f"this is no ONNX graph ({brief(error)}): copy the file again from its source"
        ) from None
    unknown = sorted({node.op_type for node in model.graph.node} - OPERATIONS)
    if unknown or any(node.domain for node in model.graph.node) or model.functions:
        raise GraphError(
            f"the graph has operations that no backbone has: {', '.join(unknown) or 'functions'}"
        )
    _check_convolutions(model.graph)
    weights = [*model.graph.initializer, *(each.values for each in model.graph.sparse_initializer)]
    if any(each.data_location == TensorProto.EXTERNAL for each in weights):
        raise GraphError("the graph takes weights from another file: put them into the graph")
    _check_sizes(model)
    return model


def _check_convolutions(graph: onnx.GraphProto) -> None:
    """Refuse a convolution whose order of sums depends on the processor (see `aplsmear.features.export`)."""
    shapes, opened = {each.name: each.dims for each in graph.initializer}, {each.name for each in graph.input}
    for node in graph.node:
        if node.op_type == "Conv":
            filters, channels, *window = shapes.get(node.input[1], [1, 1])
            in_blocks = channels >= BLOCK and max(window) > 1 and node.input[1] not in opened
            if filters % BLOCK or in_blocks:
                raise GraphError(
                    f"the convolution {node.output[0]!r} of the graph gives other bits with AVX-512 than "
                    "without: write the graph again with this version (`dvc repro`)"
                )


def _check_sizes(model: onnx.ModelProto) -> None:
    """Compute the size of each tensor for one image; a small file can declare tensors of terabytes."""
    one = onnx.ModelProto()
    one.CopyFrom(model)
    del one.graph.value_info[:]  # what the file says of sizes does not count
    if [each.name for each in one.graph.input][:1] != [PIXELS]:
        raise GraphError(f"the first input of the graph is not {PIXELS!r}")
    one.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    try:
        known = onnx.shape_inference.infer_shapes(one, strict_mode=True, data_prop=True).graph
    except Exception as error:  # as above
        raise GraphError(f"the sizes of the graph do not fit ({brief(error)})") from None
    for each in [*known.input, *known.value_info]:
        sides = [side.dim_value for side in each.type.tensor_type.shape.dim]
        if (sides and min(sides) < 1) or math.prod(sides) > _LARGEST:
            raise GraphError(
                f"the size of {each.name!r} in the graph is unknown, or above {_LARGEST:,} numbers"
            )
