"""Reads a network of another program from an ONNX file, and writes it as a graph of the project.

The file is checked before any work. Then it is written again for images of one size: what depends on no
image becomes a constant, batch normalisation and fully connected layers become convolutions, softmax becomes
operations with the same bits on every processor, and the pooling is added.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from aplsmear.errors import brief
from aplsmear.features.export import IR_VERSION, OPSET, FeatureMap, GraphWriter, window_of
from aplsmear.features.onnx_graph import (
    LARGEST,
    OPERATIONS,
    PIXELS,
    PLAIN,
    GraphError,
    is_portable,
    mark_as_not_portable,
    needed_for,
)
from aplsmear.params import JOINT, Backbone, OnnxFile
from aplsmear.words import nearest

_OPSETS = range(11, 26)  # of the ONNX standard
_BYTES = 2**31 - 1  # of a file: protobuf reads no more
# Operations of files besides those of graphs; none of them remains.
_REWRITTEN = """
    And BatchNormalization Cast Ceil Constant ConstantOfShape Dropout Equal Flatten Floor Greater
    GreaterOrEqual Identity Less LessOrEqual Mod Not Or Range ReduceProd Round Shape Sign Size Split Squeeze
    Trilu Unsqueeze"""
_SMALL = 4096  # numbers of a constant that tells the size of another tensor


@np.errstate(over="ignore", invalid="ignore")  # `_check_same` refuses a file that gives such numbers
def graph_of_file(path: Path, settings: Backbone, size: int) -> onnx.ModelProto:
    """Read the ONNX file of a backbone and write it as a graph (`export.as_graph`) for images of `size` px.

    The batch of the graph is free if each image then has the same features as alone; otherwise it takes one
    image. It is marked if its bits depend on the processor (`onnx_graph.is_portable`).

    Raises GraphError: the file cannot be used; the message says why and what to change.
    """
    if settings.onnx is None:
        raise ValueError("the backbone has no table `onnx`")
    source = _read(path)
    version = _opset(source)
    if version < OPSET:
        try:
            source = onnx.version_converter.convert_version(source, OPSET)
        except Exception as error:  # C++ code raises classes of its own
            raise GraphError(
                f"the file has opset {version} and cannot be read as {OPSET} ({brief(error)}): "
                f"export it again with opset {OPSET}"
            ) from None
    wanted = _wanted(source, list(dict.fromkeys(p for layer in settings.layer for p in layer.split(JOINT))))
    importer = _Importer(source, settings.onnx, size)
    importer.walk(list(wanted.values()))
    for layer, tensor in wanted.items():
        importer.feature(layer, tensor)
    model = importer.graph.model(size, list(wanted))
    model.opset_import[0].version = max(version, OPSET)
    if not is_portable(model):
        mark_as_not_portable(model)
    expected = _features_of_source(source, settings.onnx, size, wanted)
    _check_same(model, expected, list(wanted))
    return model


# --- checks before work ---------------------------------------------------------------------------------


def _read(path: Path) -> onnx.ModelProto:
    """Read and check a file that may come from a stranger; nothing of it is run."""
    if path.stat().st_size > _BYTES:
        raise GraphError("the file is larger than 2 GiB, which ONNX does not allow: take a smaller network")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
        _check_names(model)
    except Exception as error:  # protobuf raises classes of its own
        raise GraphError(f"this is no ONNX file ({brief(error)}): copy it again from its source") from None
    problems = []
    if (version := _opset(model)) not in _OPSETS:
        most = f"from {_OPSETS[0]} to {_OPSETS[-1]}, best {OPSET}"
        problems.append(f"it has opset {version}: export it with an opset {most}")
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute)]
    if any(each.data_location == TensorProto.EXTERNAL for each in tensors):
        problems.append(
            "its weights lie in another file: put them into one file, with "
            "`python -c \"import onnx; onnx.save(onnx.load('OLD.onnx'), 'NEW.onnx')\"`"
        )
    if model.functions or model.graph.sparse_initializer or model.training_info:
        problems.append(
            "it has functions, sparse weights or training steps: write functions in line with "
            "`onnx.inliner.inline_local_functions`, or export it again as a plain network"
        )
    if foreign := sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"}):
        problems.append(
            f"it has operations outside of the ONNX standard ({', '.join(foreign)}): export it again "
            "without them, and without quantisation or optimisation for one runtime"
        )
    standard = {node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}
    if unknown := sorted(standard - OPERATIONS - PLAIN - set(_REWRITTEN.split())):
        problems.append(
            f"it has operations that no backbone may have ({', '.join(unknown)}): export the network for "
            "inference, in float32, without control flow and without steps before or after it"
        )
    if problems:
        raise GraphError("\n  ".join(problems))
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises classes of its own
        raise GraphError(f"the file is damaged ({brief(error)}): copy it again, or export it again") from None
    return model


def _check_names(model: onnx.ModelProto) -> None:
    """Raise a ValueError unless all names are text: protobuf returns bytes that are no UTF-8 as bytes."""
    graph = model.graph
    names = [each.name for each in (*graph.input, *graph.output, *graph.initializer)]
    for node in graph.node:
        names += [node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute)]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name is no text")


def _opset(model: onnx.ModelProto) -> int:
    return max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)


def _wanted(model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, str]:
    """The tensor of the file for each layer, whose name has a dot for each slash."""
    there = [output for node in model.graph.node for output in node.output if output]
    known = {name.strip("/").replace("/", "."): name for name in there}
    outputs = [output.name.strip("/").replace("/", ".") for output in model.graph.output]
    if unknown := [f"{layer!r}{nearest(layer, known)}" for layer in layers if layer not in known]:
        raise GraphError(
            f"it has no output {', '.join(unknown)}: write others as `layer`; it has {', '.join(outputs)}, "
            "and each tensor inside can be named, too"
        )
    return {layer: known[layer] for layer in layers}


def _check_input(model: onnx.ModelProto, settings: OnnxFile, size: int) -> str:
    """The name of the input, after a check that it takes images of this size and layout."""
    weights = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in weights]
    if len(inputs) != 1:
        raise GraphError(
            f"it has {len(inputs)} inputs ({', '.join(each.name for each in inputs)}), not one, the images: "
            "export the part of the network that takes images"
        )
    kind = inputs[0].type.tensor_type
    if kind.elem_type != TensorProto.FLOAT:
        given = {value: name for name, value in TensorProto.DataType.items()}.get(kind.elem_type)
        raise GraphError(f"its input has numbers of the type {given}: export it with float32 numbers")
    sides = [side.dim_value for side in kind.shape.dim]  # 0: any
    if len(sides) != 4:
        raise GraphError(f"its input has {len(sides)} axes, not the 4 of images: export another network")
    batch, *sides = sides
    channels = sides.pop(0 if settings.layout == "NCHW" else 2)
    if channels not in (0, 3):
        raise GraphError(
            f"its images have {channels} colours in the layout {settings.layout}, not 3: "
            "write the other `layout`, or export a network of RGB images"
        )
    if batch > 1:
        raise GraphError(f"it takes {batch} images at once: export it with a free batch, or a batch of 1")
    if fixed := sorted({side for side in sides if side not in (0, size)}):
        raise GraphError(
            f"it takes images of {' x '.join(map(str, sides))} px: write `input_size: {{cell: {fixed[0]}, "
            f"smear: {fixed[0]}}}`, or export it for images of {size} px or of any size"
        )
    return str(inputs[0].name)


# --- writing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One operation of the file: its inputs are constants, or tensors that depend on the images."""

    node: NodeProto
    shapes: dict[str, tuple[int, ...]]  # of the outputs
    attributes: dict[str, Any]

    @property
    def output(self) -> str:
        return str(self.node.output[0])


class _Importer:
    """Writes the operations of a file, one after another, for one image."""

    def __init__(self, model: onnx.ModelProto, settings: OnnxFile, size: int) -> None:
        self.graph = GraphWriter()
        self._model, self._settings = model, settings
        self._version = _opset(model)
        self.constants = _weights(model)
        self._left = 4 * LARGEST  # numbers that may become constants
        self.maps: dict[str, FeatureMap] = {}  # what depends on the images, by the name in the file
        self.shapes: dict[str, tuple[int, ...]] = {}  # of these, for one image
        self._written: dict[str, str] = {}  # names in the graph of constants
        name, nchw = _check_input(model, settings, size), settings.layout == "NCHW"
        image = self.graph.image(_preprocessing(settings))
        if nchw:
            self.maps[name], self.shapes[name] = image, (1, 3, size, size)
        else:
            self.put(name, self.graph.node("Transpose", [image.name], perm=[0, 2, 3, 1]), (1, size, size, 3))
        self.skipped: set[str] = set()  # outputs of normalisations that are folded into a convolution

    def walk(self, wanted: Sequence[str]) -> None:
        """Write all operations that some tensors need."""
        nodes = needed_for(wanted, self._model.graph)
        self._uses = Counter([*(name for node in nodes for name in node.input), *wanted])
        self._after = {name: node for node in reversed(nodes) for name in node.input}
        for node in nodes:
            self._add(node)

    def _add(self, node: NodeProto) -> None:
        shapes, kinds = self._infer(node)
        given = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size") and given[0] in self.shapes:
            shape = np.array(self.shapes[given[0]], np.int64)
            ends = {each.name: each.i for each in node.attribute}
            part = shape[ends.get("start", 0) : ends.get("end", len(shape))]
            self.constants[node.output[0]] = part if node.op_type == "Shape" else shape.prod(keepdims=False)
        elif all(name in self.constants for name in given):
            self._left -= sum(map(math.prod, shapes.values()))
            if self._left < 0:
                raise GraphError(
                    "it computes more than a billion numbers that depend on no image: export it again with "
                    "`onnxsim`, or with constants folded"
                )
            self.constants |= _computed(node, self.constants, self._version)
        elif node.output[0] not in self.skipped:
            if any(kind != TensorProto.FLOAT for kind in kinds.values()):
                raise GraphError(
                    f"{node.output[0]!r} ({node.op_type}) depends on the images and is not float32: "
                    "export the network with float32 numbers, and without steps that count or compare"
                )
            self.shapes |= shapes
            values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            attributes = {
                k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in values.items()
            }
            _WRITERS.get(node.op_type, _copy)(self, _Call(node, shapes, attributes))

    def _infer(self, node: NodeProto) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """Shapes and types of the outputs of an operation, for one image, before it is computed."""
        types, values = {}, {}
        for name in filter(None, node.input):
            array = self.constants.get(name)
            kind = TensorProto.FLOAT if array is None else helper.np_dtype_to_tensor_dtype(array.dtype)
            types[name] = helper.make_tensor_type_proto(
                kind, self.shapes[name] if array is None else array.shape
            )
            if array is not None and array.size <= _SMALL:
                values[name] = numpy_helper.from_array(array, name)
        schema = onnx.defs.get_schema(node.op_type, self._version, "")
        try:
            found = onnx.shape_inference.infer_node_outputs(schema, node, types, values)
        except Exception as error:  # C++ code raises classes of its own
            raise GraphError(
                f"the sizes of {node.output[0]!r} ({node.op_type}) do not fit ({brief(error)}): is "
                "`input_size` a size that this network takes?"
            ) from None
        shapes, kinds = {}, {}
        for name, each in found.items():
            kind = each.tensor_type
            sides = [side.dim_value if side.HasField("dim_value") else -1 for side in kind.shape.dim]
            if not kind.HasField("shape") or min(sides, default=0) < 0 or math.prod(sides) > LARGEST:
                raise GraphError(
                    f"the size of {name!r} ({node.op_type}) is unknown, or above {LARGEST:,} numbers: export "
                    "the network for images of one size"
                )
            shapes[name], kinds[name] = tuple(sides), kind.elem_type
        return shapes, kinds

    def put(self, name: str, tensor: str, shape: tuple[int, ...]) -> None:
        """Keep a tensor whose channels lie as in the file."""
        count = shape[1] if len(shape) > 1 else 0
        self.maps[name], self.shapes[name] = FeatureMap(tensor, np.arange(count), count), shape

    def tensor(self, name: str) -> str:
        """The name in the graph of a tensor or a constant, with the channels of the file."""
        if not name:
            return ""
        if name in self.constants:
            if name not in self._written:
                self._written[name] = self.graph.constant(self.constants[name], self.constants[name].dtype)
            return self._written[name]
        found = self.graph.stored(self.maps[name])
        if found.width != len(found.places):
            picked = self.graph.constant(found.places, np.int64)
            gathered = self.graph.node("Gather", [found.name, picked], axis=1)
            found = FeatureMap(gathered, np.arange(len(found.places)), len(found.places))
        self.maps[name] = found
        return found.name

    def reshaped(self, tensor: str, shape: Sequence[int]) -> str:
        """A tensor in another shape; the first axis grows with the images."""
        return self.graph.node("Reshape", [tensor, self.graph.constant([-1, *shape[1:]], np.int64)])

    def normalisation_after(self, call: _Call) -> tuple[np.ndarray, np.ndarray] | None:
        """Factor and offset of a batch normalisation that alone reads the output, which is then skipped."""
        node = self._after.get(call.output)
        if node is None or node.op_type != "BatchNormalization" or self._uses[call.output] != 1:
            return None
        if not all(name in self.constants for name in node.input[1:]):
            return None
        self.skipped.add(node.output[0])
        return _normalisation(self, node)

    def give(self, call: _Call, found: FeatureMap) -> None:
        """Keep a map as the output of an operation, and of the normalisation that was folded into it."""
        self.maps[call.output] = found
        node = self._after.get(call.output)
        if node is not None and node.output[0] in self.skipped:
            self.maps[node.output[0]], self.shapes[node.output[0]] = found, self.shapes[call.output]

    def feature(self, layer: str, name: str) -> None:
        """Write an output: the pooled features of a tensor of the file, if the pooling fits its shape."""
        if name not in self.shapes:
            raise GraphError(f"the output {layer!r} does not depend on the images: choose another `layer`")
        shape, pooling, graph = self.shapes[name], self._settings.pooling, self.graph
        fits = {"map": 4, "none": 2}.get(pooling, 3)
        if len(shape) != fits or shape[0] != 1:
            shown = " x ".join(["images", *map(str, shape[1:])])
            fitting = {2: "none", 3: "class+patches", 4: "map"}.get(len(shape))
            raise GraphError(
                f"the output {layer!r} has the shape {shown}, and `pooling: {pooling}` needs {fits} axes: "
                + (f"write `pooling: {fitting}`, or " if fitting else "")
                + "choose another `layer`"
            )
        if pooling == "map":
            if self._settings.layout == "NHWC":
                turned = graph.node("Transpose", [self.tensor(name)], perm=[0, 3, 1, 2])
                self.put(name, turned, (1, shape[3], *shape[1:3]))
            graph.feature(layer, self.maps[name])
        elif pooling == "none":
            graph.node("Flatten", [self.tensor(name)], layer)
        else:
            self._pool_tokens(layer, self.tensor(name), shape)

    def _pool_tokens(self, layer: str, tensor: str, shape: tuple[int, ...]) -> None:
        """Write the class token, the mean of the tokens of patches, or both."""
        graph, pooling = self.graph, self._settings.pooling
        _, count, channels = shape
        first, parts = self._settings.tokens, []
        if math.isqrt(count - first) ** 2 != count - first or count <= first:
            fitting = [n for n in range(min(count, 17)) if math.isqrt(count - n) ** 2 == count - n]
            raise GraphError(
                f"the output {layer!r} has {count} tokens; without {first} they are no square of patches: "
                + (f"write `tokens: {fitting[0]}` (class token and registers), or " if fitting else "")
                + "choose another `layer`"
            )
        ends = [graph.constant([each], np.int64) for each in (0, 1, first, count)]
        axis = ends[1]
        if "class" in pooling:
            if not first:
                raise GraphError("`tokens: 0` means that there is no class token: write `pooling: patches`")
            token = graph.node("Slice", [tensor, ends[0], ends[1], axis])
            parts.append(graph.node("Flatten", [token]))
        if "patches" in pooling:
            patches = graph.node("Slice", [tensor, ends[2], ends[3], axis])
            turned = graph.node("Transpose", [patches], perm=[0, 2, 1])
            square = self.reshaped(turned, (1, channels, count - first, 1))
            parts.append(graph.node("Flatten", [graph.node("GlobalAveragePool", [square])]))
        graph.node("Concat", parts, layer, axis=1)


def _preprocessing(settings: OnnxFile) -> Callable[[Any], Any]:
    mean, std = np.array(settings.mean), np.array(settings.std)
    return lambda pixels: (pixels / settings.scale - mean) / std


def _weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    try:
        return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    except Exception as error:  # of damaged or unknown numbers, of many classes
        raise GraphError(f"its weights cannot be read ({brief(error)}): export it again in float32") from None


def _computed(node: NodeProto, constants: Mapping[str, np.ndarray], version: int) -> dict[str, np.ndarray]:
    """The outputs of an operation on constants."""
    given = {name: constants[name] for name in node.input if name}
    info = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
    ]
    names = [name for name in node.output if name]
    graph = helper.make_graph([node], "one", info, [onnx.ValueInfoProto(name=name) for name in names])
    opsets = [helper.make_opsetid("", version)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return dict(zip(names, _run(model, given, names), strict=True))


def _run(model: onnx.ModelProto, given: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """The outputs of a model, or a GraphError if ONNX Runtime cannot compute it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(names, dict(given)))
    except Exception as error:  # it raises classes of its own
        raise GraphError(
            f"ONNX Runtime cannot compute it ({brief(error)}): export it again with opset {OPSET}"
        ) from None


# --- one writer for each operation that is written in another way ---------------------------------------


def _copy(of: _Importer, call: _Call) -> None:
    """The same operation."""
    if len(call.node.output) != 1:
        raise GraphError(f"{call.output!r} ({call.node.op_type}) has several outputs: export it without them")
    names = [of.tensor(name) for name in call.node.input]
    made = of.graph.node(call.node.op_type, names, **call.attributes)
    of.put(call.output, made, call.shapes[call.output])


def _same(of: _Importer, call: _Call) -> None:
    of.maps[call.output] = of.maps[call.node.input[0]]


def _reshape(of: _Importer, call: _Call) -> None:
    shape = call.shapes[call.output]
    of.put(call.output, of.reshaped(of.tensor(call.node.input[0]), shape), shape)


def _by_channel(of: _Importer, call: _Call) -> None:
    """An operation on each number; stored channels that the file does not have stay unused."""
    others = call.node.input[1:]
    maps = [of.maps[name] for name in call.node.input if name in of.maps]
    shapes = {of.shapes.get(name, ()) for name in call.node.input if name}
    scalars = all(name in of.constants and of.constants[name].size == 1 for name in others)
    alike = len({shape[1:2] for shape in shapes}) == 1 and all(len(shape) == 4 for shape in shapes)
    if call.node.input[0] not in of.maps or maps[0].width == len(maps[0].places):
        _copy(of, call)
    elif scalars:
        values = [float(of.constants[name].item()) for name in others]
        of.give(call, of.graph.applied(call.node.op_type, maps[0], constants=values, **call.attributes))
    elif alike and len(maps) == len(call.node.input):
        of.give(call, of.graph.applied(call.node.op_type, *maps))
    else:
        _copy(of, call)


def _expand(of: _Importer, call: _Call) -> None:
    is_same = call.shapes[call.output] == of.shapes[call.node.input[0]]
    (_same if is_same else _copy)(of, call)


def _split(of: _Importer, call: _Call) -> None:
    """Slices, one for each part."""
    tensor, axis, start = of.tensor(call.node.input[0]), call.attributes.get("axis", 0), 0
    for name in filter(None, call.node.output):
        shape = call.shapes[name]
        ends = ([start], [start + shape[axis]], [axis])
        names = [of.graph.constant(each, np.int64) for each in ends]
        of.put(name, of.graph.node("Slice", [tensor, *names]), shape)
        start += shape[axis]


def _concat(of: _Importer, call: _Call) -> None:
    """Channels one after another; a constant (a class token) is repeated for each image."""
    axis = call.attributes["axis"] % len(call.shapes[call.output])
    names = list(call.node.input)
    if axis == 1 and len(call.shapes[call.output]) == 4 and all(name in of.maps for name in names):
        of.give(call, of.graph.joined([of.maps[name] for name in names]))
        return
    image = next(name for name in names if name in of.maps)
    tensors = []
    for name in names:
        tensors.append(of.tensor(name))
        if name in of.constants and axis > 0:
            ends = [of.graph.constant(each, np.int64) for each in ([0], [1], [axis])]
            part = of.graph.node("Slice", [of.tensor(image), *ends])
            zeros = of.graph.node("Mul", [part, of.graph.constant(0.0)])
            tensors[-1] = of.graph.node("Add", [zeros, tensors[-1]])
    of.put(call.output, of.graph.node("Concat", tensors, axis=axis), call.shapes[call.output])


def _reduce_mean(of: _Importer, call: _Call) -> None:
    """The mean over rows and columns as a pooling; other means as they are."""
    name, *axes = call.node.input
    shape = of.shapes[name]
    over = sorted(int(axis) % len(shape) for axis in of.constants[axes[0]]) if axes and axes[0] else []
    if len(shape) != 4 or over != [2, 3]:
        _copy(of, call)
        return
    pooled = of.graph.applied("GlobalAveragePool", of.maps[name])
    if call.attributes.get("keepdims", 1):
        of.give(call, pooled)
        return
    of.maps[call.output] = pooled
    out = call.shapes[call.output]
    of.put(call.output, of.reshaped(of.tensor(call.output), out), out)


def _softmax(of: _Importer, call: _Call) -> None:
    """A softmax over the last axis by operations with the same bits on every processor."""
    shape = call.shapes[call.output]
    if call.attributes.get("axis", -1) % len(shape) != len(shape) - 1:
        _copy(of, call)
    else:
        of.put(call.output, of.graph.softmax(of.tensor(call.node.input[0]), shape[-1]), shape)


def _normalisation(of: _Importer, node: NodeProto) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of each channel of a batch normalisation, float64."""
    gamma, beta, mean, variance = (of.constants[name].astype(np.float64) for name in node.input[1:])
    epsilon = next((each.f for each in node.attribute if each.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    return factor, beta - mean * factor


def _batch_normalisation(of: _Importer, call: _Call) -> None:
    factor, offset = _normalisation(of, call.node)
    if len(call.shapes[call.output]) == 4:
        of.give(call, of.graph.scaled(of.maps[call.node.input[0]], factor, offset))
        return
    shape = [1, -1, *[1] * (len(call.shapes[call.output]) - 2)]
    scaled = [of.tensor(call.node.input[0]), of.graph.constant(factor.reshape(shape))]
    moved = [of.graph.node("Mul", scaled), of.graph.constant(offset.reshape(shape))]
    of.put(call.output, of.graph.node("Add", moved), call.shapes[call.output])


def _convolution(of: _Importer, call: _Call) -> None:
    """A convolution as `aplsmear.features.export` writes it, with the batch normalisation after it."""
    name, weights, *more = call.node.input
    if weights not in of.constants or len(of.shapes[name]) != 4:
        raise GraphError(
            f"{call.output!r} is a convolution with computed weights, or not of images: "
            "choose another network"
        )
    kernel = of.constants[weights].astype(np.float64)
    bias = of.constants[more[0]].astype(np.float64) if more and more[0] else np.zeros(len(kernel))
    if normalisation := of.normalisation_after(call):
        factor, offset = normalisation
        kernel, bias = kernel * factor[:, None, None, None], bias * factor + offset
    strides, dilations = (call.attributes.get(key, [1, 1]) for key in ("strides", "dilations"))
    pads = call.attributes.get("auto_pad", "NOTSET")
    if not pads.startswith("SAME"):
        pads = call.attributes.get("pads", [0, 0, 0, 0])
    window = window_of(of.shapes[name][2:], kernel.shape[2:], strides, dilations, pads)
    x, group = of.maps[name], call.attributes.get("group", 1)
    depthwise = group == len(kernel) == len(x.places) and x.width % 16 == 0
    if group == 1 or depthwise:
        of.give(call, of.graph.convolved(x, kernel, bias, depthwise=depthwise, **window))
    else:
        found = of.graph.grouped(of.tensor(name), kernel, bias, group, **window)
        of.give(call, FeatureMap(found, np.arange(len(kernel)), len(kernel)))


def _product(of: _Importer, call: _Call) -> None:
    """A fully connected layer on one row for each image, as a convolution of one pixel."""
    name, weights, *more = call.node.input
    kind, shape = call.node.op_type, of.shapes.get(name, ())
    settings = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | call.attributes
    if weights not in of.constants or len(shape) != 2 or shape[0] != 1 or settings["transA"]:
        _copy(of, call)
        return
    kernel = of.constants[weights].astype(np.float64)
    if kind == "MatMul" or not settings["transB"]:
        kernel = kernel.T
    bias = np.zeros(len(kernel))
    if kind == "Gemm":
        kernel = kernel * settings["alpha"]
        if more and more[0]:
            bias = bias + settings["beta"] * of.constants[more[0]].astype(np.float64).ravel()
    channels = kernel.shape[1]
    pixel = FeatureMap(of.reshaped(of.tensor(name), (1, channels, 1, 1)), np.arange(channels), channels)
    found = of.graph.convolved(pixel, kernel[:, :, None, None], bias)
    of.maps[call.output] = found
    of.put(call.output, of.reshaped(of.tensor(call.output), (1, len(kernel))), (1, len(kernel)))


_EACH_NUMBER = """Add AveragePool Clip Div Elu Erf GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish
LeakyRelu MaxPool Mul Relu Sigmoid Sub Tanh"""
_WRITERS: dict[str, Callable[[_Importer, _Call], None]] = {
    **dict.fromkeys(_EACH_NUMBER.split(), _by_channel),
    **dict.fromkeys(["Flatten", "Reshape", "Squeeze", "Unsqueeze"], _reshape),
    **dict.fromkeys(["Cast", "Dropout", "Identity"], _same),  # a cast from float32 to float32
    **dict.fromkeys(["Gemm", "MatMul"], _product),
    "BatchNormalization": _batch_normalisation,
    "Concat": _concat,
    "Conv": _convolution,
    "Expand": _expand,
    "ReduceMean": _reduce_mean,
    "Softmax": _softmax,
    "Split": _split,
}


# --- the graph against the file -------------------------------------------------------------------------


def _features_of_source(
    source: onnx.ModelProto, settings: OnnxFile, size: int, wanted: Mapping[str, str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Two images, and the features of each, float32 (2, channels) for each output, from the file as it is."""
    images = np.random.Generator(np.random.Philox(1)).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    whole = onnx.ModelProto()
    whole.CopyFrom(source)
    there = {each.name for each in whole.graph.output}
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted.values() if name not in there)
    prepared = _preprocessing(settings)(images.astype(np.float64)).astype(np.float32)
    if settings.layout == "NCHW":
        prepared = prepared.transpose(0, 3, 1, 2)
    name = _check_input(source, settings, size)
    rows = [_run(whole, {name: image[None]}, list(wanted.values())) for image in prepared]
    pooled = [[_pooled(each, settings) for each in row] for row in rows]
    return images, [np.concatenate(each) for each in zip(*pooled, strict=True)]


def _pooled(values: np.ndarray, settings: OnnxFile) -> np.ndarray:
    """The pooling by NumPy."""
    if settings.pooling == "none":
        return values
    if settings.pooling == "map":
        return np.asarray(values.mean(axis=(2, 3) if settings.layout == "NCHW" else (1, 2)))
    parts = {"class": values[:, 0], "patches": values[:, settings.tokens :].mean(axis=1)}
    return np.concatenate([parts[each] for each in settings.pooling.split("+")], axis=1)


def _check_same(
    model: onnx.ModelProto, expected: tuple[np.ndarray, list[np.ndarray]], layers: Sequence[str]
) -> None:
    """Check that the graph gives the features of the file; fix its batch at 1 unless it may be free."""
    images, features = expected
    alone = [_run(model, {PIXELS: image[None]}, layers) for image in images]
    found = [np.concatenate(each) for each in zip(*alone, strict=True)]
    for layer, ours, theirs in zip(layers, found, features, strict=True):
        if not np.isfinite(theirs).all():
            raise GraphError(
                f"the file gives numbers of {layer!r} that are infinite or undefined: compare `scale`, "
                "`mean` and `std` with those that its network was trained with, and take the file in float32"
            )
        scale = np.abs(theirs).max(initial=1e-6)
        if ours.shape != theirs.shape or not np.abs(ours - theirs).max() <= 1e-3 * scale:
            raise GraphError(
                f"the graph of the file gives other features of {layer!r} than the file itself: please "
                "report this network to the project; another opset of the export may help"
            )
    try:
        together = _run(model, {PIXELS: images}, layers)
    except GraphError:
        together = []
    if [each.tobytes() for each in together] != [each.tobytes() for each in found]:
        dim = model.graph.input[0].type.tensor_type.shape.dim[0]
        dim.Clear()
        dim.dim_value = 1
