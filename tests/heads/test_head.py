"""Heads: training, scores and files."""

from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit

from aplsmear.evaluation.auroc import auroc
from aplsmear.evaluation.splits import tuning_sets
from aplsmear.heads import stack as stacks
from aplsmear.heads.head import (
    ACTIVATIONS,
    Head,
    Job,
    TrainingItems,
    padded_deviation,
    parameters,
    read_heads,
    score,
    write_heads,
)
from aplsmear.heads.stack import Material, judge_heads, pace, plan, train_heads
from recipes import BASE, FOLDS, jobs_of, keep_no_features_in_memory, same


def material(items: int = 160, views: int = 0, seed: int = 3, memory: int = 64, **of: Any) -> Material:
    """Items; three of their eight channels differ, on average, between the classes."""
    random = np.random.Generator(np.random.Philox(7))
    label = (random.random(items) < 0.35).astype(np.int8)
    x = random.normal(size=(items, views + 1, 8)) * 3 + 5
    x[:, :, :3] += 2.0 * label[:, None, None]
    made = TrainingItems(
        row=np.arange(items) * (views + 1),
        views=np.full(items, views),
        copies=np.ones(items, np.int64),
        label=label,
        fold=np.arange(items) % FOLDS,
    )
    values = {"net/layer": x.reshape(-1, 8).astype(np.float16)}
    return Material(values, replace(made, **of), seed, memory)


def test_score_is_the_network_by_hand() -> None:
    random = np.random.Generator(np.random.Philox(1))
    values = random.normal(size=(9, 5)).astype(np.float16)
    rows = np.array([8, 0, 3, 3])
    by_hand = {
        "relu": lambda z: np.maximum(z, 0),
        "gelu": lambda z: z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2,
        "tanh": np.tanh,
    }
    heads, expected = [], []
    for depth, width, activation in [
        (0, 0, "relu"),
        (1, 3, "relu"),
        (1, 7, "relu"),
        (2, 4, "gelu"),
        (1, 2, "tanh"),
    ]:
        units = [5, *[width] * depth, 1]
        kernels = [random.normal(size=size).astype(np.float32) for size in pairwise(units)]
        biases = [random.normal(size=size).astype(np.float32) for size in units[1:]]
        signal = values[rows].astype(np.float64)
        for layer, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            signal = (by_hand[activation](signal) if layer else signal) @ kernel + bias
        heads.append(Head("net/layer", tuple(kernels), tuple(biases), activation))
        expected.append(expit(signal[:, 0]))
    found = [score(head, values, rows) for head in heads]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_heads_survive_a_file_that_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    heads = train_heads(
        [Job(0, replace(BASE, depth=d, activation="gelu"), frozenset()) for d in (0, 2)], material()
    )
    write_heads(tmp_path / "a.npz", heads)
    write_heads(tmp_path / "b.npz", read_heads(tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert all(same(a, b) for a, b in zip(heads, read_heads(tmp_path / "b.npz"), strict=True))
    assert [head.activation for head in read_heads(tmp_path / "b.npz")] == ["gelu", "gelu"]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_head_from_several_starts_is_their_mean(depth: int) -> None:
    jobs = [Job(4, replace(BASE, depth=depth, dropout=0.3), pair) for pair in tuning_sets(FOLDS)[:2]]
    ground = material()
    rows = ground.items.row
    apart = [train_heads([replace(job, start=start) for start in range(3)], ground) for job in jobs]
    assert not same(apart[0][0], apart[0][1], 0.01)
    for job, alone in zip(jobs, apart, strict=True):
        (head,) = train_heads([job], replace(ground, restarts=3))
        values = ground.values["net/layer"]
        expected = np.mean([logit(score(each, values, rows)) for each in alone], axis=0)
        np.testing.assert_allclose(logit(score(head, values, rows)), expected, atol=2e-4)


def test_parameters_are_the_weights_of_a_head() -> None:
    for depth in (0, 1, 3):
        recipe = replace(BASE, depth=depth, epochs=1)
        (head,) = train_heads([Job(0, recipe, frozenset())], material())
        assert parameters(recipe, 8) == sum(each.size for each in head.kernels + head.biases)


MIXED = [
    BASE,
    replace(BASE, width=2, learning_rate=0.003, weight_decay=0.3, schedule="cosine"),
    replace(BASE, depth=2, activation="gelu", balance=1.0, smoothing=0.2),
    replace(BASE, depth=2, activation="tanh", width=9, epochs=2),
    replace(BASE, depth=0, learning_rate=0.1, schedule="linear"),
    replace(BASE, views=1, batch=32),
    replace(BASE, depth=0, views=2, epochs=1),
    replace(BASE, depth=2, activation="gelu", dropout=0.4, mixup=0.4),
]


def test_a_head_has_the_same_bits_beside_any_other_heads() -> None:
    """Other recipes, folds and epochs, fewer jobs or another order change nothing."""
    ground = material(views=2)
    jobs = jobs_of(*MIXED)
    together = train_heads(jobs, ground)
    for place in range(0, len(jobs), 5):
        assert same(train_heads([jobs[place]], ground)[0], together[place])
    assert all(same(a, b) for a, b in zip(train_heads(jobs[::-1], ground), together[::-1], strict=True))
    judged = judge_heads(jobs, ground, 2)
    for place in range(0, len(jobs), 5):
        (alone,) = judge_heads([jobs[place]], ground, 2)
        assert alone.epoch == judged[place].epoch
        assert all((alone.score[fold] == judged[place].score[fold]).all() for fold in alone.score)


def test_dropout_and_mixup_keep_the_quality() -> None:
    ground = material()
    jobs = jobs_of(replace(BASE, dropout=0.4, width=16), replace(BASE, mixup=0.4), replace(BASE, depth=0))
    items = ground.items
    heads = train_heads(jobs, ground)
    scores = [score(head, ground.values["net/layer"], items.row) for head in heads]
    found = [
        auroc(items.label[out], mine[out])
        for job, mine in zip(jobs, scores, strict=True)
        for out in [np.isin(items.fold, sorted(job.held_out))]
    ]
    assert min(np.mean(np.reshape(found, (3, -1)), axis=1)) > 0.65


def test_a_head_is_what_keras_trains() -> None:
    """All items in each batch, so that their order does not matter; weights start where the head starts."""
    import keras

    keras.utils.set_random_seed(1)
    recipe = replace(
        BASE, depth=2, activation="gelu", schedule="cosine", balance=0.7, smoothing=0.1, epochs=15
    )
    ground = material(items=120)
    recipe = replace(recipe, batch=90)
    held_out = frozenset({1})
    start, end = (train_heads([Job(0, recipe, held_out, epochs)], ground)[0] for epochs in (0, 15))

    inside = ground.items.fold != 1
    x = ground.values["net/layer"][inside].astype(np.float64)
    label = ground.items.label[inside].astype(np.float64)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread = padded_deviation(spread)
    model = keras.Sequential([keras.Input((8,))])
    for _ in range(2):
        model.add(keras.layers.Dense(6, activation=lambda z: keras.activations.gelu(z, approximate=True)))
    model.add(keras.layers.Dense(1, activation="sigmoid"))
    kernels = [start.kernels[0] * spread[:, None], *start.kernels[1:]]
    biases = [start.biases[0] + mean @ start.kernels[0], *start.biases[1:]]
    model.set_weights([each for pair in zip(kernels, biases, strict=True) for each in pair])
    optimizer = keras.optimizers.AdamW(0.02, weight_decay=0.01, epsilon=1e-7)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, keras.losses.BinaryCrossentropy(label_smoothing=0.1))
    heavier = ((label == 0).sum() / label.sum()) ** 0.7
    weight = np.where(label == 1, heavier, 1.0)
    for epoch in range(15):
        optimizer.learning_rate = 0.02 * pace(recipe, epoch)
        model.train_on_batch((x - mean) / spread, label[:, None], weight / weight.mean())

    every = ground.values["net/layer"]
    expected = model((every - mean) / spread).numpy()[:, 0]
    found = score(end, every, np.arange(len(every)))
    assert np.abs(found - score(start, every, np.arange(len(every)))).max() > 0.3  # it has learned
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_standardisation_uses_the_training_folds_alone() -> None:
    """Whatever stands in the held-out folds, the head is the same to the bit."""
    ground = material()
    spoilt = ground.values["net/layer"].copy()
    spoilt[ground.items.fold == 2] *= 50
    other = replace(ground, values={"net/layer": spoilt})
    job = Job(0, BASE, frozenset({2}))
    assert same(train_heads([job], ground)[0], train_heads([job], other)[0])
    inside = Job(0, BASE, frozenset({1}))
    assert not same(train_heads([inside], ground)[0], train_heads([inside], other)[0], 1e-2)


def test_a_fold_is_judged_independently_of_the_other() -> None:
    """The result of a head on one held-out fold, best epoch too, depends on no item of the other."""
    ground = material()
    spoilt = ground.values["net/layer"].copy()
    spoilt[ground.items.fold == 2] = spoilt[ground.items.fold == 2][::-1] * -1
    jobs = jobs_of(replace(BASE, epochs=8), replace(BASE, depth=0))
    clean, dirty = (
        judge_heads(jobs, replace(ground, values={"net/layer": x}), 0)
        for x in (ground.values["net/layer"], spoilt)
    )
    changed = 0
    for job, a, b in zip(jobs, clean, dirty, strict=True):
        if 2 not in job.held_out:
            continue
        (other,) = job.held_out - {2}
        assert a.epoch[other] == b.epoch[other]
        assert (a.score[other] == b.score[other]).all()
        changed += (a.score[2] != b.score[2]).any()
    assert changed == 6


def test_the_judged_scores_are_those_of_a_head_trained_for_that_long() -> None:
    ground = material()
    jobs = jobs_of(replace(BASE, epochs=6), replace(BASE, width=3, epochs=6, schedule="cosine"))
    for job, judged in list(zip(jobs, judge_heads(jobs, ground, 2), strict=True))[::4]:
        for fold in job.held_out:
            (head,) = train_heads([replace(job, epochs=judged.epoch[fold])], ground)
            rows = ground.items.row[ground.items.fold == fold]
            expected = score(head, ground.values["net/layer"], rows)
            np.testing.assert_allclose(expit(judged.score[fold]), expected, atol=1e-3)


def test_patience_stops_a_head_that_gains_nothing() -> None:
    """Labels are random, so that the loss on held-out folds soon rises."""
    random = np.random.Generator(np.random.Philox(5))
    ground = material(label=random.integers(0, 2, 160).astype(np.int8))
    recipe = replace(BASE, learning_rate=0.1, width=32, epochs=30)
    patient, impatient = (judge_heads(jobs_of(recipe), ground, patience) for patience in (30, 3))
    assert all(max(judged.epoch.values()) < 20 for judged in impatient)
    assert all(
        a.epoch == b.epoch for a, b in zip(patient, impatient, strict=True) if max(a.epoch.values()) < 4
    )


def test_without_patience_the_last_epoch_counts() -> None:
    random = np.random.Generator(np.random.Philox(5))
    ground = material(label=random.integers(0, 2, 160).astype(np.int8))
    recipes = [replace(BASE, learning_rate=0.1, epochs=epochs) for epochs in (3, 7)]
    jobs = [replace(job, trial=n) for n, recipe in enumerate(recipes) for job in jobs_of(recipe)]
    for job, judged in zip(jobs, judge_heads(jobs, ground, 0), strict=True):
        assert set(judged.epoch.values()) == {job.recipe.epochs}
        (head,) = train_heads([job], ground)
        for fold in job.held_out:
            rows = ground.items.row[ground.items.fold == fold]
            np.testing.assert_allclose(
                expit(judged.score[fold]), score(head, ground.values["net/layer"], rows), atol=1e-3
            )


def test_views_and_copies_are_seen_and_held_out_items_are_not() -> None:
    seen: list[np.ndarray] = []
    ground = material(items=40, views=3, copies=np.where(np.arange(40) < 20, 1, 2))
    lane = stacks.Lane(Job(0, replace(BASE, views=1), frozenset({1})), ground.items, 9)
    for _ in range(40):
        seen.append(lane.draw(lane.shown.size, 1)[0][:, 0])
    rows = np.concatenate(seen)
    item, view = rows // 4, rows % 4
    assert not (ground.items.fold[item] == 1).any()
    assert set(view[item < 20]) == {0, 1}  # one view beside the plain one
    assert set(view[item >= 20]) == {0, 1, 2}  # shown twice as often, with twice as many views
    often = np.bincount(item, minlength=40)[ground.items.fold != 1]
    assert set(often) == {40, 80}


def test_every_fold_trains_for_as_many_steps_and_batches_are_full() -> None:
    ground = material(items=50, fold=np.array([0] * 5 + [1] * 25 + [2] * 10 + [3] * 10))
    jobs = [Job(0, replace(BASE, batch=16, epochs=1), frozenset({fold})) for fold in range(4)]
    stack = stacks.Stack(jobs, ground, stacks.Table("net/layer", ground))
    assert stack.steps == round(50 * 3 / 4 / 16)
    assert [lane.draw(32, 1)[0].size for lane in stack.lanes] == [32] * 4


@pytest.mark.parametrize("block", [1, 40_000])
def test_features_that_do_not_fit_into_memory_give_the_same_heads(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(*MIXED)
    expected = train_heads(jobs, material(views=2))
    keep_no_features_in_memory(monkeypatch, block)
    found = train_heads(jobs, material(views=2))
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_a_plan_leaves_no_job_out_and_keeps_wide_features_apart() -> None:
    ground = material()
    jobs = jobs_of(*MIXED)
    stacked = plan(jobs, "net/layer", ground)
    assert sorted(chain(*stacked)) == list(range(len(jobs)))
    assert all(len({jobs[place].recipe for place in stack}) == 1 for stack in stacked)
    assert len(stacked) == len(MIXED)
    wide = replace(ground, values={"net/layer": np.zeros((1, 100_000), np.float16)})
    assert min(map(len, plan(jobs, "net/layer", wide))) == 1
    assert plan(jobs, "net/other", ground) == []


def test_the_same_call_gives_the_same_bits_and_another_seed_others() -> None:
    jobs = jobs_of(*MIXED)
    first, second, other = (train_heads(jobs, material(views=2, seed=seed)) for seed in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert not any(same(a, b, 1e-3) for a, b in zip(first, other, strict=True))


def test_each_job_starts_from_its_own_weights() -> None:
    jobs = [Job(trial, BASE, pair, 0) for trial in range(3) for pair in tuning_sets(FOLDS)]
    starts = {head.kernels[1].tobytes() for head in train_heads(jobs, material())}
    assert len(starts) == len(jobs)


def test_a_head_that_is_not_finite_fails_alone() -> None:
    ground = material()
    broken = ground.values["net/layer"].copy()
    broken[0, 0] = np.inf  # of fold 0
    both = replace(ground, values=ground.values | {"net/broken": broken})
    jobs = jobs_of(BASE, replace(BASE, features="net/broken"))
    judged = judge_heads(jobs, both, 0)
    assert all(not each.failure for each in judged[:6])
    assert all("not finite" in each.failure for each in judged[6:])
    assert all(
        same(a, b) for a, b in zip(train_heads(jobs[:6], both), train_heads(jobs[:6], ground), strict=True)
    )


def test_out_of_memory_fails_its_stack_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = stacks.Stack.judge

    def short(self: Any, patience: int) -> Any:
        if self.recipe.depth == 2:
            raise MemoryError
        return real(self, patience)

    monkeypatch.setattr(stacks.Stack, "judge", short)
    judged = judge_heads(jobs_of(BASE, replace(BASE, depth=2)), material(), 0)
    assert [bool(each.failure) for each in judged] == [False] * 6 + [True] * 6
    assert "tune.memory" in judged[-1].failure


def test_one_class_alone_is_refused() -> None:
    label = np.where(np.arange(160) % FOLDS == 1, 1, 0).astype(np.int8)
    with pytest.raises(ValueError, match="only one class"):
        train_heads([Job(0, BASE, frozenset({1}))], material(label=label))


def test_class_weights_balance_and_average_to_one() -> None:
    items = material().items
    n1, n0 = (items.label == 1).sum(), (items.label == 0).sum()
    for balance in (0.0, 0.5, 1.0):
        lane = stacks.Lane(Job(0, replace(BASE, balance=balance), frozenset()), items, 1)
        positive, negative = lane.weights
        assert np.isclose((positive * n1 + negative * n0) / (n1 + n0), 1)
        assert np.isclose(positive / negative, (n0 / n1) ** balance)


def test_the_learning_rate_follows_its_schedule() -> None:
    recipes = {name: replace(BASE, schedule=name, epochs=10) for name in ("constant", "linear", "cosine")}
    paces = {name: [pace(recipe, epoch) for epoch in range(10)] for name, recipe in recipes.items()}
    assert paces["constant"] == [1.0] * 10
    for name in ("linear", "cosine"):
        assert paces[name][0] > 0.9
        assert 0 < paces[name][-1] < 0.1
        assert paces[name] == sorted(paces[name], reverse=True)
    assert set(ACTIVATIONS) == {"relu", "gelu", "tanh"}
