"""Maps of what a score depends on, compared with scores and networks whose answer is known."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from aplsmear.finetune import explain as explain_module
from aplsmear.finetune.explain import draw, examples, grad_cam, occlusion, write_explanations

SHAPE = (40, 72)  # not square: a transposed map cannot pass
BLOCK = (slice(8, 16), slice(48, 56))


@pytest.fixture
def image() -> np.ndarray:
    """Grey, with one red block; the score of a smear is how red this block is."""
    made = np.full((*SHAPE, 3), 90, np.uint8)
    made[BLOCK] = (250, 20, 20)
    return made


def redness(images: np.ndarray) -> np.ndarray:
    return images[:, *BLOCK, 0].mean(axis=(1, 2)) / 255


def mass_on(found: np.ndarray, mask: np.ndarray) -> float:
    """Share of a map's positive values that lies on a mask, divided by the share expected by chance."""
    positive = np.maximum(found, 0)
    return positive[mask].sum() / positive.sum() / mask.mean()


def test_occlusion_peaks_on_the_one_block_that_counts(image: np.ndarray) -> None:
    found = occlusion(redness, image, patch=8, stride=4)
    assert found.shape == SHAPE
    peak = np.unravel_index(found.argmax(), SHAPE)
    assert 8 <= peak[0] < 16
    assert 48 <= peak[1] < 56
    assert found[:, :40].max() == 0
    assert mass_on(found, np.pad(np.ones((8, 8), bool), ((8, 24), (48, 16)))) > 10


def test_occlusion_is_negative_where_a_part_lowers_the_score(image: np.ndarray) -> None:
    assert occlusion(lambda images: 1 - redness(images), image, patch=8, stride=4).min() < -0.3


def test_a_constant_score_gives_a_map_of_zeros_up_to_every_edge(image: np.ndarray) -> None:
    found = occlusion(lambda images: np.zeros(len(images)), image, patch=16, stride=7)
    assert np.isfinite(found).all()
    assert (found == 0).all()


def test_grad_cam_peaks_where_the_deciding_channel_is_and_not_on_another(image: np.ndarray) -> None:
    import tensorflow as tf

    image[24:32, 8:16] = (20, 20, 250)  # blue, which lowers the logit

    def maps(images: tf.Tensor) -> tf.Tensor:
        return tf.nn.avg_pool2d(tf.cast(images, tf.float32) / 255 - 0.35, 4, 4, "VALID")

    def judge(found: tf.Tensor) -> tf.Tensor:
        means = tf.reduce_mean(found, axis=(1, 2))
        return means[:, :1] - means[:, 2:]

    found = grad_cam(maps, judge, image)
    assert found.shape == SHAPE
    assert (found >= 0).all()
    peak = np.unravel_index(found.argmax(), SHAPE)
    assert 8 <= peak[0] < 16
    assert 48 <= peak[1] < 56
    assert found[24:32, 8:16].max() == 0


def test_a_picture_has_the_same_bytes_each_time(image: np.ndarray, tmp_path: Path) -> None:
    found = occlusion(redness, image, patch=8, stride=4)
    for name in ("a.png", "b.png"):
        title = "blast, true positive: 17, held-out probability 0.812\npatient P7, fold 2"
        draw(tmp_path / name, image, found, np.abs(found), title, (0.5, 0.5))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_all_pictures_have_one_scale_and_name_task_patient_and_fold(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scale of its own, a picture on which nothing matters looks like one on which much does."""
    seen = []
    found = image[..., 0] / 250
    maps = iter([(found, 2 * found), (found / 20, found / 9)])
    trainer = SimpleNamespace(network=SimpleNamespace(whole=SimpleNamespace(input=image[None])))
    monkeypatch.setattr(explain_module, "plain_views", lambda *words: dict.fromkeys(words[1], b""))
    monkeypatch.setattr(explain_module, "with_weights", lambda *_: trainer)
    monkeypatch.setattr(explain_module, "decode", lambda _: image)
    monkeypatch.setattr(explain_module, "explain", lambda *_: next(maps))
    monkeypatch.setattr(explain_module, "draw", lambda *words: seen.append(words))
    rows = [("true_positive", "a", "P1", 0, 0.9), ("false_positive", "b", "P2", 1, 0.8)]
    chosen = pd.DataFrame(rows, columns=["outcome", "item", "patient", "fold", "probability"])
    trained = [SimpleNamespace(outer_fold=fold) for fold in (0, 1)]
    write_explanations({}, trained, chosen, tmp_path, tmp_path / "explanations", "blast")
    assert seen[0][-1] == seen[1][-1] == pytest.approx((1, 2))
    assert seen[1][-2] == "blast, false positive: b, held-out probability 0.800\npatient P2, fold 1"


def test_on_drawn_cells_the_maps_lie_on_auer_rods_more_than_expected_by_chance() -> None:
    from networks import keras_network
    from sklearn.linear_model import LogisticRegression

    from aplsmear.finetune.network import HeadDesign, build_network, set_head
    from aplsmear.heads.head import Head, Recipe
    from aplsmear.images.reading import resize
    from aplsmear.params import read_params
    from aplsmear.sources.drawn import draw_smear, sample_patient

    name = "conv_pw_3_relu"
    backbone = read_params(Path(__file__).parents[2] / "params.yaml").backbones["mobilenet"]
    backbone = backbone.model_copy(update={"layer": [name]})
    cells = []
    for number in range(40):
        rng = np.random.default_rng([5, number])
        smear = draw_smear(sample_patient("apl", rng), rng, (480, 640), 20)
        for cell in smear.cells:
            y0, x0, y1, x1 = cell.box
            seen = resize(smear.image[y0:y1, x0:x1], 64)
            cells.append((seen, resize(cell.rods.astype(np.uint8) * 255, 64) > 127))
    images = np.stack([image for image, _ in cells])
    label = np.array([mask.any() for _, mask in cells])
    features = keras_network(backbone, "cell", 1).predict(images, verbose=0)[name]
    train = np.arange(len(cells)) % 2 == 0
    mean, scale = features[train].mean(axis=0), features[train].std(axis=0) + 1e-3
    fit = LogisticRegression(class_weight="balanced").fit((features[train] - mean) / scale, label[train])
    kernel = (fit.coef_.T / scale[:, None]).astype(np.float32)
    head = Head(name, (kernel,), ((fit.intercept_ - mean @ kernel).astype(np.float32),))
    recipe = Recipe(f"mobilenet/{name}", 0, 0, 1, "relu", 0, 1e-3, "constant", 0, 0, 0, 0, 8, 1)
    network = build_network(backbone, "cell", HeadDesign(recipe, features.shape[1]), 1, 1)
    set_head(network, head, mean, scale)

    ratios = []
    for place in np.flatnonzero(~train & label)[:12]:
        occluded = occlusion(lambda x: network.whole(x).numpy()[:, 0], images[place], 10, 5)
        cam = grad_cam(
            lambda x: network.backbone.blocks(network.backbone.trunk(x)), network.judge, images[place]
        )
        ratios.append([mass_on(occluded, cells[place][1]), mass_on(cam, cells[place][1])])
    measured = np.mean(ratios, axis=0)
    assert (measured > 1.1).all(), measured  # occlusion 1.75, Grad-CAM 1.25


def test_the_clearest_hits_and_errors_are_drawn_and_their_number_is_limited() -> None:
    probability = [0.95, 0.9, 0.1, 0.92, 0.05, 0.08, 0.93, 0.97, 0.2, 0.91, 0.02, 0.06]
    label = [1, 1, 1, 0, 0, 0] * 2
    predictions = pd.DataFrame(
        {"item": list("abcdefghijkl"), "fold": [0] * 6 + [1] * 6, "label": label, "probability": probability}
    )
    chosen = examples(predictions, 1).set_index("outcome")["item"].to_dict()
    assert chosen == {
        "true_positive": "h",
        "false_positive": "d",
        "false_negative": "c",
        "true_negative": "k",
    }
    assert len(examples(predictions, 2)) == 7  # only one positive item scores low
