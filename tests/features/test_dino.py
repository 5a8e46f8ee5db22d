"""Vision transformers: features of the published networks, graphs, layers, and training of their blocks."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

import finetunings
from aplsmear.dino_variants import VARIANTS, layers_of, variant_of
from aplsmear.errors import UserError
from aplsmear.features.backbones import cut_network
from aplsmear.features.export import as_graph
from aplsmear.features.onnx_graph import PIXELS, read_graph
from aplsmear.finetune.finetuning import build_trainers, finetune, with_weights
from aplsmear.finetune.network import HeadDesign, block_ends, build_network, set_head
from aplsmear.heads.head import Head, Recipe
from aplsmear.params import Backbone
from backbone_graphs import pictures

pytestmark = [
    pytest.mark.usefixtures("keras"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]

TINY = {"width": 32, "depth": 3, "heads": 2, "hidden": 48}


def tiny(application: str = "DINOv2S", **changed: object) -> Backbone:
    patch = VARIANTS[application].patch
    plain = {
        "application": application,
        "options": TINY | ({"grid": 5} if application < "DINOv3" else {}),
        "input_size": {"cell": 4 * patch, "smear": 5 * patch},
        "layer": ["block_0_patches", "class", "patches"],
        "weights": "none",
        "batch": 4,
    }
    return Backbone(**plain | changed)


@pytest.mark.parametrize("application", sorted(["DINOv2S", "DINOv2G", "DINOv3S", "DINOv3SPlus"]))
def test_the_graph_gives_the_features_of_keras_for_one_image_and_for_many(application, keras):
    settings = tiny(application)
    cut, preprocess = cut_network(settings, "cell", 1)
    for weight in cut.weights:
        weight.assign_add(np.random.default_rng(len(weight.path)).normal(0, 0.3, weight.shape))
    images = pictures(3, settings.input_size["cell"])
    expected = cut(preprocess(images.astype(np.float32)), training=False)
    graph = as_graph(cut, preprocess, settings.input_size["cell"]).SerializeToString()
    read_graph(graph)  # raises no error
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for name, found in zip(settings.layer, session.run(settings.layer, {PIXELS: images}), strict=True):
        plain = np.asarray(expected[name]).mean(axis=(1, 2))
        np.testing.assert_allclose(found, plain, atol=2e-5 * np.abs(plain).max())
        one_by_one = [session.run([name], {PIXELS: images[row : row + 1]})[0] for row in range(3)]
        np.testing.assert_array_equal(np.concatenate(one_by_one), found)


def test_layers_are_known_without_keras(keras):
    for application in ("DINOv2G", "DINOv3SPlus"):
        variant = variant_of(application, {"depth": 2, "width": 32, "heads": 2, "hidden": 8})
        names = [each for each in layers_of(variant) if each != "patch_embed"]
        settings = tiny(application, options={"depth": 2, "width": 32, "heads": 2, "hidden": 8}, layer=names)
        cut, _ = cut_network(settings, "cell", 1)
        assert list(cut.output) == names


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"input_size": {"cell": 60, "smear": 70}}, "input_size 60 must be a multiple of 14"),
        ({"options": TINY | {"heads": 5}}, "width .32. must be a multiple of 16 and of heads .5."),
        ({"options": TINY | {"depth": 0}}, "depth must be 1 or more"),
        ({"options": TINY | {"gated": "yes"}}, "gated must be"),
        ({"weights": "imagenet"}, "aplsmear weights convert"),
        ({"layer": ["pathces"]}, "no layer 'pathces' .did you mean 'patches'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed, said):
    with pytest.raises(UserError, match=said):
        cut_network(tiny(**changed), "cell", 1)


def test_blocks_of_a_transformer_are_blocks_of_finetuning(keras):
    cut, _ = cut_network(tiny(layer=["block_0_class", "patches"]), "cell", 1)
    assert block_ends(keras.Model(cut.input, list(cut.output.values())))[-2:] == ["block_0", "block_1"]


@pytest.mark.parametrize(
    ("blocks", "layer"), [(1, "class+patches"), (2, "block_0_patches+class+patches"), (99, "class")]
)
def test_before_the_first_epoch_the_network_is_the_frozen_model_with_its_head(blocks, layer, keras):
    settings = tiny("DINOv3SPlus", layer=[layer])
    channels = 32 * len(layer.split("+"))
    cut, preprocess = cut_network(settings, "cell", 5)
    shown = pictures(4, settings.input_size["cell"])
    maps = cut(preprocess(shown.astype(np.float32)), training=False)
    features = np.hstack([np.asarray(maps[part]).mean(axis=(1, 2)) for part in layer.split("+")])
    random = np.random.default_rng(3)
    head = Head(
        f"net/{layer}",
        (random.normal(size=(channels, 1)).astype(np.float32),),
        (np.zeros(1, np.float32),),
        "gelu",
    )
    recipe = Recipe(f"net/{layer}", 1, 0, 4, "gelu", 0.3, 0.01, "constant", 0.0, 0.5, 0.0, 0.0, 8, 3)
    network = build_network(settings, "cell", HeadDesign(recipe, channels), blocks, 5)
    set_head(network, head, features.mean(axis=0), features.std(axis=0) + 0.1)
    expected = 1 / (1 + np.exp(-(features @ head.kernels[0])))
    np.testing.assert_allclose(network.whole(shown).numpy(), expected, atol=1e-5)
    trained = {path.split("/")[0] for path in network.backbone.depth}
    assert trained >= {"norm", "block_2"}
    assert ("block_1" in trained) == (blocks > 1)
    assert ("tokens" in trained) == (blocks > 3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_uppermost_block_trains_and_the_others_stay(tmp_path, monkeypatch):
    layer = "class+patches"
    backbone = tiny(
        "DINOv3SPlus", options=TINY | {"patch": 8}, input_size={"cell": 32, "smear": 32}, layer=[layer]
    )
    monkeypatch.setattr(finetunings, "BACKBONE", backbone)
    monkeypatch.setattr(finetunings, "LAYER", layer)
    monkeypatch.setattr(finetunings, "RECIPE", replace(finetunings.RECIPE, features=f"net/{layer}"))
    made, starts = finetunings.inputs(tmp_path, epochs=3, rate=0.001, head_rate=0.01)
    trainers = build_trainers(made, starts, tmp_path)
    *_, last = finetune(made, starts, trainers, tmp_path)
    trainer = with_weights(trainers, last)
    blocks = trainer.network.backbone.blocks
    fresh = build_network(backbone, "cell", trainer.network.design, 1, made.seed).backbone.blocks
    moved = {
        new.path
        for old, new in zip(fresh.weights, blocks.weights, strict=True)
        if np.abs(new.numpy() - old.numpy()).max() > 1e-5
    }
    assert {path.split("/")[0] for path in moved} == {"block_2", "norm"}
    assert len(moved) > 10
