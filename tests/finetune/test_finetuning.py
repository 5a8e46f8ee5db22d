"""Training on with the uppermost blocks: the frozen model first, then no step that a cut could change."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aplsmear.finetune.training import Kinds
from aplsmear.heads.head import Head, Recipe, TrainingItems, score
from aplsmear.params import Backbone, read_params

ROOT = Path(__file__).parents[2]
SETTINGS = read_params(ROOT / "params.yaml").finetune.model_copy(
    update={"blocks": 1, "batch": 8, "views": 1, "epochs": 3, "patience": 0}
)
LAYER = "conv_pw_2_relu+conv_pw_3_relu"
BACKBONE = Backbone(
    application="MobileNet",
    options={"alpha": 0.25},
    input_size={"cell": 32, "smear": 32},
    layer=[LAYER],
    weights="none",
    batch=8,
)
CHANNELS = 64
RECIPE = Recipe(
    f"net/{LAYER}", 1, 1, 4, "gelu", 0.3, 0.01, "constant", 0.0, 0.5, 0.0, 0.0, 8, 3
)  # fmt: skip


def head() -> Head:
    random = np.random.Generator(np.random.Philox(3))
    kernels = random.normal(size=(CHANNELS, 4)), random.normal(size=(4, 1))
    return Head(
        RECIPE.features,
        tuple(each.astype(np.float32) for each in kernels),
        (np.full(4, 0.1, np.float32), np.zeros(1, np.float32)),
        "gelu",
    )


def images() -> np.ndarray:
    return np.random.Generator(np.random.Philox(4)).integers(0, 256, (48, 32, 32, 3)).astype(np.uint8)


def items() -> TrainingItems:
    """Twenty-four items in three folds, each with one augmented view."""
    numbers = np.arange(24)
    return TrainingItems(
        row=2 * numbers,
        views=np.ones(24, np.int64),
        copies=np.ones(24, np.int64),
        label=(numbers % 2).astype(np.int8),
        fold=numbers % 3,
    )


PATIENT = np.arange(24) // 2
TWO = Kinds(items().label.astype(np.int64), (1, 1), PATIENT)
JOINED = {"subclasses": "cell_type", "members": 2, "units": 3, "epochs": 2}


def features() -> np.ndarray:
    """float16 (views, channels), by which a head can tell the classes."""
    random = np.random.Generator(np.random.Philox(5)).normal(size=(48, CHANNELS))
    return (random + np.repeat(items().label, 2)[:, None]).astype(np.float16)


def deepened(folder: Path, cuts: int = 0, strategy: object = None, **changed: object) -> dict[str, object]:
    """Train a small network; `cuts`: after so many epochs by another process, which was killed."""
    from aplsmear.finetune.network import divide
    from aplsmear.finetune.training import Kinds, Run, Trainer, make_store, middles_of
    from aplsmear.images.reading import encode_jpeg
    from aplsmear.images.view_store import View

    settings = SETTINGS.model_copy(update=changed)
    run = Run("inner_0_1", RECIPE, frozenset({0, 1}), 1, settings.epochs)
    several = Kinds(np.arange(24) % 4 // 2 + 2 * items().label, (2, 2), PATIENT)
    kinds, members = (several, (2, 3)) if settings.head.epochs else (TWO, (0, 0))

    middle = settings.head.centre_crop
    read = CHANNELS * (2 if middle < 1 else 1)

    def network() -> object:
        return divide(
            BACKBONE, "cell", LAYER, RECIPE, CHANNELS, settings.blocks, 5, kinds.count, members, middle
        )

    views = [View(str(number // 2), number % 2, encode_jpeg(image)) for number, image in enumerate(images())]
    found: dict[str, object] = {}
    for last in (cuts, 99) if cuts else (99,):
        trainer = Trainer(network, settings, 0.1, strategy)
        store = make_store(folder, iter([views]), np.ones(48, bool), trainer.network, 32, settings.online)
        seen = middles_of(folder / "middles.npy", store, trainer.network) if middle < 1 else features()
        store = replace(store, features=seen.__getitem__)
        trainer.start(head(), np.zeros(read, np.float32), np.ones(read, np.float32))
        for course in trainer.train(run, items(), kinds, store, 7, folder / "run.npz"):
            found = {"loss": course.loss, "auroc": course.auroc, "weights": trainer.weights()}
            if len(course.loss) == last:
                break
    return found


def test_blocks_are_found_in_networks_of_any_kind() -> None:
    import keras

    from aplsmear.finetune.network import block_ends

    size = {"include_top": False, "weights": None, "input_shape": (32, 32, 3)}
    assert block_ends(keras.applications.MobileNet(**size))[-2:] == ["conv_pw_11_relu", "conv_pw_12_relu"]
    assert block_ends(keras.applications.ResNet50(**size))[-2:] == ["conv5_block1_out", "conv5_block2_out"]
    assert block_ends(keras.applications.DenseNet121(**size))[-1] == "conv5_block15_concat"


@pytest.mark.parametrize(
    ("blocks", "members", "kinds", "middle"),
    [
        (1, (0, 0), (1, 1), 1.0),
        (1, (2, 5), (1, 1), 0.5),
        (2, (2, 5), (3, 2), 1.0),
        (99, (0, 0), (1, 1), 1.0),
        (99, (1, 5), (2, 1), 0.7),
    ],
)
def test_before_the_first_epoch_it_is_the_frozen_model_with_its_head(
    blocks: int, members: tuple[int, int], kinds: tuple[int, int], middle: float
) -> None:
    import keras
    from networks import keras_network

    from aplsmear.finetune.network import divide, set_head

    shown = images()[:6]
    features = keras_network(BACKBONE, "cell", 5)(shown)[LAYER].numpy()
    expected = score([head()], features, np.arange(6))[0]
    network = divide(BACKBONE, "cell", LAYER, RECIPE, CHANNELS, blocks, 5, kinds, members, middle)
    times = 2 if middle < 1 else 1
    set_head(
        network, head(), np.tile(features.mean(axis=0), times), np.tile(features.std(axis=0) + 0.1, times)
    )
    np.testing.assert_allclose(network.whole(shown).numpy()[:, 0], expected, atol=1e-5)

    copy = keras.models.model_from_json(network.whole.to_json())  # safe mode: no code in the file
    copy.set_weights(network.whole.get_weights())
    np.testing.assert_array_equal(copy(shown).numpy(), network.whole(shown).numpy())


@pytest.mark.parametrize(("cuts", "head"), [(2, {}), (1, JOINED), (1, JOINED | {"centre_crop": 0.5})])
def test_cut_off_after_any_epoch_it_ends_with_the_same_bits(
    cuts: int, head: dict[str, object], tmp_path: Path
) -> None:
    changed = {"head": SETTINGS.head.model_copy(update=head)}
    peaceful = deepened(tmp_path / "peaceful", **changed)
    cut = deepened(tmp_path / "cut", cuts=cuts, **changed)
    assert cut["loss"] == peaceful["loss"]
    assert cut["auroc"] == peaceful["auroc"]
    for ours, theirs in zip(cut["weights"], peaceful["weights"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_blocks_learn_the_deeper_the_slower_and_statistics_stay(tmp_path: Path) -> None:
    from aplsmear.finetune.network import divide

    still = deepened(tmp_path / "still", blocks=2, rate_decay=0.0)
    moved = deepened(tmp_path / "moved", blocks=2, rate_decay=0.5)
    start = divide(BACKBONE, "cell", LAYER, RECIPE, CHANNELS, 2, 5)
    names = [weight.path for weight in start.top.weights]
    before = [weight.numpy() for weight in start.top.weights]
    for name, first, frozen, trained in zip(names, before, still["weights"], moved["weights"], strict=True):
        if "conv_pw_2/" in name or "conv_dw_2/" in name:  # the second block from above
            np.testing.assert_array_equal(frozen, first)
            assert (trained != first).any()
        if "moving" in name and "standardise" not in name:
            np.testing.assert_array_equal(trained, first)


def test_no_held_out_item_trains() -> None:
    from aplsmear.finetune.training import Run, epoch_items

    run = Run("r", RECIPE, frozenset({0, 1}), 1, 3)
    rows, _, weight = epoch_items(run, items(), TWO, SETTINGS, 7, 0)
    assert set(items().fold[rows // 2]) == {2}
    assert weight.mean() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("even", "share"), [(0.0, 2 / 3), (1.0, 1 / 2)])
def test_a_patient_with_many_items_need_not_outweigh_another(even: float, share: float) -> None:
    from aplsmear.finetune.training import Run, epoch_items

    mine = (np.arange(24) // 2 % 3 > 0).astype(np.int64)  # one patient has twice as many as the other
    kinds = replace(TWO, patient=mine)
    settings = SETTINGS.model_copy(update={"patient_weight": even})
    rows, target, weight = epoch_items(Run("r", RECIPE, frozenset(), None, 3), items(), kinds, settings, 7, 0)
    for kind in (0, 1):
        here = target[:, kind] == 1
        assert weight[here & (mine[rows // 2] == 1)].sum() / weight[here].sum() == pytest.approx(share)
        assert weight[here].sum() == pytest.approx(12)  # a kind as a whole weighs as before


@pytest.mark.parametrize(("depth", "middle"), [(0, 1.0), (1, 1.0), (2, 1.0), (0, 0.5), (1, 0.5)])
def test_heads_that_join_and_the_tuned_one_each_count_the_same(depth: int, middle: float) -> None:
    from scipy.special import softmax

    from aplsmear.finetune.network import divide, join, set_head
    from aplsmear.heads.head import layer_sizes

    random = np.random.Generator(np.random.Philox(6))
    sizes = layer_sizes(depth, RECIPE.width, CHANNELS)
    tuned = Head(
        RECIPE.features,
        tuple(random.normal(size=size).astype(np.float32) / 4 for size in sizes),
        tuple(random.normal(size=width).astype(np.float32) for _, width in sizes),
        "gelu",
    )
    deep = replace(RECIPE, depth=depth)
    network = divide(BACKBONE, "cell", LAYER, deep, CHANNELS, 1, 5, (2, 1), (3, 5), middle)
    shown = random.normal(2, 3, (6, CHANNELS * (2 if middle < 1 else 1))).astype(np.float32)
    set_head(network, tuned, shown.mean(axis=0), shown.std(axis=0) + 0.1)
    members = network.members(shown[:, -CHANNELS:]).numpy()
    each = [network.head(shown).numpy(), *np.moveaxis(members, 1, 0)]
    positive = score([tuned], shown[:, :CHANNELS].astype(np.float16), np.arange(6))[0]
    np.testing.assert_allclose(softmax(each[0], axis=1)[:, 2], positive, atol=2e-2)  # features in float16
    join(network, tuned)
    np.testing.assert_allclose(network.head(shown).numpy(), np.mean(each, axis=0), atol=1e-4)
    assert min(np.abs(a - b).max() for a in each for b in each if a is not b) > 0.01


@pytest.mark.parametrize("blocks", [1, 99])
def test_members_see_the_middle_of_each_map_and_in_the_order_of_the_features(blocks: int) -> None:
    import keras
    from networks import keras_network

    from aplsmear.features.backbones import cut_network
    from aplsmear.finetune.network import divide

    shown = images()[:6]
    cut, preprocess = cut_network(BACKBONE, "cell", 5)
    found = keras.Model(cut.input, [cut.output[part] for part in LAYER.split("+")])(
        preprocess(shown.astype(np.float32))
    )
    expected = [
        each[:, rim : side - rim, rim : side - rim].mean(axis=(1, 2))
        for each in (one.numpy() for one in found)
        for side in [each.shape[1]]
        for rim in [side // 4]
    ]
    network = divide(BACKBONE, "cell", LAYER, RECIPE, CHANNELS, blocks, 5, (1, 1), (2, 5), 0.5)
    middles = network.middles(network.trunk(shown)).numpy()
    np.testing.assert_allclose(middles, np.concatenate(expected, axis=1), rtol=1e-3, atol=1e-7)
    whole = keras_network(BACKBONE, "cell", 5)(shown)[LAYER].numpy()
    assert np.abs(middles - whole).max() > 0.001


def test_inner_folds_decide_together() -> None:
    from aplsmear.finetune.finetuning import best_epoch
    from aplsmear.finetune.training import Course

    stopped, longer = Course([0.5], [0.80, 0.70], 1.0), Course([0.5] * 3, [0.60, 0.65, 0.75, 0.70], 1.0)
    assert best_epoch([stopped]) == 0
    assert best_epoch([stopped, longer]) == 2  # 0.725: the one that has stopped stays at 0.70
    assert best_epoch([]) == 0


def test_images_shown_anew_are_the_same_ones_turned() -> None:
    from aplsmear.finetune.training import shown_anew

    image = images()[:1]
    again = shown_anew(image, 0.0, np.random.Generator(np.random.Philox(2)))
    assert (again != image).any()
    assert sorted(again.ravel()) == sorted(image.ravel())


def test_online_augmentation_trains_through_the_whole_network(tmp_path: Path) -> None:
    assert np.isfinite(deepened(tmp_path, online=True, epochs=1)["loss"]).all()


SEVERAL = """
import sys, tensorflow as tf
from pathlib import Path
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.config.experimental.enable_op_determinism()
import numpy as np
from dataclasses import replace
import test_finetuning
from test_finetuning import deepened
test_finetuning.RECIPE = replace(test_finetune.RECIPE, dropout=0.0)  # each device throws dice of its own
both = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
folder = Path(sys.argv[1])
settings = dict(online=sys.argv[2] == "online", precision=sys.argv[3], epochs=2, rate=0.001, head_rate=0.01)
start = deepened(folder / "start", **settings | {"epochs": 0})["weights"]
one = deepened(folder / "one", **settings)["weights"]
two = deepened(folder / "two", **settings, strategy=both)["weights"]
cut = deepened(folder / "cut", **settings, strategy=both, cuts=1)["weights"]
assert all((ours == theirs).all() for ours, theirs in zip(cut, two, strict=True))
flat = [np.concatenate([each.ravel() for each in weights]) for weights in (start, one, two)]
apart, moved = (np.abs(flat[1] - other).mean() for other in (flat[2], flat[0]))
print(apart / moved)
"""


@pytest.mark.pipeline
@pytest.mark.parametrize(("views", "precision", "apart"), [("online", "on", 0.2), ("kept", "off", 0.05)])
def test_several_devices_train_the_same_model_and_go_on_where_they_were_cut_off(
    views: str, precision: str, apart: float, tmp_path: Path
) -> None:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests' / 'finetune'}:{ROOT / 'benchmarks'}"
    }
    environment["TF_ENABLE_ONEDNN_OPTS"] = "0"  # oneDNN has no half precision on most CPUs
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(tmp_path), views, precision],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < apart
