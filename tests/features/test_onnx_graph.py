"""Networks of keras.applications as graphs: the same features, the same bytes, and nothing that could run."""

import sys
from collections import Counter
from contextlib import nullcontext

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from processors import INSTALL, can_emulate, output_of

from aplsmear.cpu import cpuinfo
from aplsmear.errors import UserError
from aplsmear.features.backbones import cut_network, write_graph
from aplsmear.features.export import as_graph
from aplsmear.features.onnx_graph import OPERATIONS, PIXELS, GraphError, only, read_graph
from backbone_graphs import mobilenet, pictures

pytestmark = [
    pytest.mark.usefixtures("keras"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]

# One of each family: a layer in the middle and one near the end.
FAMILIES = {
    "ConvNeXtTiny": 32,
    "DenseNet121": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "InceptionResNetV2": 75,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "NASNetMobile": 32,
    "ResNet50V2": 32,
    "VGG16": 32,
    "Xception": 71,
}


def trained(network: object) -> None:
    """Statistics and scales as of a trained network; those of an untrained one would hide mistakes."""
    rng = np.random.default_rng(0)
    for weight in network.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in ("moving_mean", "beta", "bias"):
            weight.assign(rng.normal(0, 0.1, weight.shape))
        elif kind in ("moving_variance", "gamma", "variable"):  # the last one: ConvNeXt's scale of a layer
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))


def family(application: str, keras: object) -> tuple[object, object, int, list[str]]:
    """A network cut at a layer in the middle and at the last one, its preprocessing, its size, the layers."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    size, builder = FAMILIES[application], getattr(keras.applications, application)
    full = builder(include_top=False, weights=None, input_shape=(size, size, 3))
    trained(full)
    maps = [layer.name for layer in full.layers if len(layer.output.shape) == 4]
    names = [maps[len(maps) // 2], maps[-1]]
    cut = keras.Model(full.input, {name: full.get_layer(name).output for name in names})
    return cut, sys.modules[builder.__module__].preprocess_input, size, names


@pytest.mark.parametrize("application", FAMILIES)
def test_every_family_of_networks_gives_the_features_of_keras(application, keras):
    cut, preprocess, size, names = family(application, keras)
    images = pictures(2, size)
    expected = cut(preprocess(images.astype(np.float32)), training=False)
    graph = as_graph(cut, preprocess, size).SerializeToString()
    read_graph(graph)  # raises no error
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for name, found in zip(names, session.run(names, {PIXELS: images}), strict=True):
        rows = np.asarray(expected[name]).mean(axis=(1, 2))
        assert np.abs(found - rows).max() < 1e-5 * np.abs(rows).max()


def test_batch_normalisation_is_folded_away(keras):
    cut, preprocess = cut_network(mobilenet(), "cell", 1)
    trained(cut)
    graph = as_graph(cut, preprocess, 32).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds.keys() <= {
        "Cast",
        "Transpose",
        "Mul",
        "Add",
        "Conv",
        "Clip",
        "GlobalAveragePool",
        "Flatten",
        "Gather",
    }
    assert (kinds["Mul"], kinds["Add"]) == (1, 1)  # of the preprocessing


def test_a_graph_has_the_same_bytes_whatever_was_built_before(tmp_path):
    for name, seed in (("one", 1), ("other", 2), ("again", 1)):
        write_graph(tmp_path / name, mobilenet(), "cell", seed)
    one, other, again = ((tmp_path / name).read_bytes() for name in ("one", "other", "again"))
    assert one == again
    assert one != other


def test_untrained_filters_are_the_same_on_both_levels(tmp_path):
    weights = []
    for level in ("cell", "smear"):
        write_graph(tmp_path / level, mobilenet(), level, 1)
        graph = read_graph((tmp_path / level).read_bytes()).graph
        weights.append([numpy_helper.to_array(each) for each in graph.initializer])
    assert all(np.array_equal(cell, smear) for cell, smear in zip(*weights, strict=True))


def test_layers_that_keras_numbers_have_the_same_names_each_time(tmp_path):
    """Xception's `conv2d` would be `conv2d_4` in the second network of a process."""
    sizes = {"cell": 71, "smear": 71}
    settings = mobilenet(application="Xception", options={}, input_size=sizes, layer=["conv2d"])
    for level in ("cell", "smear"):
        write_graph(tmp_path / level, settings, level, 1)
        assert [each.name for each in onnx.load(tmp_path / level).graph.output] == ["conv2d"]


def test_a_layer_that_is_no_map_is_an_error(tmp_path):
    settings = mobilenet(application="DenseNet121", options={"pooling": "avg"}, layer=["avg_pool"])
    with pytest.raises(GraphError, match="'avg_pool' gives no map"):
        write_graph(tmp_path / "graph", settings, "cell", 1)


def test_a_layer_or_an_activation_without_an_operation_is_an_error(keras):
    image = keras.Input((32, 32, 3))
    for layer, message in (
        (keras.layers.Conv2DTranspose(2, 3), "is a Conv2DTranspose, which cannot be written"),
        (keras.layers.Conv2D(2, 3, activation="softplus"), "has the activation softplus"),
    ):
        with pytest.raises(GraphError, match=message):
            as_graph(keras.Model(image, {"out": layer(image)}), lambda pixels: pixels, 32)


def of_nodes(*nodes: object, weights: object = ()) -> bytes:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(list(nodes), "g", [image], [out], list(weights))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("elsewhere", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def test_a_strangers_graph_may_do_nothing_but_what_a_backbone_does(tmp_path, monkeypatch):
    outside = numpy_helper.from_array(np.ones(1, np.float32), "w")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.bin").write_bytes(bytes(4))
    onnx.external_data_helper.set_external_data(outside, location="other.bin")
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    for content, message in (
        (b"no graph", "no ONNX graph"),
        (of_nodes(helper.make_node("RandomNormalLike", ["x"], ["y"])), "that no backbone has: RandomNormal"),
        (
            of_nodes(helper.make_node("Relu", ["x"], ["y"], domain="elsewhere")),
            "no backbone has",
        ),
        (
            of_nodes(helper.make_node("Add", ["x", "w"], ["y"]), weights=[outside]),
            "another file",
        ),
    ):
        with pytest.raises(GraphError, match=message):
            read_graph(content)
    assert "If" not in OPERATIONS
    assert "Loop" not in OPERATIONS


def test_a_small_graph_with_a_tensor_of_terabytes_is_refused():
    pixels = helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["images", 8, 8, 3])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["images", None])
    nodes = [
        helper.make_node("Cast", [PIXELS], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Pad", ["x", "pads"], ["y"]),
        helper.make_node("Flatten", ["y"], ["out"]),
    ]
    pads = helper.make_tensor("pads", TensorProto.INT64, [8], [0, 10**6, 10**6, 0, 0, 0, 0, 0])
    graph = helper.make_graph(nodes, "g", [pixels], [out], [pads])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(GraphError, match="above 268,435,456 numbers"):
        read_graph(model.SerializeToString())


def test_convolutions_of_many_channels_have_weights_that_are_inputs_in_a_part_of_a_graph_too(keras):
    """ONNX Runtime would compute them in blocks, in an order that depends on the processor."""
    image = keras.Input((8, 8, 3))
    first = keras.layers.Conv2D(16, 3, name="first")(image)
    second = keras.layers.Conv2D(20, 3, name="second")(first)
    third = keras.layers.Conv2D(16, 3, name="third")(second)
    model = as_graph(keras.Model(image, {"second": second, "third": third}), lambda pixels: pixels, 8)
    for layers, count in ((["third"], 2), (["second"], 1)):
        graph = only(model, layers).graph
        convolutions = {node.input[1] for node in graph.node if node.op_type == "Conv"}
        opened = {each.name for each in graph.input[1:]}
        assert opened < convolutions
        assert len(opened) == count
    assert all(each.dims[0] % 16 == 0 for each in model.graph.initializer if len(each.dims) == 4)


DIGESTS = """
import hashlib, sys
import numpy as np
import onnxruntime
for path in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pixels = session.get_inputs()[0]
    images = np.random.default_rng(1).integers(0, 256, (1, *pixels.shape[1:])).astype(np.uint8)
    rows = session.run(None, {pixels.name: images})
    print(hashlib.sha256(b"".join(each.tobytes() for each in rows)).hexdigest())
"""


@pytest.mark.skipif(not can_emulate(), reason=INSTALL)
def test_emulated_processors_give_the_same_bits(keras, tmp_path):
    """Of networks whose sums depend on the processor unless the graph prevents it."""
    for application in ("ConvNeXtTiny", "EfficientNetB0", "MobileNetV3Small", "ResNet50V2"):
        cut, preprocess, size, _ = family(application, keras)
        graph = as_graph(cut, preprocess, size).SerializeToString()
        (tmp_path / f"{application}.onnx").write_bytes(graph)
    for application, size in (("DINOv2G", 56), ("DINOv3SPlus", 64)):
        shape = {"depth": 1, "width": 64, "heads": 2, "hidden": 88}
        settings = mobilenet(
            application=application,
            options=shape,
            input_size={"cell": size, "smear": size},
            layer=["class", "patches"],
        )
        graph = as_graph(*cut_network(settings, "cell", 1), size).SerializeToString()
        (tmp_path / f"{application}.onnx").write_bytes(graph)
    graphs = [str(path) for path in sorted(tmp_path.iterdir())]
    here = output_of(DIGESTS, *graphs)
    assert len(here.split()) == 6
    for processor in ("Haswell", "EPYC-Milan"):
        assert output_of(DIGESTS, *graphs, processor=processor) == here


EACH_OPERATION = """
import hashlib, sys
import numpy as np
import onnxruntime
from onnx import ValueInfoProto, helper, numpy_helper
rng = np.random.default_rng(1)
x = rng.normal(0, 4, (3, 48, 7, 9)).astype(np.float32)
def weights(*shape): return rng.normal(0, 1, shape).astype(np.float32)
window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
more = {
    "Add": ([weights(1, 48, 1, 1)], {}), "AveragePool": ([], window), "Cast": ([], {"to": 10}),
    "Clip": ([np.float32(0), np.float32(6)], {}), "Concat": ([weights(3, 5, 7, 9)], {"axis": 1}),
    "Conv": ([weights(32, 48, 1, 1)], {}), "Gather": ([np.array([5, 3])], {"axis": 1}),
    "HardSigmoid": ([], {"alpha": 1 / 6}), "LayerNormalization": ([weights(9), weights(9)], {"axis": -1}),
    "MaxPool": ([], window), "Mul": ([weights(1, 48, 1, 1)], {}), "Softmax": ([], {"axis": 1}),
    "Pad": ([np.array([0, 0, 1, 1, 0, 0, 1, 1])], {}), "Transpose": ([], {"perm": [0, 2, 3, 1]}),
    "Slice": ([np.array([1]), np.array([5]), np.array([2])], {}), "Div": ([weights(1, 48, 1, 1)], {}),
    "MatMul": ([weights(9, 33)], {}), "Reshape": ([np.array([3, 48, 63])], {}),
    "Sub": ([weights(1, 48, 1, 1)], {}), "DepthToSpace": ([], {"blocksize": 2}),
    "Einsum": ([weights(9, 33)], {"equation": "ncab,bd->ncad"}), "Expand": ([np.array([3, 48, 7, 9])], {}),
    "GroupNormalization": ([weights(48), weights(48)], {"num_groups": 3}), "Pow": ([np.float32(1.7)], {}),
    "InstanceNormalization": ([weights(48), weights(48)], {}), "Max": ([weights(9)], {}),
    "Min": ([weights(9)], {}), "PRelu": ([weights(48, 1, 1)], {}), "Squeeze": ([np.zeros(0, int)], {}),
    "Resize": ([np.zeros(0, "f"), np.zeros(0, "f"), np.array([3, 48, 12, 5])], {"mode": "cubic"}),
    "Tile": ([np.array([1, 1, 1, 2])], {}), "Unsqueeze": ([np.array([1])], {}),
    **{f"Reduce{kind}": ([np.array([-1])], {}) for kind in ("L2", "Max", "Mean", "Min", "Sum", "SumSquare")},
}
for kind in sys.argv[1:]:
    values, attributes = more.get(kind, ([], {}))
    tensors = [numpy_helper.from_array(np.asarray(value), f"w{n}") for n, value in enumerate(values)]
    names = ["x", *(each.name for each in tensors)]
    if kind == "Where":
        tensors, names = [numpy_helper.from_array(x[0] > 0, "w0")], ["w0", "x", "x"]
    if kind == "Gemm":
        tensors, names = [numpy_helper.from_array(weights(9, 33), "w0")], ["rows", "w0"]
    node = helper.make_node(kind, names, ["y"], **attributes)
    rows = helper.make_node("Reshape", ["x", "shape"], ["rows"])
    tensors.append(numpy_helper.from_array(np.array([-1, 9]), "shape"))
    image = helper.make_tensor_value_info("x", 1, x.shape)
    graph = helper.make_graph([rows, node], "g", [image], [ValueInfoProto(name="y")], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    given = abs(x) + 0.1 if kind in ("Log", "Pow", "Sqrt") else x
    print(kind, hashlib.sha256(session.run(None, {"x": given})[0].tobytes()).hexdigest())
"""


@pytest.mark.skipif(not can_emulate(), reason=INSTALL)
def test_each_operation_that_a_graph_may_have_gives_the_same_bits_on_emulated_processors():
    kinds = sorted(OPERATIONS)
    here = output_of(EACH_OPERATION, *kinds)
    assert len(here.splitlines()) == len(OPERATIONS)
    for processor in ("Haswell", "EPYC"):
        assert output_of(EACH_OPERATION, *kinds, processor=processor) == here


@pytest.mark.skipif(not can_emulate(), reason=INSTALL)
@pytest.mark.skipif(" avx512f " not in cpuinfo(), reason="this processor has no AVX-512 to compare with")
def test_softmax_differs_with_avx512_and_is_refused():
    here, other = (output_of(EACH_OPERATION, "Softmax", processor=each) for each in ("", "Haswell"))
    assert here != other, "OPERATIONS can have Softmax now"
    with pytest.raises(GraphError, match="that no backbone has: Softmax"):
        read_graph(of_nodes(helper.make_node("Softmax", ["x"], ["y"])))


@pytest.mark.parametrize(
    ("shape", "opened", "refused"),
    [
        ((32, 48, 3, 3), False, True),  # computed in blocks, whose size depends on the processor
        ((32, 48, 3, 3), True, False),
        ((32, 48, 1, 1), False, False),
        ((20, 48, 1, 1), False, True),  # the last block is not full
        ((32, 3, 3, 3), False, False),
        ((48, 1, 3, 3), False, False),
    ],
)
def test_a_convolution_whose_bits_depend_on_the_processor_is_refused(shape, opened, refused):
    count = shape[0] if shape[1] == 1 else 1
    pixels = helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["images", 8, 8, shape[1] * count])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["images", None, None, None])
    nodes = [
        helper.make_node("Cast", [PIXELS], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "w"], ["out"], group=count),
    ]
    inputs = [pixels, helper.make_tensor_value_info("w", TensorProto.FLOAT, shape)][: 2 if opened else 1]
    weights = [numpy_helper.from_array(np.zeros(shape, np.float32), "w")]
    graph = helper.make_graph(nodes, "g", inputs, [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(GraphError, match="gives other bits") if refused else nullcontext():
        read_graph(model.SerializeToString())


def test_an_unknown_application_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"no network 'MobilNet' \(did you mean 'MobileNet'\?\)"):
        write_graph(tmp_path / "graph", mobilenet(application="MobilNet"), "cell", 1)
    assert not (tmp_path / "graph").exists()
