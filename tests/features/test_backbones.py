"""Frozen networks cut at named layers: features are those of plain Keras, and the same in every process."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.features import backbones
from aplsmear.features.backbones import (
    BackboneError,
    ForwardPass,
    ahead,
    batch_of,
    build_backbone,
    features_of,
)
from aplsmear.images.reading import decode, encode_jpeg, resize
from aplsmear.images.view_store import View
from aplsmear.params import Backbone

# Keras 3.15 on NumPy 2, when it saves weights.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

SRC = str(Path(__file__).parents[2] / "src")
# Real weights, where the workplace has them; they are no part of the repository.
WEIGHTS = Path(os.environ.get("APLSMEAR_TEST_WEIGHTS", Path(__file__).parents[3] / "shared" / "weights"))
CUT = WEIGHTS / "mobilenet_1_0_224_imagenet_to_conv_pw_12.weights.h5"
FULL = WEIGHTS / "mobilenet_2_5_224_tf_no_top.h5"


@pytest.fixture(scope="module", autouse=True)
def keras():
    start_tensorflow()
    import keras

    return keras


def mobilenet(**changed: object) -> Backbone:
    plain = {
        "application": "MobileNet",
        "options": {"alpha": 0.25},
        "input_size": {"cell": 32, "smear": 48},
        "layer": ["conv_pw_1_relu", "conv_pw_2_relu"],
        "weights": "none",
        "batch": 4,
    }
    return Backbone(**plain | changed)


def pictures(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def views(count: int, size: int = 32) -> list[View]:
    return [View(str(n), 0, encode_jpeg(image)) for n, image in enumerate(pictures(count, size))]


def features(settings: Backbone, found: list[View], level: str = "cell") -> list[np.ndarray]:
    """All rows of each layer, float16."""
    batches = [found[start : start + settings.batch] for start in range(0, len(found), settings.batch)]
    rows = list(features_of(iter(batches), settings, level, 1))
    assert [len(batch[0]) for batch in rows] == [len(batch) for batch in batches]
    return [np.concatenate(layer) for layer in zip(*rows, strict=True)]


def by_hand(full: object, layer: str, images: np.ndarray, keras: object) -> np.ndarray:
    """The mean over the image of what a plain Keras sub-model gives."""
    sub = keras.Model(full.input, full.get_layer(layer).output)
    prepared = keras.applications.mobilenet.preprocess_input(images.astype(np.float32))
    return np.asarray(sub(prepared, training=False)).mean(axis=(1, 2))


def test_cut_at_a_layer_it_is_the_plain_sub_model_pooled_by_hand(keras, tmp_path):
    keras.utils.set_random_seed(5)
    full = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.25, input_shape=(32, 32, 3))
    full.save_weights(tmp_path / "full.weights.h5")
    found = views(6)
    images = np.stack([decode(view.image) for view in found])
    settings = mobilenet(weights=str(tmp_path / "full.weights.h5"))
    for layer, rows in zip(settings.layer, features(settings, found), strict=True):
        expected = by_hand(full, layer, images, keras)
        assert rows.dtype == np.float16
        assert expected.std() > 1e-3
        np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-6)


def test_a_view_of_another_size_is_scaled(keras):
    large = views(2, size=40)
    small = np.stack([resize(decode(view.image), 32) for view in large])
    network = build_backbone(mobilenet(), "cell", 1)
    (rows, _) = features(mobilenet(), large)
    np.testing.assert_array_equal(rows, np.asarray(network(small)["conv_pw_1_relu"]).astype(np.float16))


def test_a_row_does_not_depend_on_the_batch_that_it_is_in():
    found = views(7)
    whole, single = features(mobilenet(batch=7), found), features(mobilenet(batch=3), found)
    for one, other in zip(whole, single, strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_named_together_stand_behind_one_another():
    found = views(3)
    early, late = features(mobilenet(), found)
    (both,) = features(mobilenet(layer=["conv_pw_2_relu+conv_pw_1_relu"]), found)
    np.testing.assert_array_equal(both, np.hstack([late, early]))


def test_a_batch_of_smears_has_no_more_pixels_than_one_of_cells():
    settings = mobilenet(batch=8, input_size={"cell": 32, "smear": 64})
    assert (batch_of(settings, "cell"), batch_of(settings, "smear")) == (8, 2)
    assert batch_of(mobilenet(batch=1), "smear") == 1


def test_untrained_filters_are_those_of_the_seed_and_the_same_on_both_levels():
    networks = [
        build_backbone(mobilenet(), level, seed) for level, seed in (("cell", 1), ("smear", 1), ("cell", 2))
    ]
    cell, smear, other = ([np.asarray(weight) for weight in network.weights] for network in networks)
    assert all((a == b).all() for a, b in zip(cell, smear, strict=True))
    assert any((a != b).any() for a, b in zip(cell, other, strict=True))
    assert not any(network.trainable_weights for network in networks)


def test_layers_that_keras_numbers_have_the_same_names_each_time():
    """Xception's `conv2d` would be `conv2d_4` in the second network of a process."""
    settings = mobilenet(
        application="Xception", options={}, input_size={"cell": 71, "smear": 71}, layer=["conv2d"]
    )
    for level in ("cell", "smear"):
        assert list(build_backbone(settings, level, 1).output) == ["conv2d"]


@pytest.mark.parametrize("application", ["MobileNetV3Small", "EfficientNetB0"])
def test_applications_with_preprocessing_inside_are_found(application):
    settings = mobilenet(application=application, options={}, layer=["rescaling"])
    network = build_backbone(settings, "cell", 1)
    assert network(pictures(1, 32))["rescaling"].shape == (1, 3)


def test_threads_and_processes_change_no_bit(tmp_path):
    """The forward pass in two new processes, with one thread and with two."""
    code = """
import hashlib, sys
import numpy as np
from aplsmear.features.backbones import features_of
from aplsmear.images.reading import encode_jpeg
from aplsmear.params import Backbone
from aplsmear.compute.runtime import start_tensorflow
from aplsmear.images.view_store import View
start_tensorflow(int(sys.argv[1]))
images = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
views = [View(str(n), 0, encode_jpeg(image)) for n, image in enumerate(images)]
settings = Backbone.model_validate_json(sys.argv[2])
(rows,) = features_of(iter([views]), settings, "cell", 1)
print(hashlib.sha256(b"".join(layer.tobytes() for layer in rows)).hexdigest())
"""
    settings = mobilenet(batch=6)
    environment = os.environ | {"PYTHONPATH": SRC}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, threads, settings.model_dump_json()],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in "12"
    ]
    digests = [each.communicate()[0].strip() for each in running]
    here = hashlib.sha256(b"".join(rows.tobytes() for rows in features(settings, views(6)))).hexdigest()
    assert digests == [here, here]


def test_two_devices_share_a_batch_and_half_precision_is_nearly_the_same():
    """In a process of its own: devices are divided before TensorFlow does anything else, and oneDNN cannot
    convolve in half precision on this CPU."""
    code = """
import sys
import numpy as np
import tensorflow as tf
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
from aplsmear.features.backbones import ForwardPass, ahead
from aplsmear.images.reading import encode_jpeg
from aplsmear.params import Backbone
from aplsmear.compute.runtime import start_tensorflow
from aplsmear.images.view_store import View
start_tensorflow()
images = np.random.default_rng(1).integers(0, 256, (11, 32, 32, 3)).astype(np.uint8)
views = [View(str(n), 0, encode_jpeg(image)) for n, image in enumerate(images)]
two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert two.num_replicas_in_sync == 2

def features(batch, precision="auto", strategy=None):
    settings = Backbone.model_validate_json(sys.argv[1])
    settings = settings.model_copy(update={"batch": batch, "precision": precision})
    batches = [views[start : start + batch] for start in range(0, len(views), batch)]
    rows = list(ahead(ForwardPass(settings, "cell", 1, strategy=strategy), batches))
    return [np.concatenate(layer) for layer in zip(*rows)]

alone = features(5)
for batch in (5, 1):  # neither is the same for both devices
    for one, other in zip(alone, features(batch, strategy=two)):
        np.testing.assert_array_equal(one, other)
for one, other in zip(alone, features(5, "on", two)):
    assert other.dtype == np.float16
    assert (one != other).any()  # or it was not half precision
    np.testing.assert_allclose(one, other, rtol=0.02, atol=0.02)
assert keras.config.dtype_policy().name == "float32"
"""
    environment = os.environ | {"PYTHONPATH": SRC, "TF_ENABLE_ONEDNN_OPTS": "0"}
    subprocess.run([sys.executable, "-c", code, mobilenet().model_dump_json()], env=environment, check=True)


def test_half_precision_where_it_does_not_run_is_an_error_that_says_what_to_change():
    with pytest.raises(BackboneError, match=r"half precision here .*`precision`"):
        features(mobilenet(precision="on"), views(1))


def test_a_batch_that_memory_does_not_hold_is_halved_until_it_fits(monkeypatch):
    found = views(9)
    whole = features(mobilenet(batch=9), found)
    tried = short_of_memory(monkeypatch, fits=2)
    for one, other in zip(whole, ForwardPass(mobilenet(batch=9), "cell", 1)(found), strict=True):
        np.testing.assert_array_equal(one, other)
    assert tried == [9, 5, 3, 2]


def test_an_image_that_memory_does_not_hold_is_an_error_that_says_what_to_change(monkeypatch):
    short_of_memory(monkeypatch, fits=0)
    with pytest.raises(BackboneError, match=r"one image of 32 px does not fit .*input_size"):
        ForwardPass(mobilenet(), "cell", 1)(views(3))


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: int) -> list[int]:
    """Networks run out of memory above so many images; the sizes that were tried."""
    import tensorflow as tf

    build, tried = backbones.build_backbone, []

    def building(*arguments: object) -> object:
        network = build(*arguments)

        def run(images: object, training: bool) -> object:
            tried.append(len(images))
            if tried[-1] > fits:
                raise tf.errors.ResourceExhaustedError(None, None, "no memory")
            return network(images, training=training)

        return run

    monkeypatch.setattr(backbones, "build_backbone", building)
    return tried


def test_views_are_decoded_no_further_ahead_than_there_are_threads():
    found = views(60)
    taken = 0

    def batches():
        nonlocal taken
        for start in range(0, len(found), 2):
            taken += 1
            yield found[start : start + 2]

    rows = ahead(ForwardPass(mobilenet(batch=2), "cell", 1), batches())
    next(rows)
    assert taken <= 5


def test_weights_of_the_network_up_to_the_deepest_layer_are_loaded(keras, tmp_path):
    full = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.25, input_shape=(32, 32, 3))
    cut = keras.Model(full.input, full.get_layer("conv_pw_2_relu").output)
    cut.save_weights(tmp_path / "cut.weights.h5")
    found = views(2)
    images = np.stack([decode(view.image) for view in found])
    settings = mobilenet(weights=str(tmp_path / "cut.weights.h5"))
    rows = features(settings, found)[1]
    np.testing.assert_allclose(rows, by_hand(full, "conv_pw_2_relu", images, keras), rtol=1e-3, atol=1e-6)

    # Another file in its place is no longer the one that params.yaml means.
    held = hashlib.sha256((tmp_path / "cut.weights.h5").read_bytes()).hexdigest()
    build_backbone(settings.model_copy(update={"sha256": held}), "cell", 1)
    with pytest.raises(BackboneError, match=rf"another file .* by its sha256 \(0000.*sha256: {held}`"):
        build_backbone(settings.model_copy(update={"sha256": "0" * 64}), "cell", 1)


@pytest.mark.skipif(not (CUT.exists() and FULL.exists()), reason="the real weights are not here")
def test_real_weights_of_a_whole_and_of_a_cut_network(keras):
    found = views(2, size=64)
    images = np.stack([decode(view.image) for view in found])
    sizes = {"cell": 64, "smear": 64}
    for path, alpha, layer in ((CUT, 1.0, "conv_pw_12_relu"), (FULL, 0.25, "conv_pw_6_relu")):
        settings = mobilenet(options={"alpha": alpha}, input_size=sizes, layer=[layer], weights=str(path))
        (rows,) = features(settings, found)
        full = keras.applications.MobileNet(
            include_top=False, weights=None, alpha=alpha, input_shape=(64, 64, 3)
        )
        saved = keras.Model(full.input, full.get_layer(layer).output) if path == CUT else full
        saved.load_weights(path)
        np.testing.assert_allclose(rows, by_hand(full, layer, images, keras), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"application": "MobilNet"}, "no 'MobilNet' .did you mean 'MobileNet'"),
        ({"application": "mobilenet"}, "no 'mobilenet'"),
        ({"application": "preprocess_input"}, "no 'preprocess_input'"),
        (
            {"layer": ["conv_pw_1_rel", "nope"]},
            "(?s)no layer 'conv_pw_1_rel' .did you mean 'conv_pw_1_relu'.*'nope'",
        ),
        ({"options": {"alfa": 1}}, "cannot build MobileNet so: .*alfa"),
        ({"options": {"weights": "imagenet"}}, "cannot set weights"),
        ({"application": "Xception", "options": {}}, "cannot build Xception so: .*71"),
        ({"application": "DenseNet121", "options": {"pooling": "avg"}, "layer": ["avg_pool"]}, "not a map"),
        ({"weights": "nowhere.h5"}, "no weight file at 'nowhere.h5'"),
    ],
)
def test_what_keras_does_not_have_is_said(changed, said):
    with pytest.raises(BackboneError, match=said):
        build_backbone(mobilenet(**changed), "cell", 1)


def test_weights_that_do_not_fit_are_an_error(keras, tmp_path):
    (tmp_path / "text.weights.h5").write_text("no weights")
    full = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.5, input_shape=(32, 32, 3))
    full.save_weights(tmp_path / "wide.weights.h5")  # as many tensors, of other shapes
    shallow = keras.Model(full.input, full.get_layer("conv_pw_1_relu").output)
    shallow.save_weights(tmp_path / "shallow.weights.h5")
    for name, said in (("text", "do not fit"), ("wide", "do not fit"), ("shallow", "it holds 15 tensors")):
        with pytest.raises(BackboneError, match=said):
            build_backbone(mobilenet(weights=str(tmp_path / f"{name}.weights.h5")), "cell", 1)


def test_features_that_float16_cannot_hold_are_an_error(keras, tmp_path):
    full = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.25, input_shape=(32, 32, 3))
    layer = full.get_layer("conv_pw_1_bn")
    gamma, beta, *moving = layer.get_weights()
    layer.set_weights([gamma, beta + 1e9, *moving])
    full.save_weights(tmp_path / "huge.weights.h5")
    settings = mobilenet(weights=str(tmp_path / "huge.weights.h5"), layer=["conv_pw_1_bn"])
    with pytest.raises(BackboneError, match="beyond float16"):
        features(settings, views(1))
