"""Backbones as ONNX graphs: data, a list of operations of the ONNX standard and their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from aplsmear.errors import UserError, brief

PIXELS = "pixels"  # name of the input: uint8 (images, side, side, 3), RGB
# Each gives the same bits on every x86-64 processor with AVX2 and FMA. Softmax does not: with AVX-512 it has
# others. ReduceSum over the last axis and ReduceMean over tokens have other bits for another batch, so
# `GraphWriter.softmax` sums by a product with ones, and tokens are pooled by GlobalAveragePool. Measured with
# ONNX Runtime 1.32: an AMD EPYC with AVX-512, 1 and 2 threads, against an emulated Haswell and EPYC-Milan
# without it; several images in one call against one by one; 17, 50 and 257 tokens.
_SAME_BITS = """
    Abs Add AveragePool Cast Celu Clip Concat Conv Cos DepthToSpace Div Einsum Elu Erf Exp Expand Flatten
    Gather Gelu Gemm GlobalAveragePool GlobalMaxPool GroupNormalization HardSigmoid HardSwish
    InstanceNormalization LayerNormalization LeakyRelu Log MatMul Max MaxPool Min Mish Mul Neg PRelu Pad Pow
    Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu Reshape Resize Selu
    Sigmoid Sin Slice Softplus Softsign Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where"""
OPERATIONS = frozenset(_SAME_BITS.split())
# What a graph of a stranger's network may have besides, if it is marked: its bits depend on the processor.
PLAIN = frozenset({"LogSoftmax", "Softmax"})
_MARK = "bits"  # key of this mark
BLOCK = 16  # channels; ONNX Runtime stores maps in blocks of as many with AVX-512, of half as many with AVX2
LARGEST = 2**28  # numbers in one tensor of a graph, for one image


class GraphError(UserError, ValueError):
    """A network cannot be written as a graph, or a graph must not be run; the message says why."""


def only(model: onnx.ModelProto, layers: Sequence[str]) -> onnx.ModelProto:
    """The part of a graph of `aplsmear.features.export` that these outputs need; the rest is not computed.

    Raises GraphError: the graph has no such output.
    """
    outputs = {output.name: output for output in model.graph.output}
    if unknown := [layer for layer in layers if layer not in outputs]:
        raise GraphError(f"the graph gives no {', '.join(unknown)}; it gives {', '.join(outputs)}")
    nodes = needed_for(layers, model.graph)
    read = {PIXELS, *layers, *(name for node in nodes for name in node.input)}
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        [each for each in model.graph.input if each.name in read],
        [outputs[layer] for layer in layers],
        [each for each in model.graph.initializer if each.name in read],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def needed_for(tensors: Sequence[str], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The operations of a graph that some of its tensors need, in their order."""
    wanted, nodes = set(tensors), []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def read_graph(content: bytes) -> onnx.ModelProto:
    """Read a graph that may come from a stranger; nothing of it is run.

    Raises GraphError: it is no graph, or does more than a graph of `aplsmear.features.export`: another
    operation, a function, a convolution whose bits depend on the processor, weights in another file, or a
    tensor that is too large for memory.
    """
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise classes of their own
        raise GraphError(
            f"this is no ONNX graph ({brief(error)}): copy the file again from its source"
        ) from None
    marked = any(each.key == _MARK for each in model.metadata_props)
    unknown = sorted({node.op_type for node in model.graph.node} - OPERATIONS - (PLAIN if marked else set()))
    if unknown or any(node.domain for node in model.graph.node) or model.functions:
        raise GraphError(
            f"the graph has operations that no backbone has: {', '.join(unknown) or 'functions'}"
        )
    depends = _convolutions_by_processor(model.graph)
    if depends and not marked:
        raise GraphError(
            f"the convolution {depends[0]!r} of the graph gives other bits with AVX-512 than "
            "without: write the graph again with this version (`dvc repro`)"
        )
    weights = [*model.graph.initializer, *(each.values for each in model.graph.sparse_initializer)]
    if any(each.data_location == TensorProto.EXTERNAL for each in weights):
        raise GraphError("the graph takes weights from another file: put them into the graph")
    _check_sizes(model)
    return model


def is_portable(model: onnx.ModelProto) -> bool:
    """Whether a graph gives the same bits on every x86-64 processor with AVX2 and FMA."""
    kinds = {node.op_type for node in model.graph.node}
    return kinds <= OPERATIONS and not _convolutions_by_processor(model.graph)


def mark_as_not_portable(model: onnx.ModelProto) -> None:
    """Allow a graph the operations of `PLAIN`, and convolutions whose bits depend on the processor."""
    model.metadata_props.add(key=_MARK, value="depend on the processor")


def _convolutions_by_processor(graph: onnx.GraphProto) -> list[str]:
    """Convolutions whose order of sums depends on the processor (see `aplsmear.features.export`)."""
    shapes, opened = {each.name: each.dims for each in graph.initializer}, {each.name for each in graph.input}
    found = []
    for node in graph.node:
        if node.op_type == "Conv":
            filters, channels, *window = shapes.get(node.input[1], [1, 1])
            in_blocks = channels >= BLOCK and max(window, default=1) > 1
            if node.input[1] not in opened and (filters % BLOCK or in_blocks):
                found.append(node.output[0])
    return found


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
        if (sides and min(sides) < 1) or math.prod(sides) > LARGEST:
            raise GraphError(
                f"the size of {each.name!r} in the graph is unknown, or above {LARGEST:,} numbers"
            )
