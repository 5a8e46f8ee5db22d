"""How many cells of a patient are enough."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from test_combination import AVERAGE, people, scores_of

from aplsmear.ensembles.cell_curve import MOST, SIZES, AttendedCells, CellCurve, ScoredCells, cell_curve
from aplsmear.ensembles.combination import Verdicts, judge, patients_of
from aplsmear.ensembles.pooling import summarise_patients
from aplsmear.heads.bags import attend
from aplsmear.heads.head import Head

MEAN_OF_CELLS = CellCurve(cells=[5, 20, 100], spread=[2 / math.sqrt(n) for n in (5, 20, 100)], models=0.1)


def judged(cells: int = 120) -> tuple[Verdicts, ScoredCells, np.ndarray]:
    """Patients whose cells differ much: the diagnosis shows in many of them, not in a few."""
    scores = scores_of(people(12, 3), 5, strength=1.0, cells=cells)
    rng = np.random.default_rng(0)
    outer = [column for column in scores if column.startswith("outer_")]
    level = (scores["patient"].str.startswith("apl") - 0.5) * 1.5 + rng.normal(scale=2.0, size=len(scores))
    scores[outer] = expit(level.to_numpy()[:, None] * np.ones(len(outer)))
    patients = patients_of(people(12, 3), "apl", "aml")
    verdicts = judge(patients, {"m0": summarise_patients(scores)}, AVERAGE, 20, 1)
    return verdicts, ScoredCells(scores[outer].to_numpy(), None), scores["patient"].to_numpy()


def test_with_more_cells_the_intervals_narrow_and_the_order_of_patients_becomes_that_of_all_cells() -> None:
    verdicts, member, owner = judged()
    found = cell_curve(verdicts, {"m0": member}, owner, 1, draws=60)
    table = found.table.set_index("drawn")
    assert list(table.index) == ["5", "10", "20", "50", "100", "all"]
    assert table["cells"].tolist() == [*SIZES, 120]
    assert set(table["patients"]) == {24}
    assert (np.diff(table["width"]) < 0).all()
    assert table["auroc"]["5"] < table["auroc"]["50"] - 0.02
    assert np.all(np.diff(found.bundled.spread) < 0)
    assert found.bundled.spread[0] / found.bundled.spread[-1] == pytest.approx(math.sqrt(20), rel=0.15)
    label, p = verdicts.table["label"], verdicts.table["probability"]
    pairs = p[label == 1].to_numpy()[:, None] > p[label == 0].to_numpy()
    assert table["auroc"]["all"] == pytest.approx(pairs.mean())
    called = verdicts.table["verdict"]
    assert table["sensitivity"]["all"] == pytest.approx(called[label == 1].mean())
    assert table["specificity"]["all"] == pytest.approx(1 - called[label == 0].mean())
    assert (table["auroc_low"][:3] < table["auroc"][:3]).all()


def test_members_on_smears_keep_their_scores_and_patients_without_cells_their_probability() -> None:
    verdicts, member, owner = judged(cells=6)
    flat = cell_curve(verdicts, {}, owner, 1, draws=5)
    assert flat.table["auroc"].nunique() == 1
    assert flat.bundled.spread == [0.0] * len(SIZES)
    without = cell_curve(verdicts, {"m0": member}, np.full(len(owner), "a stranger"), 1, draws=5)
    assert without.table.drop(columns=["drawn", "cells", "patients"]).nunique().max() == 1


def test_the_same_seed_gives_the_same_curve() -> None:
    verdicts, member, owner = judged(cells=8)
    first, second = (cell_curve(verdicts, {"m0": member}, owner, 1, draws=5) for _ in range(2))
    assert first.table.equals(second.table)
    assert first.bundled == second.bundled


def test_all_cells_of_a_patient_give_the_score_of_the_head_on_bags() -> None:
    rng = np.random.default_rng(2)
    shapes = [(6, 4), (4, 1)]
    kernels, biases = (tuple(rng.normal(size=s).astype(np.float32) for s in n) for n in (shapes, [4, 1]))
    gates = tuple(rng.normal(size=s).astype(np.float32) for s in [(4, 8), 8, (4, 1)])
    head = Head("net/a", kernels, biases, "gelu", gates)
    values = rng.normal(size=(20, 6)).astype(np.float16)
    row, views = np.arange(0, 20, 2), np.ones(10, np.int64)
    member = AttendedCells([head], {"net/a": values}, row, views, average=1)
    cells = np.array([7, 2, 3])
    found = member.redraw(cells, 0, "mean")(np.array([[0, 1, 2], [2, 2, 2]]))
    both = [[attend(head, values[row[each] + view])[0] for view in (0, 1)] for each in (cells, cells[[2]])]
    assert expit(found) == pytest.approx(np.mean(both, axis=1))


@given(st.floats(0, 30), st.integers(0, 500))
def test_the_number_of_further_cells_is_the_smallest_that_settles_the_call(margin, cells) -> None:
    more = MEAN_OF_CELLS.more_cells(margin, cells)
    if more is None:
        assert MEAN_OF_CELLS.half_width(MOST) > margin
    else:
        assert MEAN_OF_CELLS.half_width(max(cells, 1) + more) <= margin
        assert more == 0 or MEAN_OF_CELLS.half_width(max(cells, 1) + more - 1) > margin
    assert MEAN_OF_CELLS.more_cells(-margin, cells) == more


@given(st.integers(1, 2000))
def test_between_and_beyond_the_measured_numbers_the_spread_is_that_of_a_mean_of_cells(cells) -> None:
    assert MEAN_OF_CELLS.half_width(cells) == pytest.approx(
        1.96 * math.hypot(2 / math.sqrt(cells), 0.1), rel=1e-3
    )


def test_the_advice_names_the_number_or_that_none_would_do() -> None:
    assert MEAN_OF_CELLS.advice(0.999, 0.5, 50) == ""
    # The margin is 0.85 logits: 1.96 * hypot(2 / sqrt(n), 0.1) falls below it at n = 23.
    assert MEAN_OF_CELLS.advice(0.7, 0.5, 10) == "unsure: about 13 more cells are expected to settle the call"
    assert MEAN_OF_CELLS.advice(0.52, 0.5, 10) == "unsure: more cells are not expected to settle the call"
