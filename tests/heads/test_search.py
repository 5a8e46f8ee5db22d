"""The search: which trial is chosen, and that no patient is scored by a head that saw them."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc_within_folds
from aplsmear.features.store import Features, FeatureTable
from aplsmear.heads import search
from aplsmear.heads import task_data as task_data_module
from aplsmear.heads.head import Head, Job, score
from aplsmear.heads.results import (
    explain_choice,
    held_out_predictions,
    importances,
    scores_table,
    trials_table,
)
from aplsmear.heads.search import (
    Trial,
    choose,
    choose_all,
    draw_candidates,
    held_out_scores,
    run_study,
    study_key,
)
from aplsmear.heads.stack import Material, train_heads
from aplsmear.heads.study import open_study
from aplsmear.heads.task_data import make_task_data
from studies import FOLDS, ROOT, outcome, quick_judge, settings, task_data

RECIPE = draw_candidates(settings(), ["net/good", "net/poor"], 1)[0][0]


def trial(number: int, aurocs: Any, parameters: int = 10, **of: Any) -> Trial:
    inner = np.array(aurocs, dtype=np.float64)
    recipe = replace(RECIPE, **{key: of.pop(key) for key in ("depth", "views") if key in of})
    return Trial(number, recipe, inner, np.full(inner.shape, 3), parameters, **of)


def level(value: float, spread: float = 0.0) -> np.ndarray:
    """Inner AUROCs around a value."""
    inner = np.full((FOLDS, FOLDS), value) + spread * np.resize([1, -1], FOLDS)[None, :]
    np.fill_diagonal(inner, np.nan)
    return inner


def test_the_best_is_chosen_where_nothing_simpler_comes_near() -> None:
    trials = [trial(0, level(0.7), 1), trial(1, level(0.9, 0.01), 100), trial(2, level(0.8), 10)]
    assert [choice.trial.number for choice in choose_all(trials, FOLDS)] == [1] * (FOLDS + 1)


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    spread = 0.05
    best = trial(0, level(0.9, spread), 100)
    error = best.standard_error(FOLDS)
    assert np.isclose(error, np.std([spread, -spread] * 2, ddof=1) / 2)
    inside, outside = 0.9 - error + 1e-6, 0.9 - error - 1e-6
    assert choose([best, trial(1, level(inside), 5), trial(2, level(outside), 1)], FOLDS).trial.number == 1
    for simpler, other in (({"depth": 1}, {"depth": 2}), ({"views": 1}, {"views": 2}), ({}, {})):
        baselines = [best, trial(2, level(inside), 5, **other), trial(1, level(inside), 5, **simpler)]
        assert choose(baselines, FOLDS).trial.number == 1
    assert "trial 0 with inner AUROC 0.9000" in choose([best], FOLDS).why


def test_an_outer_fold_chooses_by_its_own_row_alone() -> None:
    """Scores of other outer folds, and on the held-out fold, change no choice."""
    good, poor = level(0.8), level(0.7)
    good[2], poor[2] = 0.6, 0.75  # only outer fold 2 prefers the poor one
    for inner in (good, poor):
        inner[2, 2] = np.nan
    trials = [trial(0, good), trial(1, poor)]
    assert [choice.trial.number for choice in choose_all(trials, FOLDS)] == [0, 0, 1, 0, 0]


def test_a_fold_of_one_class_and_a_failed_trial_are_left_out() -> None:
    inner = level(0.8)
    inner[:, 1] = np.nan
    lame = trial(0, inner)
    assert lame.auroc(0) == pytest.approx(0.8)
    assert lame.auroc(FOLDS) == pytest.approx(0.8)
    failed = trial(1, np.full((FOLDS, FOLDS), np.nan), failure="why not")
    assert choose([failed, lame], 0).trial.number == 0
    explained = explain_choice([failed, lame], choose_all([failed, lame], FOLDS), {})
    assert explained["failed"] == {1: "why not"}
    assert "importance" not in explained
    assert explained["standing"] == {0: 0.8}


def test_epochs_are_the_mean_of_the_best_ones_of_an_outer_fold() -> None:
    epochs = np.array([[0, 2, 3, 6], [9, 0, 9, 9], [1, 1, 0, 1], [4, 4, 5, 0]])
    tried = replace(trial(0, level(0.8)), best_epoch=epochs)
    assert [tried.epochs(outer_fold) for outer_fold in range(FOLDS + 1)] == [4, 9, 1, 4, 5]


def test_the_trial_that_a_user_picks_is_for_the_final_model_alone() -> None:
    trials = [trial(0, level(0.9), 5), trial(1, level(0.6), 100)]
    choices = choose_all(trials, FOLDS, 1)
    assert [choice.trial.number for choice in choices] == [0, 0, 0, 0, 1]
    assert "picked by the user" in choices[-1].why
    with pytest.raises(UserError, match=r"trial 7 does not exist or failed\. Choose one of 0, 1"):
        choose_all(trials, FOLDS, 7)


def test_candidates_come_from_seed_and_number_alone() -> None:
    names = ["net/good", "net/poor"]
    few, many = (draw_candidates(settings(trials=count), names, 3)[0] for count in (5, 12))
    assert few == many[:5]
    assert len(set(many)) == 12
    assert not set(many) & set(draw_candidates(settings(trials=12), names, 4)[0])
    with pytest.raises(UserError, match=r"'net/god' \(did you mean 'net/good'\?\)"):
        draw_candidates(settings({"features": ["net/god"]}), names, 3)


def test_heads_on_features_of_several_backbones_are_those_on_one_array_of_both() -> None:
    data, name = task_data(), "net/good+net/poor"
    index = data.features["net/good"].index
    both = np.hstack([each.values for each in data.features.values()])
    one_array = replace(data, features={name: Features(name, index, both)})
    behind = replace(data, features=FeatureTable(data.features))
    space = settings({"features": [name]})
    recipe = draw_candidates(space, sorted(behind.features), 3)[0][0]
    heads = [
        train_heads([Job(0, recipe, frozenset(), 4)], each.material(space, 1))[0]
        for each in (one_array, behind)
    ]
    assert len(heads[0].kernels[0]) == 12
    for one, other in zip(heads[0].kernels, heads[1].kernels, strict=True):
        np.testing.assert_array_equal(one, other)
    places = np.arange(len(data.table))
    np.testing.assert_array_equal(one_array.score(heads[0], places, 0), behind.score(heads[1], places, 0))


def test_items_of_a_patient_are_limited_by_class_and_chosen_by_name() -> None:
    whole = task_data(per_patient=9)
    few = whole.training_items(2, 1)
    patients = whole.table["patient"].to_numpy()[few.row]
    most = pd.Series(few.label).groupby([patients, few.label]).size()
    assert most.max() == 2
    assert len(whole.training_items(100, 1).row) == len(whole.table)
    backwards = np.arange(len(whole.table))[::-1]
    table = whole.table.iloc[backwards].reset_index(drop=True)
    turned = replace(whole, table=table, label=whole.label[backwards], row=whole.row[backwards])
    assert set(turned.training_items(2, 1).row) == set(few.row)


def test_a_task_with_too_few_labels_is_refused_with_their_counts() -> None:
    whole = task_data()
    label = np.where(whole.table["fold"] > 1, 0, whole.label).astype(np.int8)
    folds = whole.table[["patient", "fold"]].drop_duplicates()
    with pytest.raises(UserError, match=r"at least three folds.*fold 2: 0, fold 3: 0. Negative"):
        make_task_data(whole.table[["item", "patient"]], label, folds, whole.features)


def test_features_of_other_items_are_refused() -> None:
    whole = task_data()
    folds = whole.table[["patient", "fold"]].drop_duplicates()
    items = whole.table[["item", "patient"]]
    with pytest.raises(UserError, match="no features"):
        make_task_data(items, whole.label, folds, {})
    with pytest.raises(UserError, match="not those of this data set"):
        make_task_data(items.assign(item=items["item"] + "x"), whole.label, folds, whole.features)
    one, two = whole.features.values()
    with pytest.raises(UserError, match="other views"):
        make_task_data(items, whole.label, folds, {"a": one, "b": replace(two, index=two.index[::-1])})


def test_inner_aurocs_are_stored_by_outer_and_inner_fold(tmp_path: Path) -> None:
    """[w, j] is the AUROC on fold j of the scores that the judge gave for fold j of the pair {w, j}."""
    given: dict[tuple[int, frozenset[int], int], np.ndarray] = {}

    def judge(jobs: Any, material: Material, patience: int) -> Any:
        found = quick_judge(jobs, material, patience)
        for job, judged in zip(jobs, found, strict=True):
            given.update({(job.trial, job.held_out, fold): s for fold, s in judged.score.items()})
        return found

    whole = task_data()
    trials = list(run_study(whole, settings(), 5, open_study("s", tmp_path / "j"), judge))
    items = whole.training_items(200, 5)
    for each in trials:
        for w in range(FOLDS):
            for j in range(FOLDS):
                if w == j or each.failure:
                    assert np.isnan(each.inner[w, j])
                    continue
                label = items.label[items.fold == j]
                expected = auroc_within_folds(
                    label, given[each.number, frozenset({w, j}), j], np.zeros(len(label), int)
                )
                assert each.inner[w, j] == expected
    assert [each.failure for each in trials] == ["", "", "", "made to fail"] + [""] * 5


def test_a_study_continues_where_it_stopped_and_trains_nothing_twice(tmp_path: Path) -> None:
    whole = task_data()
    expected = outcome(list(run_study(whole, settings(), 5, open_study("s", tmp_path / "a"), quick_judge)))
    calls: list[int] = []

    def judge(jobs: Any, material: Material, patience: int) -> Any:
        calls.append(jobs[0].trial)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return quick_judge(jobs, material, patience)

    with pytest.raises(KeyboardInterrupt):
        list(run_study(whole, settings(), 5, open_study("s", tmp_path / "b"), judge))
    assert outcome(list(run_study(whole, settings(), 5, open_study("s", tmp_path / "b"), judge))) == expected
    assert calls == [0, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    assert outcome(list(run_study(whole, settings(), 5, open_study("s", tmp_path / "b"), judge))) == expected
    assert len(calls) == 10


def test_all_trials_failing_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    def judge(jobs: Any, material: Material, patience: int) -> Any:
        return [
            replace(judged, epoch={}, score={}, failure="no luck")
            for judged in quick_judge(jobs, material, patience)
        ]

    with pytest.raises(UserError, match=r"all trials failed:\n  trial 0: no luck\n  trial 1: no luck"):
        list(run_study(task_data(), settings(), 5, open_study("s", tmp_path / "j"), judge))


def test_a_study_is_named_after_all_that_it_depends_on() -> None:
    whole, used = task_data(), settings()
    key = study_key(whole, used, 1)
    assert key == study_key(task_data(), settings(), 1)
    assert key == study_key(whole, settings(pick=1, storage="postgresql+psycopg://host/db"), 1)
    others = [
        study_key(task_data(seed=2), used, 1),
        study_key(replace(whole, label=1 - whole.label), used, 1),
        study_key(replace(whole, table=whole.table.assign(fold=0)), used, 1),
        study_key(whole, settings(trials=10), 1),
        study_key(whole, settings(patience=1), 1),
        study_key(whole, settings({"width": [3]}), 1),
        study_key(whole, used, 2),
    ]
    assert len({key, *others}) == len(others) + 1


def test_a_study_starts_anew_when_a_module_that_scores_it_changes(tmp_path: Path) -> None:
    """The AUROC is inverted in a module that the search imports: no trial keeps its old value."""
    library = tmp_path / "aplsmear"
    shutil.copytree(ROOT / "src" / "aplsmear", library)
    code = (
        "import studies; from pathlib import Path; from aplsmear.heads.search import study_key\n"
        "key = study_key(studies.task_data(), studies.settings(), 5)\n"
        "print(*(trial.auroc(4) for trial in studies.work('.', name=key)))"
    )
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])}

    def values() -> np.ndarray:
        printed = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | paths,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        return np.array(printed.split(), dtype=float)

    first = values()
    np.testing.assert_array_equal(values(), first)
    assert len(list(tmp_path.glob("*.journal"))) == 1
    with (library / "evaluation" / "auroc.py").open("a") as file:
        file.write("_right = auroc_within_folds\n")
        file.write("def auroc_within_folds(*given):\n    return 1 - _right(*given)\n")
    np.testing.assert_allclose(values(), 1 - first)
    assert len(list(tmp_path.glob("*.journal"))) == 2


def test_every_item_is_scored_by_a_head_that_never_saw_its_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In outer fold w, also by none that saw a patient of fold w (from the rows that a head reads)."""
    whole = task_data()
    used = settings()
    recipes, _ = draw_candidates(used, sorted(whole.features), 5)
    recipes = [
        replace(recipe, features=name)
        for recipe, name in zip(recipes, ["net/good", "net/poor"] * 3, strict=False)
    ]
    chosen = [
        replace(trial(n, level(0.8)), recipe=recipes[n], best_epoch=np.full((FOLDS, FOLDS), n + 1))
        for n in (0, 1, 0, 2, 3)
    ]
    seen: dict[int, tuple[Job, frozenset[int]]] = {}
    scored: list[tuple[Job, set[int]]] = []

    def train(jobs: Any, material: Material) -> list[Head]:
        heads = train_heads(jobs, material)
        for job, head in zip(jobs, heads, strict=True):
            inside = frozenset(material.items.fold.tolist()) - job.held_out
            seen[id(head)] = job, inside
        return heads

    def spy(head: Head, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        fold = whole.table["fold"].to_numpy()[np.searchsorted(whole.row, rows)]
        assert not seen[id(head)][1] & set(fold.tolist())
        scored.append((seen[id(head)][0], set(fold.tolist())))
        return score(head, values, rows)

    monkeypatch.setattr(search, "train_heads", train)
    monkeypatch.setattr(task_data_module, "score", spy)
    scores, outer = held_out_scores(whole, chosen, used, 5)
    assert scores.shape == (len(whole.table), FOLDS + 1)
    assert not np.isnan(scores).any()
    expected = [
        (each.number, {outer_fold, fold} - {FOLDS}, {fold}, each.number + 1)
        for outer_fold, each in enumerate(chosen)
        for fold in range(FOLDS)
    ]
    found = [(job.trial, set(job.held_out), folds, job.epochs) for job, folds in scored]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert [seen[id(head)][0].held_out for head in outer] == [frozenset({w}) for w in range(FOLDS)] + [
        frozenset()
    ]

    predictions = held_out_predictions(whole, scores)
    fold = whole.table["fold"].to_numpy()
    for outer_fold in range(FOLDS):
        rows = whole.row[fold == outer_fold]
        by_outer = score(outer[outer_fold], whole.features[chosen[outer_fold].recipe.features].values, rows)
        assert (
            predictions["probability"].to_numpy()[fold == outer_fold].astype(np.float32) == by_outer
        ).all()
    table = scores_table(whole, scores)
    assert list(table.columns) == ["item", "patient", "fold", *(f"outer_{w}" for w in range(FOLDS + 1))]


def test_nothing_leaks_where_a_model_could_memorise_patients(tmp_path: Path) -> None:
    """Each patient has its own mark and a random label for all its cells: held out, no label can be known.

    If a head had seen a held-out patient, its mark would give its label away, and AUROC would be near 1.
    """
    random = np.random.Generator(np.random.Philox(11))
    patients, cells = 48, 6
    lots = random.permutation(np.repeat([0, 1], patients // 2))
    marks = random.normal(size=(patients, 64)) * 3
    whole = task_data(patients, cells, 64)
    who = np.repeat(np.arange(patients), cells)
    x = (marks[who] + random.normal(size=(len(who), 64)) * 0.3).astype(np.float16)
    features = {name: replace(each, values=x) for name, each in whole.features.items()}
    whole = replace(whole, label=lots[who].astype(np.int8), features=features)
    used = settings({"width": [32], "depth": [1], "epochs": [12]}, trials=8)
    trials = list(run_study(whole, used, 5, open_study("s", tmp_path / "j")))
    choices = choose_all(trials, FOLDS)
    scores, heads = held_out_scores(whole, [choice.trial for choice in choices], used, 5)
    predictions = held_out_predictions(whole, scores)
    by_patient = predictions.groupby("patient").mean(numeric_only=True)
    label, probability = by_patient["label"].to_numpy(), by_patient["probability"].to_numpy()
    held_out = auroc_within_folds(label, probability, by_patient["fold"].to_numpy().astype(int))
    memorised = score(heads[-1], x, whole.row)
    assert (
        auroc_within_folds(whole.label, memorised, np.zeros(len(who), int)) > 0.99
    )  # marks can be memorised
    assert 0.25 < held_out < 0.75  # 24 against 24: a standard error of 0.085


def test_tables_for_plots(tmp_path: Path) -> None:
    study = open_study("s", tmp_path / "j")
    trials = list(run_study(task_data(), settings(), 5, study, quick_judge))
    choices = choose_all(trials, FOLDS)
    table = trials_table(trials, choices)
    assert table["trial"].tolist() == list(range(9))
    assert table["best_so_far"].is_monotonic_increasing
    assert table["trial"][table["standing"] == "chosen"].tolist() == [choices[-1].trial.number]
    assert table["standing"].tolist()[3] == "failed"
    near = table["auroc"] >= table["auroc"].max() - table["standard_error"][table["auroc"].idxmax()]
    assert set(table["standing"][near]) <= {"chosen", "within one standard error"}
    assert set(table["standing"][~near]) == {"other", "failed"}
    assert table["failure"].tolist()[3] == "made to fail"
    many = study.trials() * 7
    important = importances(many, 1)
    assert np.isclose(sum(important.values()), 1)
    assert list(important.values()) == sorted(important.values(), reverse=True)
    assert importances(many, 1) == important
    assert "batch" not in important  # it has one value
    assert importances(study.trials(), 1) == {}  # shares from a few trials are chance
    written = yaml.safe_dump(explain_choice(trials, choices, important), sort_keys=False)  # best.yaml
    explained = yaml.safe_load(written)
    assert list(explained["importance"]) == list(important)
    assert explained["importance_from_trials"] == 8


def test_held_out_scores_may_average_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `average: 1`, an item's score is the mean of its plain and its first augmented view."""
    whole = task_data()
    index = pd.DataFrame({"item": np.repeat(whole.table["item"], 2), "view": [0, 1] * len(whole.table)})
    doubled = {
        name: replace(each, index=index.reset_index(drop=True), values=np.repeat(each.values, 2, axis=0))
        for name, each in whole.features.items()
    }
    seen = replace(whole, features=doubled, row=2 * whole.row, views=np.ones_like(whole.row))
    head = Head(RECIPE.features, (), ())
    monkeypatch.setattr(search, "train_heads", lambda jobs, _: [replace(head) for _ in jobs])
    monkeypatch.setattr(task_data_module, "score", lambda _, __, rows: (rows % 2).astype(np.float32)[None])
    chosen = [trial(0, level(0.8))] * (FOLDS + 1)
    for average, expected in ((0, 0.0), (1, 0.5)):
        scores, _ = held_out_scores(seen, chosen, settings(average=average), 5)
        assert (scores == expected).all()
