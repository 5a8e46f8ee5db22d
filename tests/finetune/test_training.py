"""Training: no held-out item trains, blocks learn at their rates, and an interrupted run ends the same."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aplsmear.errors import UserError
from aplsmear.finetune.network import HeadDesign, build_network
from aplsmear.finetune.sampling import Run, augment_online, epoch_items
from finetunings import BACKBONE, CHANNELS, RECIPE, SETTINGS, images, train, training_set

ROOT = Path(__file__).parents[2]
EXTRA = {"subclasses": "cell_type", "members": 2, "units": 3, "epochs": 2}


@pytest.mark.parametrize(("kills", "head"), [(2, {}), (1, EXTRA), (1, EXTRA | {"centre_crop": 0.5})])
def test_a_killed_run_continues_and_ends_with_the_same_bits(
    kills: int, head: dict[str, object], tmp_path: Path
) -> None:
    changed = {"head": SETTINGS.head.model_copy(update=head)}
    expected, weights = train(tmp_path / "undisturbed", **changed)
    history, continued = train(tmp_path / "killed", kills=kills, **changed)
    assert (history.loss, history.auroc) == (expected.loss, expected.auroc)
    for ours, theirs in zip(continued, weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_lower_blocks_learn_slower_and_batch_statistics_stay(tmp_path: Path) -> None:
    _, frozen = train(tmp_path / "still", blocks=2, rate_decay=0.0)
    _, moved = train(tmp_path / "moved", blocks=2, rate_decay=0.5)
    start = build_network(BACKBONE, "cell", HeadDesign(RECIPE, CHANNELS), 2, 5).top
    for weight, still, trained in zip(start.weights, frozen, moved, strict=True):
        if "conv_pw_2/" in weight.path or "conv_dw_2/" in weight.path:  # the second block from the top
            np.testing.assert_array_equal(still, weight.numpy())
            assert (trained != weight.numpy()).any()
        if "moving" in weight.path and "standardise" not in weight.path:
            np.testing.assert_array_equal(trained, weight.numpy())


def test_training_that_diverges_names_the_rates_to_lower(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lower finetune\.rate and finetune\.head_rate"):
        train(tmp_path, head_rate=1e30, rate=1e30)


def test_no_held_out_item_trains() -> None:
    run = Run("r", RECIPE, frozenset({0, 1}), 1, 3)
    rows, _, weight = epoch_items(run, training_set(), SETTINGS, 0)
    assert set(training_set().items.fold[rows // 2]) == {2}
    assert weight.mean() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("patient_weight", "share"), [(0.0, 2 / 3), (1.0, 1 / 2)])
def test_patients_can_have_equal_weights_for_any_number_of_items(patient_weight: float, share: float) -> None:
    patient = (np.arange(24) // 2 % 3 > 0).astype(np.int64)  # one patient has twice as many as the other
    data = replace(training_set(), patient=patient)
    settings = SETTINGS.model_copy(update={"patient_weight": patient_weight})
    rows, target, weight = epoch_items(Run("r", RECIPE, frozenset(), None, 3), data, settings, 0)
    for subclass in (0, 1):
        here = target[:, subclass] == 1
        of_one = weight[here & (patient[rows // 2] == 1)].sum()
        assert of_one / weight[here].sum() == pytest.approx(share)
        assert weight[here].sum() == pytest.approx(12)  # the weight of a subclass does not change


def test_online_augmentation_rotates_and_mirrors_the_same_pixels() -> None:
    image = images()[:1]
    again = augment_online(image, 0.0, np.random.Generator(np.random.Philox(2)))
    assert (again != image).any()
    assert sorted(again.ravel()) == sorted(image.ravel())


def test_online_augmentation_trains_through_the_whole_network(tmp_path: Path) -> None:
    history, _ = train(tmp_path, online=True, epochs=1)
    assert np.isfinite(history.loss).all()


SEVERAL = """
import sys, tensorflow as tf
from pathlib import Path
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.config.experimental.enable_op_determinism()
import numpy as np
from dataclasses import replace
from finetunings import RECIPE, train
both = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
folder = Path(sys.argv[1])
settings = dict(online=sys.argv[2] == "online", precision=sys.argv[3], epochs=2, rate=0.001, head_rate=0.01)
settings |= dict(recipe=replace(RECIPE, dropout=0.0))  # each device has random numbers of its own
start = train(folder / "start", **settings | {"epochs": 0})[1]
one = train(folder / "one", **settings)[1]
two = train(folder / "two", **settings, strategy=both)[1]
killed = train(folder / "killed", **settings, strategy=both, kills=1)[1]
assert all((ours == theirs).all() for ours, theirs in zip(killed, two, strict=True))
flat = [np.concatenate([each.ravel() for each in weights]) for weights in (start, one, two)]
apart, moved = (np.abs(flat[1] - other).mean() for other in (flat[2], flat[0]))
print(apart / moved)
"""


@pytest.mark.pipeline
@pytest.mark.parametrize(("views", "precision", "apart"), [("online", "on", 0.2), ("cached", "off", 0.05)])
def test_several_devices_train_the_same_model_and_continue_after_a_kill(
    views: str, precision: str, apart: float, tmp_path: Path
) -> None:
    environment = os.environ | {
        "PYTHONPATH": ":".join(str(ROOT / each) for each in ("src", "tests", "benchmarks"))
    }
    environment["TF_ENABLE_ONEDNN_OPTS"] = "0"  # oneDNN has no half precision on most CPUs
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(tmp_path), views, precision],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < apart
