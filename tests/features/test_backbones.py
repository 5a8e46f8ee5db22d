"""Frozen networks cut at named layers: features are those of plain Keras, and the same in every process."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from aplsmear.errors import UserError
from aplsmear.features.backbones import cut_network
from aplsmear.images.reading import decode
from backbone_graphs import features, mobilenet, views

# Keras 3.15 on NumPy 2, when it saves weights.
pytestmark = [
    pytest.mark.usefixtures("keras"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]

SRC = str(Path(__file__).parents[2] / "src")
# Real weights, where the workplace has them; they are no part of the repository.
WEIGHTS = Path(os.environ.get("APLSMEAR_TEST_WEIGHTS", Path(__file__).parents[3] / "shared" / "weights"))
CUT = WEIGHTS / "mobilenet_1_0_224_imagenet_to_conv_pw_12.weights.h5"
FULL = WEIGHTS / "mobilenet_2_5_224_tf_no_top.h5"


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
    for layer, rows in zip(settings.layer, features(settings, found, tmp_path), strict=True):
        expected = by_hand(full, layer, images, keras)
        assert rows.dtype == np.float16
        assert expected.std() > 1e-3
        np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-6)


def test_weights_of_the_network_up_to_the_deepest_layer_are_loaded(keras, tmp_path):
    full = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.25, input_shape=(32, 32, 3))
    cut = keras.Model(full.input, full.get_layer("conv_pw_2_relu").output)
    cut.save_weights(tmp_path / "cut.weights.h5")
    found = views(2)
    images = np.stack([decode(view.image) for view in found])
    settings = mobilenet(weights=str(tmp_path / "cut.weights.h5"))
    rows = features(settings, found, tmp_path)[1]
    np.testing.assert_allclose(rows, by_hand(full, "conv_pw_2_relu", images, keras), rtol=1e-3, atol=1e-6)

    # Another file in its place is no longer the one that params.yaml means.
    held = hashlib.sha256((tmp_path / "cut.weights.h5").read_bytes()).hexdigest()
    cut_network(settings.model_copy(update={"sha256": held}), "cell", 1)
    with pytest.raises(UserError, match=rf"another SHA-256 .*\(0000.*sha256: {held}`"):
        cut_network(settings.model_copy(update={"sha256": "0" * 64}), "cell", 1)


@pytest.mark.skipif(not (CUT.exists() and FULL.exists()), reason="the real weights are not here")
def test_real_weights_of_a_whole_and_of_a_cut_network(keras, tmp_path):
    found = views(2, size=64)
    images = np.stack([decode(view.image) for view in found])
    sizes = {"cell": 64, "smear": 64}
    for path, alpha, layer in ((CUT, 1.0, "conv_pw_12_relu"), (FULL, 0.25, "conv_pw_6_relu")):
        settings = mobilenet(options={"alpha": alpha}, input_size=sizes, layer=[layer], weights=str(path))
        (rows,) = features(settings, found, tmp_path)
        full = keras.applications.MobileNet(
            include_top=False, weights=None, alpha=alpha, input_shape=(64, 64, 3)
        )
        saved = keras.Model(full.input, full.get_layer(layer).output) if path == CUT else full
        saved.load_weights(path)
        np.testing.assert_allclose(rows, by_hand(full, layer, images, keras), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"application": "MobilNet"}, "no network 'MobilNet' .did you mean 'MobileNet'"),
        ({"application": "mobilenet"}, "no network 'mobilenet'"),
        ({"application": "preprocess_input"}, "no network 'preprocess_input'"),
        (
            {"layer": ["conv_pw_1_rel", "nope"]},
            "(?s)no layer 'conv_pw_1_rel' .did you mean 'conv_pw_1_relu'.*'nope'",
        ),
        ({"options": {"alfa": 1}}, "cannot build MobileNet so: .*alfa"),
        ({"options": {"weights": "imagenet"}}, "cannot set weights"),
        ({"application": "Xception", "options": {}}, "cannot build Xception so: .*71"),
        ({"weights": "nowhere.h5"}, "no weight file at 'nowhere.h5'"),
    ],
)
def test_what_keras_does_not_have_is_said(changed, said):
    with pytest.raises(UserError, match=said):
        cut_network(mobilenet(**changed), "cell", 1)


def test_a_network_with_a_single_number_among_its_weights_reads_them_from_a_file(keras, tmp_path):
    """EfficientNet's normalisation has a count."""
    full = keras.applications.EfficientNetB0(include_top=False, weights=None, input_shape=(32, 32, 3))
    full.save_weights(tmp_path / "own.weights.h5")
    settings = {"application": "EfficientNetB0", "options": {}, "layer": ["block1a_activation"]}
    cut, _ = cut_network(mobilenet(weights=str(tmp_path / "own.weights.h5"), **settings), "cell", 2)
    np.testing.assert_array_equal(cut.get_layer("stem_conv").kernel, full.get_layer("stem_conv").kernel)


def test_weights_that_do_not_fit_are_an_error(keras, tmp_path):
    (tmp_path / "text.weights.h5").write_text("no weights")
    full = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.5, input_shape=(32, 32, 3))
    full.save_weights(tmp_path / "wide.weights.h5")  # as many tensors, of other shapes
    shallow = keras.Model(full.input, full.get_layer("conv_pw_1_relu").output)
    shallow.save_weights(tmp_path / "shallow.weights.h5")
    for name, said in (("text", "do not fit"), ("wide", "do not fit"), ("shallow", "it has 15 tensors")):
        with pytest.raises(UserError, match=said):
            cut_network(mobilenet(weights=str(tmp_path / f"{name}.weights.h5")), "cell", 1)
