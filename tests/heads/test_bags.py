"""Heads on bags: they find the one marking cell, and read no held-out cell in training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit, softmax

from aplsmear.data.tasks import task_items, task_labels
from aplsmear.evaluation.auroc import auroc
from aplsmear.features.store import Features
from aplsmear.heads.bags import attend
from aplsmear.heads.head import (
    Head,
    Job,
    TrainingItems,
    padded_deviation,
    parameters,
    read_heads,
    write_heads,
)
from aplsmear.heads.results import held_out_predictions, scores_table
from aplsmear.heads.search import Trial, choose_all, held_out_scores, run_study
from aplsmear.heads.stack import Lane, Material, judge_heads, plan, train_heads
from aplsmear.heads.study import open_study
from aplsmear.heads.task_data import PatientTaskData, make_task_data
from aplsmear.params import Task
from recipes import BASE, FOLDS, jobs_of, keep_no_features_in_memory, same, weights_of
from studies import outcome, settings

PLAIN = replace(BASE, width=8, epochs=6)
MIXED = [
    PLAIN,
    replace(PLAIN, width=3, learning_rate=0.003, weight_decay=0.3, schedule="cosine"),
    replace(PLAIN, depth=2, activation="gelu", balance=1.0, smoothing=0.2),
    replace(PLAIN, depth=2, activation="tanh", width=5, epochs=2),
    replace(PLAIN, depth=0, learning_rate=0.1, schedule="linear"),
    replace(PLAIN, views=1, batch=8),
]
CELLS = 30


def made(patients: int = 60, views: int = 0, channels: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (patients x cells, views, channels), labels, and the cell that marks a positive patient.

    One cell in 30 of a positive patient stands far out in two channels; in a third, all cells stray widely.
    """
    random = np.random.Generator(np.random.Philox(7))
    label = (np.arange(patients) // FOLDS % 2).astype(np.int8)
    x = random.normal(size=(patients, CELLS, views + 1, channels))
    x[..., 2] *= 4
    marking = random.integers(0, CELLS, patients)
    x[label == 1, marking[label == 1], :, :2] += 5
    return x.reshape(patients * CELLS, views + 1, channels), label, marking


def material(views: int = 0, seed: int = 3, memory: int = 64, bag: int = 12, **of: Any) -> Material:
    """Patients of 30 cells, but for two that have one and four."""
    x, label, _ = made(views=views)
    size = np.full(len(label), CELLS)
    size[[3, 9]] = 1, 4
    kept = np.concatenate([p * CELLS + np.arange(n) for p, n in enumerate(size)])
    items = TrainingItems(
        row=kept * (views + 1),
        views=np.full(len(kept), views),
        copies=np.ones(len(label), np.int64),
        label=label,
        fold=np.arange(len(label)) % FOLDS,
        size=size,
    )
    values = {"net/layer": x.reshape(-1, x.shape[2]).astype(np.float16)}
    return Material(values, replace(items, **of), seed, memory, bag)


def patients_of(ground: Material) -> list[np.ndarray]:
    """The features of each patient's cells."""
    values, items = ground.values["net/layer"], ground.items
    return [values[items.row[items.images(np.array([item]))]] for item in range(len(items.label))]


def probabilities(head: Head, ground: Material) -> np.ndarray:
    return np.array([attend(head, cells)[0] for cells in patients_of(ground)])


def test_attend_is_the_network_by_hand() -> None:
    random = np.random.Generator(np.random.Philox(1))
    x = random.normal(size=(7, 5)).astype(np.float16)
    by_hand = {
        "relu": lambda z: np.maximum(z, 0),
        "gelu": lambda z: z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2,
        "tanh": np.tanh,
    }
    for activation, function in by_hand.items():
        first, v, u = (random.normal(size=size).astype(np.float32) for size in [(5, 3), (3, 3), (3, 3)])
        offset, bv, bu, w, c, d = (random.normal(size=n).astype(np.float32) for n in (3, 3, 3, 3, 3, 1))
        head = Head(
            "net/layer",
            (first, c[:, None]),
            (offset, d),
            activation,
            (np.concatenate([v, u], axis=1), np.concatenate([bv, bu]), w[:, None]),
        )
        h = function(x.astype(np.float64) @ first + offset)
        attention = softmax((np.tanh(h @ v + bv) * expit(h @ u + bu)) @ w)
        probability, found = attend(head, x)
        np.testing.assert_allclose(found, attention, rtol=1e-6)
        np.testing.assert_allclose(probability, expit(attention @ h @ c + d[0]), rtol=1e-6)
        turned = attend(head, x[::-1])
        np.testing.assert_allclose(turned[0], probability, rtol=1e-12)
        np.testing.assert_allclose(turned[1][::-1], found, rtol=1e-12)


def test_one_marking_cell_in_thirty_is_learned_and_attended_to() -> None:
    """Held-out patients are separated, and the cell that marks a positive one has most of the attention."""
    ground = material(bag=24)
    _, label, marking = made()
    recipe = replace(PLAIN, width=16, dropout=0.3, epochs=60, learning_rate=0.01, weight_decay=1.0)
    heads = train_heads([Job(0, recipe, frozenset({fold})) for fold in range(FOLDS)], ground)
    cells = patients_of(ground)
    aurocs, first = [], []
    for fold, head in enumerate(heads):
        out = np.flatnonzero(ground.items.fold == fold)
        aurocs.append(auroc(label[out], probabilities(head, ground)[out]))
        whole = [p for p in out if label[p] and len(cells[p]) == CELLS]
        first += [attend(head, cells[p])[1].argmax() == marking[p] for p in whole]
    assert np.mean(aurocs) > 0.95
    assert np.mean(first) > 0.9
    mean = train_heads([Job(0, replace(recipe, depth=0, epochs=1), frozenset({0}))], ground)[0]
    assert not mean.attention
    assert attend(mean, patients_of(ground)[0])[1] == pytest.approx(np.full(CELLS, 1 / CELLS))


def test_a_head_has_the_same_bits_beside_any_other_heads() -> None:
    ground = material(views=1)
    jobs = jobs_of(*MIXED)
    together = train_heads(jobs, ground)
    for place in range(0, len(jobs), 7):
        assert same(train_heads([jobs[place]], ground)[0], together[place])
    again, other = train_heads(jobs, ground), train_heads(jobs, replace(ground, seed=4))
    assert all(same(a, b) for a, b in zip(together, again, strict=True))
    assert not any(same(a, b, 1e-3) for a, b in zip(together, other, strict=True))


def test_a_head_on_bags_is_what_keras_trains() -> None:
    """All patients in each batch and all cells in each step; weights start where the head starts."""
    import tensorflow as tf

    recipe = replace(
        PLAIN,
        depth=2,
        activation="tanh",
        schedule="constant",
        balance=0.7,
        smoothing=0.1,
        batch=60,
        epochs=16,
    )
    x = made()[0].astype(np.float16)
    count = len(x) // CELLS
    row = np.arange(len(x))
    whole = {"row": row, "views": np.zeros(len(x), np.int64), "size": np.full(count, CELLS)}
    ground = material(bag=CELLS)
    ground = replace(ground, values={"net/layer": x[:, 0]}, items=replace(ground.items, **whole))
    start, end = (train_heads([Job(0, recipe, frozenset(), epochs)], ground)[0] for epochs in (0, 16))
    cells = x.reshape(count, CELLS, -1).astype(np.float64)
    mean, spread = cells.mean(axis=(0, 1)), cells.std(axis=(0, 1))
    spread = padded_deviation(spread)
    label = ground.items.label.astype(np.float64)
    heavier = np.where(label == 1, ((label == 0).sum() / label.sum()) ** 0.7, 1.0)

    k0, k1, k2 = start.kernels
    b0, b1, b2 = start.biases
    raw = [k0 * spread[:, None], b0 + mean @ k0, k1, b1, k2, b2, *start.attention]
    weights = [tf.Variable(each.astype(np.float64)) for each in raw]
    optimizer = tf.keras.optimizers.AdamW(0.02, weight_decay=0.01, epsilon=1e-7)
    optimizer.exclude_from_weight_decay(var_list=[weights[place] for place in (1, 3, 5, 7)])

    def logits() -> Any:
        h = tf.tanh(((cells - mean) / spread) @ weights[0] + weights[1])
        h = tf.tanh(h @ weights[2] + weights[3])
        v, u = tf.split(h @ weights[6] + weights[7], 2, axis=2)
        attention = tf.nn.softmax(tf.linalg.matvec(tf.tanh(v) * tf.sigmoid(u), weights[8][:, 0]))
        pooled = tf.linalg.matvec(h, attention, transpose_a=True)
        return (pooled @ weights[4] + weights[5])[:, 0]

    def step() -> None:
        with tf.GradientTape() as tape:
            losses = tf.nn.sigmoid_cross_entropy_with_logits(label * 0.9 + 0.05, logits())
            loss = tf.reduce_mean(heavier / heavier.mean() * losses)
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    optimizer.build(weights)
    for _ in range(16):
        step()
    expected = tf.sigmoid(logits()).numpy()
    assert np.abs(probabilities(end, ground) - probabilities(start, ground)).max() > 0.2  # it has learned
    np.testing.assert_allclose(probabilities(end, ground), expected, atol=2e-3)


def test_the_judged_scores_are_those_of_a_head_trained_for_that_long_on_whole_bags() -> None:
    ground = material()
    jobs = jobs_of(PLAIN, replace(PLAIN, width=3, schedule="cosine", depth=2), replace(PLAIN, depth=0))
    for job, judged in list(zip(jobs, judge_heads(jobs, ground, 2), strict=True))[::4]:
        for fold in job.held_out:
            (head,) = train_heads([replace(job, epochs=judged.epoch[fold])], ground)
            expected = probabilities(head, ground)[ground.items.fold == fold]
            np.testing.assert_allclose(expit(judged.score[fold]), expected, atol=1e-3)


def test_a_step_sees_a_few_cells_of_each_patient_and_all_in_time() -> None:
    ground = material(views=2)
    lane = Lane(Job(0, replace(PLAIN, views=1), frozenset({1})), ground.items, 9)
    size = ground.items.size
    owner = np.repeat(np.arange(len(size)), size)
    position = {int(row): place for place, row in enumerate(ground.items.row)}
    seen = set()
    for _ in range(200):
        rows, counts, labels = lane.draw(15, 12)
        for row, count, label in zip(rows, counts, labels, strict=True):
            cells = [position[int(each) // 3 * 3] for each in row]
            (patient,) = {owner[cell] for cell in cells}
            assert ground.items.fold[patient] != 1
            assert label == ground.items.label[patient]
            assert count == len(set(cells[:count])) == min(size[patient], 12)
            assert set(cells[count:]) <= {cells[0]}
            seen |= {(cells[n], int(row[n]) % 3) for n in range(count)}
    inside = np.flatnonzero(ground.items.fold[owner] != 1)
    assert seen == {(cell, view) for cell in inside for view in (0, 1)}


def test_held_out_cells_are_never_read_in_training() -> None:
    ground = material()
    spoilt = ground.values["net/layer"].copy()
    owner = np.repeat(ground.items.fold, ground.items.size)
    spoilt[ground.items.row[owner == 2]] = np.nan
    other = replace(ground, values={"net/layer": spoilt})
    jobs = [Job(n, recipe, frozenset({2, n % 2})) for n, recipe in enumerate(MIXED)]
    for a, b in zip(train_heads(jobs, ground), train_heads(jobs, other), strict=True):
        assert same(a, b)


@pytest.mark.parametrize("block", [1, 40_000])
def test_features_that_do_not_fit_into_memory_give_the_same_heads(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(*MIXED)[::3]
    expected = train_heads(jobs, material(views=1))
    keep_no_features_in_memory(monkeypatch, block)
    found = train_heads(jobs, material(views=1))
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_each_head_on_bags_is_a_stack_of_its_own() -> None:
    assert plan(jobs_of(PLAIN), "net/layer", material()) == [[place] for place in range(6)]


def test_heads_survive_a_file_that_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    jobs = [Job(0, replace(PLAIN, depth=depth, epochs=1), frozenset()) for depth in (0, 1, 2)]
    heads = train_heads(jobs, material())
    write_heads(tmp_path / "a.npz", heads)
    write_heads(tmp_path / "b.npz", read_heads(tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for job, head, kept in zip(jobs, heads, read_heads(tmp_path / "b.npz"), strict=True):
        assert same(head, kept)
        assert len(kept.attention) == (3 if job.recipe.depth else 0)
        assert parameters(job.recipe, 8, bags=True) == sum(each.size for each in weights_of(kept))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_head_from_several_starts_is_their_mean(depth: int) -> None:
    ground = material()
    job = Job(0, replace(PLAIN, depth=depth, epochs=3, dropout=0.0), frozenset({1}))
    alone = train_heads([replace(job, start=start) for start in range(3)], ground)
    (head,) = train_heads([job], replace(ground, restarts=3))
    cells = ground.values["net/layer"][:7]
    each, looked = zip(*(attend(mine, cells) for mine in alone), strict=True)
    assert len(set(each)) == 3
    probability, attention = attend(head, cells)
    assert logit(probability) == pytest.approx(np.mean(logit(each)), abs=1e-4)
    np.testing.assert_allclose(attention, np.mean(looked, axis=0), atol=1e-5)


# --- patients as items ---------------------------------------------------------------------

TASK = Task(level="patient", positive={"diagnosis": ["apl"]}, negative={"diagnosis": ["aml"]})


def task_data(
    order: int | None = None, spoilt: int | None = None, patients: int = 28, views: int = 1
) -> PatientTaskData:
    """Patients of 6 cells, one of a single cell, one of none, some who are healthy; cells in any order."""
    x, _, _ = made(patients, views, 5)
    diagnosis = np.array(["aml", "apl", "apl", "aml", "healthy", "aml", "apl"])[np.arange(patients) % 7]
    fold = np.arange(patients) // 7 % FOLDS
    x = x.reshape(patients, CELLS, views + 1, 5)[:, :6]
    x[diagnosis == "apl", 0, :, 0] += 6
    if spoilt is not None:
        x[fold == spoilt] = 50 - x[fold == spoilt]
    cells = pd.DataFrame(
        {
            "cell": [f"c{n:03}" for n in range(patients * 6)],
            "patient": np.repeat([f"p{n:02}" for n in range(patients)], 6),
            "diagnosis": np.repeat(diagnosis, 6),
        }
    )
    kept = np.flatnonzero(
        (cells["patient"] != "p05") & ((cells["patient"] != "p08") | (cells.index % 6 == 0))
    )
    if order is not None:
        kept = np.random.Generator(np.random.Philox(order)).permutation(kept)
    cells = cells.iloc[kept].reset_index(drop=True)
    values = x.reshape(-1, views + 1, 5)[kept].reshape(-1, 5).astype(np.float16)
    index = pd.DataFrame(
        {"item": np.repeat(cells["cell"], views + 1), "view": np.tile(np.arange(views + 1), len(cells))}
    )
    features = {"net/layer": Features("net/layer", index.reset_index(drop=True), values)}
    folds = pd.DataFrame({"patient": [f"p{n:02}" for n in range(patients)], "fold": fold})
    images = task_items(cells, "cell")
    items = task_items(images, "patient")
    return make_task_data(items, task_labels(items, TASK), folds, features, images)


SPACE = {"views": [0, 1], "depth": [0, 1], "width": [3, 6], "batch": [8], "epochs": [6], "mixup": [0.0]}
USED = settings(SPACE, trials=6, cells_per_step=4, average=1)


def tuned(whole: PatientTaskData, folder: Path) -> tuple[list[Any], np.ndarray, list[Head]]:
    trials = list(run_study(whole, USED, 5, open_study("s", folder / "journal")))
    choices = choose_all(trials, FOLDS)
    return outcome(trials), *held_out_scores(whole, [choice.trial for choice in choices], USED, 5)


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], np.ndarray, list[Head]]:
    return tuned(task_data(), tmp_path_factory.mktemp("peaceful"))


def test_patients_without_cells_are_left_out(peaceful: Any) -> None:
    whole = task_data()
    _, scores, heads = peaceful
    table = scores_table(whole, scores)
    assert "p05" not in set(table["patient"])  # no cell
    assert "p08" in set(table["patient"])  # one cell
    assert (table["item"] == table["patient"]).all()
    assert table["patient"].is_monotonic_increasing
    assert np.isfinite(scores).all()  # also of the healthy, who take no part
    predictions = held_out_predictions(whole, scores)
    assert predictions["label"].value_counts().to_dict() == {0: 11, 1: 12}
    single = int(np.flatnonzero(table["patient"] == "p08")[0])
    _, attention = attend(heads[-1], features_of(whole, single)[0])
    assert attention.tolist() == [1.0]


def features_of(whole: PatientTaskData, place: int) -> list[np.ndarray]:
    """The features of a patient's cells, by their plain and by their augmented view."""
    start = whole.size[:place].sum()
    rows = whole.row[start : start + whole.size[place]]
    return [whole.features["net/layer"].values[rows + view] for view in (0, 1)]


def test_attention_is_that_of_the_head_that_never_saw_the_patient(peaceful) -> None:
    """In tuned/TASK/attention.parquet: one row a cell."""
    whole = task_data()
    heads, average = peaceful[2], USED.average
    table = whole.attention(heads, average)
    assert list(table) == ["cell", "patient", "fold", "attention", "score"]
    assert table["cell"].tolist() == whole.cell.tolist()
    np.testing.assert_allclose(table.groupby("patient")["attention"].sum(), 1, atol=1e-5)
    for place, (patient, fold) in enumerate(zip(whole.table["patient"], whole.table["fold"], strict=True)):
        views = features_of(whole, place)[: average + 1]
        expected = np.mean([attend(heads[fold], view)[1] for view in views], axis=0)
        np.testing.assert_allclose(table["attention"][table["patient"] == patient], expected, rtol=1e-5)


def test_a_patient_is_scored_by_the_head_that_did_not_see_them(peaceful: Any) -> None:
    """With `average: 1` the score is the mean over two views of the cells."""
    whole = task_data()
    _, scores, heads = peaceful
    for place, fold in enumerate(whole.table["fold"]):
        each = [attend(heads[fold], view)[0] for view in features_of(whole, place)]
        assert scores[place, fold] == pytest.approx(np.mean(each))


def test_the_order_of_the_cells_changes_no_bit(tmp_path: Path, peaceful: Any) -> None:
    trials, scores, heads = tuned(task_data(order=3), tmp_path)
    assert trials == peaceful[0]
    assert scores.tobytes() == peaceful[1].tobytes()
    assert all(same(a, b) for a, b in zip(heads, peaceful[2], strict=True))


def test_scores_in_an_outer_fold_do_not_depend_on_its_held_out_patients() -> None:
    """With other cells in fold 1, the same choices give all others the same scores in outer fold 1."""
    whole, spoilt = task_data(), task_data(spoilt=1)
    inner = np.full((FOLDS, FOLDS), 0.8)
    trial = Trial(0, replace(PLAIN, batch=8), inner, np.full(inner.shape, 3), 1)
    (scores, _), (others, _) = (
        held_out_scores(each, [trial] * (FOLDS + 1), USED, 5) for each in (whole, spoilt)
    )
    inside = whole.table["fold"].to_numpy() != 1
    assert scores[inside, 1].tobytes() == others[inside, 1].tobytes()
    assert (scores[~inside, 1] != others[~inside, 1]).all()
    assert (scores[inside, 0] != others[inside, 0]).all()


def test_a_killed_study_continues_with_the_same_trials(tmp_path: Path, peaceful: Any) -> None:
    whole, calls = task_data(), []

    def judge(jobs: Any, ground: Material, patience: int) -> Any:
        calls.append(jobs[0].trial)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge_heads(jobs, ground, patience)

    with pytest.raises(KeyboardInterrupt):
        list(run_study(whole, USED, 5, open_study("s", tmp_path / "j"), judge))
    assert outcome(list(run_study(whole, USED, 5, open_study("s", tmp_path / "j"), judge))) == peaceful[0]
    assert calls == [0, 1, 1, 2, 3, 4, 5]
