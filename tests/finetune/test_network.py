"""The network that is finetuned: it starts as the frozen model, and heads are averaged exactly."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from networks import keras_network
from scipy.special import softmax

from aplsmear.features.backbones import cut_network
from aplsmear.finetune.network import HeadDesign, Network, block_ends, build_network, join_heads, set_head
from aplsmear.heads.head import Head, layer_sizes, score
from finetunings import BACKBONE, CHANNELS, LAYER, RECIPE, head, images


def build(blocks: int, *design: object, recipe: object = RECIPE) -> Network:
    return build_network(BACKBONE, "cell", HeadDesign(recipe, CHANNELS, *design), blocks, 5)


def test_blocks_are_found_in_networks_of_any_kind() -> None:
    size = {"include_top": False, "weights": None, "input_shape": (32, 32, 3)}
    assert block_ends(keras.applications.MobileNet(**size))[-2:] == ["conv_pw_11_relu", "conv_pw_12_relu"]
    assert block_ends(keras.applications.ResNet50(**size))[-2:] == ["conv5_block1_out", "conv5_block2_out"]
    assert block_ends(keras.applications.DenseNet121(**size))[-1] == "conv5_block15_concat"


@pytest.mark.parametrize(
    ("blocks", "subclasses", "extra", "crop"),
    [
        (1, (1, 1), (0, 0), 1.0),
        (1, (1, 1), (2, 5), 0.5),
        (2, (3, 2), (2, 5), 1.0),
        (99, (1, 1), (0, 0), 1.0),
        (99, (2, 1), (1, 5), 0.7),
    ],
)
def test_before_the_first_epoch_the_network_is_the_frozen_model_with_its_head(
    blocks: int, subclasses: tuple[int, int], extra: tuple[int, int], crop: float
) -> None:
    shown = images()[:6]
    features = keras_network(BACKBONE, "cell", 5)(shown)[LAYER].numpy()
    expected = score(head(), features, np.arange(6))
    network = build(blocks, subclasses, *extra, crop)
    times = 2 if crop < 1 else 1
    mean, scale = features.mean(axis=0), features.std(axis=0) + 0.1
    set_head(network, head(), np.tile(mean, times), np.tile(scale, times))
    np.testing.assert_allclose(network.whole(shown).numpy()[:, 0], expected, atol=1e-5)

    copy = keras.models.model_from_json(network.whole.to_json())  # safe mode: no code in the file
    copy.set_weights(network.whole.get_weights())
    np.testing.assert_array_equal(copy(shown).numpy(), network.whole(shown).numpy())


@pytest.mark.parametrize(("depth", "crop"), [(0, 1.0), (1, 1.0), (2, 1.0), (0, 0.5), (1, 0.5)])
def test_joined_heads_are_the_mean_of_the_tuned_head_and_the_extra_heads(depth: int, crop: float) -> None:
    random = np.random.Generator(np.random.Philox(6))
    sizes = layer_sizes(depth, RECIPE.width, CHANNELS)
    tuned = Head(
        RECIPE.features,
        tuple(random.normal(size=size).astype(np.float32) / 4 for size in sizes),
        tuple(random.normal(size=width).astype(np.float32) for _, width in sizes),
        "gelu",
    )
    network = build(1, (2, 1), 3, 5, crop, recipe=replace(RECIPE, depth=depth))
    shown = random.normal(2, 3, (6, CHANNELS * (2 if crop < 1 else 1))).astype(np.float32)
    set_head(network, tuned, shown.mean(axis=0), shown.std(axis=0) + 0.1)
    extra = network.extras(shown[:, -CHANNELS:]).numpy()
    each = [network.head(shown).numpy(), *np.moveaxis(extra, 1, 0)]
    positive = score(tuned, shown[:, :CHANNELS].astype(np.float16), np.arange(6))
    np.testing.assert_allclose(softmax(each[0], axis=1)[:, 2], positive, atol=2e-2)  # features in float16
    join_heads(network, tuned)
    np.testing.assert_allclose(network.head(shown).numpy(), np.mean(each, axis=0), atol=1e-4)
    assert min(np.abs(a - b).max() for a in each for b in each if a is not b) > 0.01


@pytest.mark.parametrize("blocks", [1, 99])
def test_extra_heads_see_the_centre_crop_of_each_map_in_the_order_of_the_features(blocks: int) -> None:
    shown = images()[:6]
    cut, preprocess = cut_network(BACKBONE, "cell", 5)
    maps = keras.Model(cut.input, [cut.output[layer] for layer in LAYER.split("+")])
    expected = []
    for found in maps(preprocess(shown.astype(np.float32))):
        rim = found.shape[1] // 4
        expected.append(found.numpy()[:, rim:-rim, rim:-rim].mean(axis=(1, 2)))
    network = build(blocks, (1, 1), 2, 5, 0.5)
    centre = network.centre(network.backbone.trunk(shown)).numpy()
    np.testing.assert_allclose(centre, np.concatenate(expected, axis=1), rtol=1e-3, atol=1e-7)
    whole_map = keras_network(BACKBONE, "cell", 5)(shown)[LAYER].numpy()
    assert np.abs(centre - whole_map).max() > 0.001
