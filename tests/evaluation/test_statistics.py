"""The measures of the reports are correct, have valid intervals, and are the same on every run."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special, stats
from sklearn import metrics

from aplsmear import files
from aplsmear.evaluation import intervals
from aplsmear.evaluation.auroc import (
    Comparison,
    auroc,
    auroc_standard_error,
    auroc_within_folds,
    average_precision,
    delong_interval,
    delong_test,
)
from aplsmear.evaluation.calibration import calibration_replicates, calibration_slope_intercept
from aplsmear.evaluation.columns import Interval
from aplsmear.evaluation.intervals import _resamples, bootstrap_interval, headline, summary
from aplsmear.evaluation.operating_points import operating_points, rates, wilson_interval

# Scores on a coarse grid, so that ties are common and maps between scores are exact.
ITEMS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12)), min_size=4, max_size=40).filter(
    lambda items: 2 <= sum(label for label, _ in items) <= len(items) - 2
)


def columns(items):
    label, score = np.array(items, dtype=float).T
    return label, score / 12


def binormal(rng, positives, negatives, true_auroc=0.9):
    shift = math.sqrt(2) * stats.norm.ppf(true_auroc)
    label = np.r_[np.ones(positives), np.zeros(negatives)]
    return label, rng.normal(size=len(label)) + shift * label


def patients(seed=0, n=120, share=0.3, strength=1.5):
    """Labels and overconfident probabilities."""
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < share).astype(int)
    return label, special.expit(rng.normal(size=n) + strength * label - 1)


def clustered(seed, n_patients=30, cells=12):
    """Cells whose score depends far more on the patient than on the cell."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), cells)
    label = (rng.random(len(patient)) < rng.random(n_patients)[patient]).astype(int)
    score = 2 * rng.normal(size=n_patients)[patient] + label + 0.3 * rng.normal(size=len(patient))
    return label, score, np.array([f"p{i:03d}" for i in patient])


# --- AUROC and DeLong


def test_delong_by_hand():
    # Positives 2, 4, 5 win 1/2, 1 and 1 of the negatives 1, 3: AUROC 5/6, variance (1/12)/3 + (1/18)/2.
    label, score = [1, 1, 1, 0, 0], [2, 4, 5, 1, 3]
    assert auroc(label, score) == pytest.approx(5 / 6)
    assert auroc_standard_error(label, score) == pytest.approx(math.sqrt(1 / 18))
    half = 1.959964 * math.sqrt(1 / 18) / (5 / 6 * 1 / 6)
    interval = delong_interval(label, score)
    assert special.logit([interval.low, interval.high]) == pytest.approx(
        math.log(5) + np.array([-half, half])
    )


def u_statistic(label, score):
    """AUROC and the centred components of positives and negatives, from all pairs: slow and simple."""
    kernel = np.array([[(a > b) + (a == b) / 2 for b in score[label == 0]] for a in score[label == 1]])
    value = kernel.mean()
    return value, kernel.mean(axis=1) - value, kernel.mean(axis=0) - value


def test_delong_agrees_with_all_pairs():
    label, score, _ = clustered(1, n_patients=12, cells=5)
    score = np.round(score, 1)  # ties
    baseline = np.round(score + np.random.default_rng(2).normal(size=len(score)), 1)
    (a, *of_a), (b, *of_b) = u_statistic(label, score), u_statistic(label, baseline)

    def error(components):
        return math.sqrt(sum(each.var(ddof=1) / len(each) for each in components))

    assert auroc_standard_error(label, score) == pytest.approx(error(of_a))
    found = delong_test(label, score, baseline)
    apart = error([first - second for first, second in zip(of_a, of_b, strict=True)])
    assert found.difference == pytest.approx(a - b)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(a - b) / apart))
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.959964 * apart)


@given(ITEMS)
def test_auroc_counts_pairs_and_depends_only_on_the_order(items):
    label, score = columns(items)
    pairs = [(a > b) + (a == b) / 2 for a in score[label == 1] for b in score[label == 0]]
    value = auroc(label, score)
    assert value == pytest.approx(np.mean(pairs))
    assert auroc(label, np.exp(5 * score) - 3) == value
    assert auroc(1 - label, score) == pytest.approx(1 - value)
    assert auroc_within_folds(label, score, np.zeros(len(label))) == pytest.approx(value)


@given(ITEMS)
def test_intervals_contain_the_value_and_stay_on_the_scale(items):
    label, score = columns(items)
    found = delong_interval(label, score)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0
    mirrored = delong_interval(1 - label, score)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)
    drawn = bootstrap_interval(average_precision, label, score, resamples=50, seed=0)
    assert 0 <= drawn.low <= drawn.value <= drawn.high <= 1


def test_a_perfect_score_keeps_an_interval_that_shrinks_with_the_patients():
    lows = []
    for n in (3, 30, 300):
        found = delong_interval(np.r_[np.ones(n), np.zeros(n)], np.r_[np.ones(n), np.zeros(n)])
        assert (found.value, found.high) == (1.0, 1.0)
        lows.append(found.low)
    assert lows[0] < 0.75 < lows[1] < 0.98 < lows[2] < 1


def test_delong_test_without_a_variance_stays_finite_and_cautious():
    label = [1] * 4 + [0] * 4
    perfect, flat = label, [0.5] * 8
    assert delong_test(label, perfect, perfect) == Comparison(0.0, 1.0, Interval(0.0, 0.0, 0.0))
    found = delong_test(label, perfect, flat)
    assert found.difference == 0.5
    assert 0.01 < found.p < 0.5
    assert found.interval.low < 0.5 < found.interval.high


def test_auroc_within_folds_ignores_pairs_across_folds():
    label = [1, 0, 0, 1, 0, 1]
    score = [0.3, 0.1, 0.2, 0.9, 0.8, 0.5]
    fold = [0, 0, 0, 1, 1, 2]  # fold 0: 2 of 2 pairs, fold 1: 1 of 1, fold 2: none; pooled 7 of 9
    assert auroc_within_folds(label, score, fold) == 1
    assert auroc(label, score) == pytest.approx(7 / 9)
    assert auroc_within_folds(label, [0.3, 0.1, 0.2, 0.8, 0.9, 0.5], fold) == pytest.approx(2 / 3)
    assert math.isnan(auroc_within_folds([1, 0], [0.4, 0.2], ["a", "b"]))


def test_standard_error_within_folds_matches_the_spread_of_many_experiments():
    values, errors = [], []
    fold = np.tile(np.arange(5), 16)
    offset = np.array([0, 3, -2, 5, 1])[fold]  # models of different scale: must not matter
    for seed in range(300):
        label, score = binormal(np.random.default_rng(seed), 25, 55, 0.8)
        values.append(auroc_within_folds(label, score + offset, fold))
        errors.append(auroc_standard_error(label, score + offset, fold=fold))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_95_percent_intervals_contain_the_true_value_in_95_percent_of_experiments():
    delong = bootstrap = 0
    runs = 400
    for seed in range(runs):
        label, score = binormal(np.random.default_rng([7, seed]), 30, 30)
        found = delong_interval(label, score)
        delong += found.low <= 0.9 <= found.high
        found = bootstrap_interval(auroc, label, score, resamples=400, seed=seed)
        bootstrap += found.low <= 0.9 <= found.high
    assert 0.91 <= delong / runs <= 0.98
    assert 0.91 <= bootstrap / runs <= 0.98


# --- bootstrap


@pytest.mark.parametrize("statistic", [auroc, average_precision])
@pytest.mark.parametrize("grouped", [False, True])
def test_vectorised_resamples_equal_those_taken_one_by_one(statistic, grouped):
    label, score, patient = clustered(3, n_patients=8, cells=5)
    probability = np.round(special.expit(score), 1)
    found = bootstrap_interval(
        statistic, label, probability, groups=patient if grouped else None, resamples=60, seed=1
    )
    order = np.lexsort([probability, label, patient] if grouped else [probability, label])
    y, p, unit = label[order].astype(float), probability[order], np.unique(patient, return_inverse=True)[1]
    slow = []
    for weight in _resamples(y, unit[order] if grouped else None, 60, seed=1):
        for count in weight.astype(int):
            rows = np.repeat(np.arange(len(y)), count)
            if 0 < y[rows].sum() < len(rows):
                slow.append(statistic(y[rows], p[rows]))
    assert found.value == statistic(label, probability)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))


def test_bootstrap_agrees_with_scipy():
    label, score = binormal(np.random.default_rng(5), 30, 40, 0.8)

    def wins(a, b, axis):
        return np.mean(a[..., :, None] > b[..., None, :], axis=(-1, -2))

    theirs = stats.bootstrap(
        (score[label == 1], score[label == 0]), wins, n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    ours = bootstrap_interval(auroc, label, score, resamples=4000, seed=0)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.012)


def test_cells_of_one_patient_are_not_counted_as_independent():
    label, score, patient = clustered(4)

    def width(interval):
        return interval.high - interval.low

    naive = bootstrap_interval(auroc, label, score, resamples=500, seed=0)
    whole = bootstrap_interval(auroc, label, score, groups=patient, resamples=500, seed=0)
    assert width(whole) > 1.5 * width(naive)


def test_a_seed_gives_the_same_interval_in_any_row_order_and_another_seed_another():
    label, score, patient = clustered(6, n_patients=10, cells=4)
    shuffle = np.random.default_rng(0).permutation(len(label))
    for groups in (None, patient):
        there = None if groups is None else groups[shuffle]
        first = bootstrap_interval(auroc, label, score, groups=groups, resamples=100, seed=1)
        again = bootstrap_interval(auroc, label[shuffle], score[shuffle], groups=there, resamples=100, seed=1)
        other = bootstrap_interval(auroc, label, score, groups=groups, resamples=100, seed=2)
        assert first == again
        assert first != other


def test_memory_chunks_do_not_lose_resamples(monkeypatch):
    label = np.r_[np.ones(5), np.zeros(9)]
    monkeypatch.setattr(intervals, "_CHUNK", 50)
    weights = np.concatenate(list(_resamples(label, None, 100, seed=0)))
    assert weights.shape == (100, 14)
    assert (weights[:, :5].sum(axis=1) == 5).all()
    assert (weights[:, 5:].sum(axis=1) == 9).all()
    assert len(np.unique(weights, axis=0)) > 90


def test_paired_bootstrap_takes_both_scores_on_the_same_patients():
    label, score = binormal(np.random.default_rng(8), 30, 30)
    same = bootstrap_interval(auroc, label, score, 2 * score, resamples=50, seed=0)
    assert same == Interval(0.0, 0.0, 0.0)
    worse = score + np.random.default_rng(9).normal(size=60)
    ours = bootstrap_interval(auroc, label, score, worse, resamples=2000, seed=0)
    theirs = delong_test(label, score, worse).interval
    assert (ours.value, ours.low, ours.high) == pytest.approx(
        (theirs.value, theirs.low, theirs.high), abs=0.02
    )


def test_too_few_patients_is_an_error_not_a_narrow_interval():
    with pytest.raises(ValueError, match=r"1 patients or items with a positive.*at least two"):
        bootstrap_interval(auroc, [1, 0, 0], [0.9, 0.1, 0.2], seed=0)
    with pytest.raises(ValueError, match="at least two of each"):
        delong_interval([1, 0, 0], [0.9, 0.1, 0.2])


# --- calls, calibration, operating points


def penalised(label, probability):
    """Slope and intercept that maximise Firth's penalised likelihood, by a general optimiser."""
    x = special.logit(np.clip(probability, 1e-6, 1 - 1e-6))
    design = np.stack([np.ones_like(x), x], axis=1)

    def loss(beta):
        eta = design @ beta
        spread = special.expit(eta) * special.expit(-eta)
        determinant = np.linalg.slogdet(design.T @ (design * spread[:, None]))[1]
        return -(label * eta - np.logaddexp(0, eta)).sum() - determinant / 2

    intercept, slope = optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", tol=1e-10).x
    return slope, intercept


@pytest.mark.parametrize(
    "case",
    [
        patients(n=40),
        ([0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.8]),  # perfectly separated
        ([0, 0, 1, 1], [0.0, 0.3, 0.6, 1.0]),  # clipped
    ],
)
def test_calibration_maximises_the_penalised_likelihood(case):
    label, probability = (np.asarray(column) for column in case)
    assert calibration_slope_intercept(label, probability) == pytest.approx(
        penalised(label, probability), rel=1e-4
    )


def test_calibration_finds_how_the_probabilities_were_distorted():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20_000)
    label = rng.random(len(truth)) < special.expit(truth)
    slope, intercept = calibration_slope_intercept(label, special.expit(2 * truth + 1))
    assert (slope, intercept) == pytest.approx((0.5, -0.5), abs=0.03)
    slope, intercept = calibration_slope_intercept(label, special.expit(truth))
    assert (slope, intercept) == pytest.approx((1, 0), abs=0.05)


def test_calibration_of_a_constant_has_no_slope():
    assert calibration_slope_intercept([1, 0, 0, 0], [0.3] * 4) == pytest.approx((0, math.log(1.5 / 3.5)))


def test_calibration_settles_on_hard_cases():
    rng = np.random.default_rng(1)
    for n in (4, 6, 20):
        label = np.r_[1, 1, np.zeros(n - 2)]
        extreme = np.where(rng.random(n) < 0.3, rng.integers(0, 2, n), rng.random(n) ** 8)
        weight = np.concatenate(list(_resamples(label, None, 200, seed=n)))
        reversed_ = np.where(rng.random(n) < 0.5, rng.random(n), 1 - label)
        for probability in (extreme, label, 1 - label, reversed_, np.r_[np.full(n - 1, 0.2), 0.9]):
            slope, intercept = calibration_replicates(label, np.asarray(probability, float), weight)
            assert np.isfinite(slope).all()
            assert np.isfinite(intercept).all()


def test_wilson_interval():
    found = wilson_interval(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998
    assert wilson_interval(10, 10).low == pytest.approx(10 / (10 + 1.959964**2))


def test_operating_points_by_hand():
    label, probability = [0, 0, 1, 0, 1], [0.1, 0.2, 0.4, 0.7, 0.8]
    points = operating_points(label, probability)
    # Thresholds in (0.2, 0.4] give Youden's J 2/3, those in (0.7, 0.8] only 1/2.
    assert points == {"balanced": pytest.approx(0.3), "sensitive": pytest.approx(0.3)}
    # Equal J in the gaps (0.2, 0.3] and (0.5, 0.9]: the wider one.
    points = operating_points([0, 1, 0, 1], [0.2, 0.3, 0.5, 0.9])
    assert points == {"balanced": pytest.approx(0.7), "sensitive": pytest.approx(0.25)}
    points = operating_points([0, 1, 0, 1], [0.2, 0.6, 0.7, 0.9])
    assert points["balanced"] == pytest.approx(0.4)
    # 19 of 20 positives would do, but the last one costs no specificity.
    points = operating_points([0, *[1] * 20], [0.1, 0.2, *np.linspace(0.5, 0.9, 19)])
    assert points["sensitive"] == pytest.approx(0.15)


@given(ITEMS)
def test_operating_points_are_the_best_of_all_thresholds(items):
    label, probability = columns(items)
    points = operating_points(label, probability)
    candidates = np.unique(probability)

    def caught(threshold):
        return np.mean(probability[label == 1] >= threshold)

    def spared(threshold):
        return np.mean(probability[label == 0] < threshold)

    youden = [caught(each) + spared(each) for each in candidates]
    assert caught(points["balanced"]) + spared(points["balanced"]) == pytest.approx(max(youden))
    assert caught(points["sensitive"]) >= 0.95
    allowed = [spared(each) for each in candidates if caught(each) >= 0.95]
    assert spared(points["sensitive"]) == pytest.approx(max(allowed))
    backwards = operating_points(label[::-1], probability[::-1])
    assert backwards == points


def test_operating_points_separate_neighbouring_floats():
    neighbours = [0.3, math.nextafter(0.3, 1), math.nextafter(math.nextafter(0.3, 1), 1)]
    for pair in (neighbours[:2], neighbours[1:]):  # the middle of one of them rounds down
        points = operating_points([0, 1], pair)
        assert pair[0] < points["balanced"] <= pair[1]


# --- the record


def test_summary_is_complete_finite_and_reproducible():
    label, probability = patients(n=60)
    record = summary(label, probability, resamples=100, seed=3)
    assert set(record) == {
        "auroc", "average_precision", "brier", "calibration_slope", "calibration_intercept", "n_patients",
        "n_positive",
    }  # fmt: skip
    assert (record["n_patients"], record["n_positive"]) == (60, label.sum())
    for name, entry in record.items():
        if not name.startswith("n_"):
            assert entry["low"] < entry["value"] < entry["high"], name
            assert all(type(number) is float for number in entry.values())
    assert record["auroc"] == delong_interval(label, probability)._asdict()
    assert record["brier"]["value"] == pytest.approx(metrics.brier_score_loss(label, probability))
    assert record["average_precision"]["value"] == metrics.average_precision_score(label, probability)
    assert summary(label[::-1], probability[::-1], resamples=100, seed=3) == record
    assert record["average_precision"] == pytest.approx(
        bootstrap_interval(average_precision, label, probability, resamples=100, seed=3)._asdict()
    )


def test_rates_agree_with_scikit_learn():
    label, probability = patients(n=80)
    call = (probability >= 0.4).astype(int)
    found = {name: entry["value"] for name, entry in rates(label, call).items()}
    assert found == pytest.approx(
        {
            "sensitivity": metrics.recall_score(label, call),
            "specificity": metrics.recall_score(label, call, pos_label=0),
            "balanced_accuracy": metrics.balanced_accuracy_score(label, call),
        }
    )


def test_measures_of_a_perfect_classifier_do_not_claim_certainty():
    label = np.r_[np.ones(6), np.zeros(6)]
    record = summary(label, 0.1 + 0.8 * label, resamples=50, seed=0) | rates(label, label)
    for name in ("auroc", "sensitivity", "specificity", "balanced_accuracy"):
        assert record[name]["value"] == record[name]["high"] == 1
        assert record[name]["low"] < 0.9
    files.round_floats(record)  # finite throughout


def test_rates_do_not_take_probabilities_for_calls():
    label, _ = patients(n=20)
    with pytest.raises(ValueError, match=r"call must be 0 or 1.*threshold"):
        rates(label, np.full(20, 0.4))


def test_bad_input_is_named_by_row():
    for function in (auroc, average_precision, calibration_slope_intercept, delong_interval):
        with pytest.raises(ValueError, match=r"finite \(row 1: nan\)"):
            function([1, 0, 1, 0], [0.5, math.nan, 0.2, 0.1])
        with pytest.raises(ValueError, match=r"0 or 1 \(row 0: 2\.0, row 2: -1\.0\)"):
            function([2, 0, -1, 0], [0.5, 0.3, 0.2, 0.1])
        with pytest.raises(ValueError, match="3 rows where label has 4"):
            function([1, 0, 1, 0], [0.5, 0.3, 0.2])
    for function in (operating_points, calibration_slope_intercept):
        with pytest.raises(ValueError, match=r"\[0, 1\] \(row 1: 1\.2\)"):
            function([1, 0, 1, 0], [0.5, 1.2, 0.2, 0.1])
    with pytest.raises(ValueError, match=r"no positive \(label 1\) item among 2"):
        auroc([0, 0], [0.1, 0.2])


def test_round_floats_gives_plain_numbers():
    record = {"a": np.float32(0.1), "b": [np.int64(3), (True, None)], "c": {"d": -1e-9}, "e": np.array([0.5])}
    text = json.dumps(files.round_floats(record))
    assert text == '{"a": 0.1, "b": [3, [true, null]], "c": {"d": 0.0}, "e": [0.5]}'


def test_round_floats_names_every_number_that_is_not_finite():
    with pytest.raises(ValueError, match=r"auroc\.low is nan; folds\[1\] is inf"):
        files.round_floats({"auroc": {"low": math.nan}, "folds": [1.0, math.inf]})
    with pytest.raises(TypeError, match="key 1 under folds"):
        files.round_floats({"folds": {1: 0.5}})


def test_write_json_replaces_the_file_whole(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"b": 1 / 3, "a": "Käse"})
    assert path.read_bytes() == '{\n  "a": "Käse",\n  "b": 0.333333\n}\n'.encode()
    with pytest.raises(ValueError, match="b is nan"):
        files.write_json(path, {"b": math.nan})
    assert "0.333333" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_the_calibration_line_settles_on_every_resample():
    # Newton's full steps went in circles on one of these resamples.
    label = np.repeat([0, 1], [12, 12])
    score = np.random.default_rng(73).normal(size=24) + 2.5 * label
    record = summary(label, special.expit(score), resamples=2000, seed=0)
    assert math.isfinite(record["calibration_slope"]["high"])


def test_a_headline_keeps_the_interval_of_the_auroc_alone():
    interval = {"value": 0.9, "low": 0.8, "high": 1.0}
    record = {
        "auroc": interval,
        "brier": interval,
        "n_patients": 3,
        "at_sensitive": {"specificity": interval},
    }
    assert headline(record) == {"auroc": interval, "brier": 0.9, "n_patients": 3}
