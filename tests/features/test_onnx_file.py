"""Backbones of ONNX files: the features of the file, refusals before work, and the same bits everywhere."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from encoders import write_plain_file
from onnx import TensorProto, helper
from processors import INSTALL, can_emulate, output_of

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.errors import UserError
from aplsmear.features.backbones import cut_network, write_graph
from aplsmear.features.forward import Network
from aplsmear.features.onnx_graph import is_portable, read_graph
from aplsmear.files import sha256
from backbone_graphs import mobilenet
from onnx_files import backbone, convolutions, transformer

IMAGES = np.random.default_rng(5).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)


def of_file(path: Path, layout: str = "NCHW") -> np.ndarray:
    """The output of the file for each image, prepared by hand."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = ((IMAGES / 255 - [0.5, 0.4, 0.6]) / [0.2, 0.25, 0.3]).astype(np.float32)
    x = x.transpose(0, 3, 1, 2) if layout == "NCHW" else x
    return np.concatenate([session.run(None, {"image": each[None]})[0] for each in x])


def of_graph(path: Path, **changed: object) -> np.ndarray:
    """The features of the images by the graph that the stage `bottleneck` writes."""
    graph = path.with_name("cell.onnx")
    assert write_graph(graph, backbone(path, **changed), "cell", 1)
    (found,) = Network(graph, ["features"]).features(IMAGES)
    return found.astype(np.float32)


@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_features_of_convolutions_are_the_mean_of_the_map_that_the_file_gives(tmp_path, layout, batch):
    path = convolutions(tmp_path / "own.onnx", layout, batch)
    expected = of_file(path, layout).mean(axis=(2, 3) if layout == "NCHW" else (1, 2))
    assert expected.std() > 0.01
    np.testing.assert_allclose(of_graph(path, layout=layout), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize("pooling", ["class", "class+patches", "patches"])
def test_features_of_a_transformer_are_its_class_token_and_the_mean_of_its_patches(tmp_path, pooling, batch):
    path = transformer(tmp_path / "own.onnx", batch)
    tokens = of_file(path)
    parts = {"class": tokens[:, 0], "patches": tokens[:, 1:].mean(axis=1)}
    expected = np.concatenate([parts[each] for each in pooling.split("+")], axis=1)
    assert expected.std() > 0.01
    np.testing.assert_allclose(of_graph(path, pooling=pooling), expected, rtol=2e-3, atol=1e-3)


def test_a_network_of_keras_has_the_same_features_from_its_onnx_file(tmp_path):
    """The file is written by other code than the graph of the Keras network."""
    start_tensorflow()
    keras = mobilenet(layer=["conv_pw_2_relu"])
    write_graph(tmp_path / "keras.onnx", keras, "cell", 1)
    write_plain_file(tmp_path / "own.onnx", cut_network(keras, "cell", 1)[0], 32)
    table = {"layout": "NHWC", "mean": [0.5] * 3, "std": [0.5] * 3}
    file = backbone(tmp_path / "own.onnx", layer=keras.layer, **table)
    write_graph(tmp_path / "file.onnx", file, "cell", 1)
    one, other = (
        Network(tmp_path / name, keras.layer).features(IMAGES)[0] for name in ("keras.onnx", "file.onnx")
    )
    assert one.std() > 1e-3
    np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-5)


def test_a_tensor_inside_the_file_is_a_layer_and_several_layers_stand_behind_one_another(tmp_path):
    path = convolutions(tmp_path / "own.onnx")
    inside = next(node.output[0] for node in onnx.load(path).graph.node if node.op_type == "Relu")
    layers = ["features", inside.strip("/").replace("/", ".")]
    graph = tmp_path / "cell.onnx"
    write_graph(graph, backbone(path, layer=["+".join(layers)]), "cell", 1)
    single = [Network(graph, [layer]).features(IMAGES)[0] for layer in layers]
    (joint,) = Network(graph, ["+".join(layers)]).features(IMAGES)
    assert [each.shape[1] for each in single] == [24, 36]
    np.testing.assert_array_equal(joint, np.hstack(single))


def changed(path: Path, change) -> Path:
    """A copy of a file with a change."""
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def outside(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="/etc/hostname")


def of_terabytes(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "wide"
    model.graph.initializer.append(
        helper.make_tensor("pads", TensorProto.INT64, [8], [0, 0, 10**6, 10**6] * 2)
    )
    model.graph.node.insert(0, helper.make_node("Pad", ["image", "pads"], ["wide"]))


def node_of(kind: str, domain: str = ""):
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(kind, ["features"], ["more"], domain=domain))

    return change


def of_one_size(model: onnx.ModelProto) -> None:
    for side in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.dim_value = 32


def without_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8


@pytest.mark.parametrize(
    ("change", "row", "message"),
    [
        (
            lambda model: model.opset_import[0].__setattr__("version", 7),
            {},
            "opset 7: export it with an opset",
        ),
        (outside, {}, "weights lie in another file: put them into one file, with `python -c"),
        (of_terabytes, {}, "above 268,435,456 numbers: export the network for images of one size"),
        (node_of("Loop"), {}, r"that no backbone may have \(Loop\): export the network for inference"),
        (node_of("Relu", "com.vendor"), {}, r"outside of the ONNX standard \(com.vendor\): export it again"),
        (without_batch, {}, "takes 8 images at once: export it with a free batch, or a batch of 1"),
        (None, {"layer": ["feature"]}, "no output 'feature' .did you mean 'features'.* it has features"),
        (None, {"pooling": "class"}, "shape images x 24 x .*: write `pooling: map`, or choose another"),
        (of_one_size, {"layout": "NHWC"}, "32 colours in the layout NHWC, not 3: write the other `layout`"),
        (None, {"sha256": "0" * 64}, "another SHA-256 than in params.yaml"),
        (None, {"weights": "nowhere.onnx"}, "no weight file at 'nowhere.onnx'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_what_to_change(tmp_path, change, row, message):
    path = convolutions(tmp_path / "own.onnx")
    if change:
        changed(path, change)
    with pytest.raises(UserError, match=message):
        write_graph(tmp_path / "cell.onnx", backbone(path, **row), "cell", 1)
    assert not (tmp_path / "cell.onnx").exists()


def test_a_damaged_file_ends_with_a_message(tmp_path):
    content = transformer(tmp_path / "own.onnx").read_bytes()
    path = tmp_path / "damaged.onnx"
    random = np.random.default_rng(4)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, 4000, 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            write_graph(tmp_path / "cell.onnx", backbone(path, pooling="class"), "cell", 1)
        except UserError:  # another error would be a mistake of the program
            refused += 1
    assert refused > 20


def test_other_sizes_and_tokens_than_those_of_the_file_are_refused(tmp_path):
    path = transformer(tmp_path / "own.onnx")
    for row, message in (
        ({"input_size": {"cell": 64, "smear": 64}}, "32 x 32 px: write `input_size: {cell: 32, smear: 32}`"),
        ({"tokens": 5}, "17 tokens; without 5 they are no square of patches: write `tokens: 1`"),
        ({"tokens": 0, "pooling": "class"}, "17 tokens; without 0"),
    ):
        with pytest.raises(UserError, match=message):
            write_graph(tmp_path / "cell.onnx", backbone(path, **{"pooling": "patches"} | row), "cell", 1)


def test_a_file_is_no_network_to_train(tmp_path):
    path = transformer(tmp_path / "own.onnx")
    with pytest.raises(UserError, match=r"frozen and cannot be trained: .*`source: keras\.applications`"):
        cut_network(backbone(path), "cell", 1)


def test_the_bytes_of_a_graph_are_the_same_each_time_and_a_stranger_can_read_it(tmp_path):
    path = transformer(tmp_path / "own.onnx")
    graphs = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for graph in graphs:
        write_graph(graph, backbone(path, pooling="class"), "cell", 1)
    assert sha256(graphs[0]) == sha256(graphs[1])
    assert is_portable(read_graph(graphs[0].read_bytes()))


def test_a_network_whose_bits_depend_on_the_processor_is_marked_and_works(tmp_path):
    """Its softmax is not over the last axis."""
    path = changed(convolutions(tmp_path / "own.onnx"), softmax_over_channels)
    graph = tmp_path / "cell.onnx"
    assert not write_graph(graph, backbone(path), "cell", 1)
    (found,) = Network(graph, ["features"]).features(IMAGES)
    np.testing.assert_allclose(found, of_file(path).mean(axis=(2, 3)), rtol=2e-3, atol=1e-3)


def softmax_over_channels(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Softmax", ["before"], ["features"], axis=1))


DIGESTS = """
import hashlib, sys
import numpy as np
import onnxruntime
for path in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    print(hashlib.sha256(session.run(None, {"pixels": images})[0].tobytes()).hexdigest())
"""


@pytest.mark.skipif(not can_emulate(), reason=INSTALL)
def test_emulated_processors_give_the_same_bits(tmp_path):
    graphs = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    files = convolutions(tmp_path / "one.onnx"), transformer(tmp_path / "two.onnx")
    for graph, file, pooling in zip(graphs, files, ("map", "class+patches"), strict=True):
        write_graph(graph, backbone(file, pooling=pooling), "cell", 1)
    here = output_of(DIGESTS, *map(str, graphs))
    assert output_of(DIGESTS, *map(str, graphs), processor="Haswell") == here
