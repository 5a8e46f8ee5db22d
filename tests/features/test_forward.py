"""Bottleneck features: the same bytes for any batch and any number of threads, and those of plain Keras."""

import hashlib
from types import SimpleNamespace

import joblib
import numpy as np
import onnxruntime
import pytest
from networks import keras_network
from processors import INSTALL, can_emulate, output_of

from aplsmear.errors import UserError
from aplsmear.features.forward import FeatureRequest, Network, batch_of, features_of
from aplsmear.features.onnx_graph import GraphError
from aplsmear.images.reading import decode, resize
from backbone_graphs import features, mobilenet, pictures, request_of, views

pytestmark = [
    pytest.mark.usefixtures("keras"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]


def test_features_are_those_of_the_plain_keras_network(tmp_path):
    images = pictures(5, 32)
    found = Network(request_of(mobilenet(), tmp_path).graph, mobilenet().layer).features(images)
    expected = keras_network(mobilenet(), "cell", 1)(images)
    for layer, rows in zip(mobilenet().layer, found, strict=True):
        assert rows.dtype == np.float16
        np.testing.assert_allclose(rows, np.asarray(expected[layer]), rtol=1e-3, atol=1e-6)


def test_a_view_of_another_size_is_scaled(tmp_path):
    large = views(2, size=40)
    small = np.stack([resize(decode(view.image), 32) for view in large])
    network = Network(request_of(mobilenet(), tmp_path).graph, ["conv_pw_1_relu"])
    np.testing.assert_array_equal(features(mobilenet(), large, tmp_path)[0], network.features(small)[0])


def test_a_row_does_not_depend_on_the_batch_that_it_is_in(tmp_path):
    found = views(7)
    one_by_one = features(mobilenet(batch=1), found, tmp_path)
    for batch in (3, 7):
        for alone, other in zip(one_by_one, features(mobilenet(batch=batch), found, tmp_path), strict=True):
            np.testing.assert_array_equal(alone, other)


def test_layers_named_together_stand_behind_one_another(tmp_path):
    found = views(3)
    early, late = features(mobilenet(), found, tmp_path)
    (both,) = features(mobilenet(layer=["conv_pw_2_relu+conv_pw_1_relu"]), found, tmp_path)
    np.testing.assert_array_equal(both, np.hstack([late, early]))


def test_a_layer_alone_is_the_same_as_among_others(tmp_path):
    graph, images = request_of(mobilenet(), tmp_path).graph, pictures(2, 32)
    both = Network(graph, mobilenet().layer).features(images)
    (early,) = Network(graph, mobilenet().layer[:1]).features(images)
    np.testing.assert_array_equal(early, both[0])
    with pytest.raises(GraphError, match=r"gives no conv_pw_9_relu; it gives conv_pw_1_relu"):
        Network(graph, ["conv_pw_9_relu"])


def test_a_batch_of_smears_has_no_more_pixels_than_one_of_cells():
    settings = mobilenet(batch=8, input_size={"cell": 32, "smear": 64})
    assert (batch_of(settings, "cell"), batch_of(settings, "smear")) == (8, 2)
    assert batch_of(mobilenet(batch=1), "smear") == 1


IN_A_PROCESS = """
import hashlib, os, pathlib, sys
if sys.argv[1] == "1" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import aplsmear
import numpy as np
from aplsmear.features.forward import FeatureRequest, features_of
from aplsmear.images.reading import encode_jpeg
from aplsmear.images.view_store import View
size = int(sys.argv[3])
images = np.random.default_rng(1).integers(0, 256, (6, size, size, 3)).astype(np.uint8)
views = [View(str(n), 0, encode_jpeg(image)) for n, image in enumerate(images)]
request = FeatureRequest("net", pathlib.Path(sys.argv[2]), "cell", tuple(sys.argv[4:]), 4)
rows = [row for batch in features_of(iter([views[:4], views[4:]]), request) for row in batch]
print(hashlib.sha256(b"".join(layer.tobytes() for layer in rows)).hexdigest())
assert "tensorflow" not in sys.modules
"""


def digest(request: FeatureRequest, size: int, processors: str = "all", processor: str = "") -> str:
    """A hash of the features of six images, from a process of its own."""
    words = [processors, str(request.graph), str(size), *request.layers]
    return output_of(IN_A_PROCESS, *words, processor=processor)


def test_a_new_process_gives_the_same_bytes_without_tensorflow_on_one_processor_and_on_all(tmp_path):
    request, found = request_of(mobilenet(), tmp_path), views(6)
    rows = [row for batch in features_of(iter([found[:4], found[4:]]), request) for row in batch]
    here = hashlib.sha256(b"".join(layer.tobytes() for layer in rows)).hexdigest()
    assert digest(request, 32, "1") == here
    assert digest(request, 32) == here


@pytest.mark.pipeline
@pytest.mark.skipif(not can_emulate(), reason=INSTALL)
@pytest.mark.parametrize(
    ("application", "options", "layer"),
    [
        ("MobileNet", {}, "conv_pw_12_relu"),
        ("MobileNetV2", {"alpha": 0.5}, "block_3_expand_relu"),  # of the demo
        ("EfficientNetB0", {}, "block6a_activation"),
        ("ResNet50", {}, "conv4_block6_out"),
    ],
)
def test_another_processor_gives_the_same_bytes(application, options, layer, tmp_path):
    """One with AVX2 and without AVX-512, emulated. Deep layers, and channels that fill no block of 16."""
    sizes = {"cell": 64, "smear": 64}
    settings = mobilenet(application=application, options=options, layer=[layer], input_size=sizes)
    request = request_of(settings, tmp_path)
    assert digest(request, 64, processor="Haswell") == digest(request, 64)


def test_views_are_not_decoded_far_ahead_of_the_features_that_are_taken(tmp_path):
    found, taken = views(60), 0

    def batches():
        nonlocal taken
        for start in range(0, len(found), 2):
            taken += 1
            yield found[start : start + 2]

    rows = features_of(batches(), request_of(mobilenet(batch=2), tmp_path))
    next(rows)
    assert taken <= 2 * joblib.cpu_count() + 2


@pytest.mark.parametrize("kind", ["Fail", "RuntimeException", "EPFail"])
def test_too_little_memory_is_an_error_that_names_the_batch(kind, monkeypatch, tmp_path):
    """ONNX Runtime raises `Fail` where memory ends, and the others on a GPU; none is a RuntimeError."""
    network = Network(request_of(mobilenet(), tmp_path).graph, mobilenet().layer)

    def run(*_: object) -> None:
        raise getattr(onnxruntime.capi.onnxruntime_pybind11_state, kind)("no memory for 7 bytes\nand more")

    monkeypatch.setattr(network, "_session", SimpleNamespace(run=run))
    with pytest.raises(UserError, match=r"2 images of 32 px .*\(no memory for 7 bytes\): lower `batch`"):
        network.features(pictures(2, 32))


def test_features_that_float16_cannot_hold_are_an_error(keras, tmp_path):
    full = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.25, input_shape=(32, 32, 3))
    layer = full.get_layer("conv_pw_1_bn")
    gamma, beta, *moving = layer.get_weights()
    layer.set_weights([gamma, beta + 1e9, *moving])
    full.save_weights(tmp_path / "huge.weights.h5")
    settings = mobilenet(weights=str(tmp_path / "huge.weights.h5"), layer=["conv_pw_1_bn"])
    with pytest.raises(UserError, match="'conv_pw_1_bn' gives features beyond float16"):
        features(settings, views(1), tmp_path)
