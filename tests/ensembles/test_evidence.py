"""The evidence of the cells adds up to the patient's logit, and says which cells count."""

import numpy as np
import pytest
from scipy.special import expit, logit

from aplsmear.ensembles.combination import Combination, Weights
from aplsmear.ensembles.evidence import attended, evidence_of, scored
from aplsmear.ensembles.pooling import SUMMARIES, summary_logit
from aplsmear.ensembles.promise import Alarm
from aplsmear.heads.bags import attend, gates_and_logits
from aplsmear.heads.head import Head

RANDOM = np.random.default_rng(4)


def head(members: int = 2) -> Head:
    """Of bags of features with three channels: a hidden layer of two units, an attention, several heads."""

    def draw(*shape: int) -> np.ndarray:
        return RANDOM.normal(size=shape).astype(np.float32)

    gates = (draw(2, 4), draw(4), draw(2, members))
    return Head("f", (draw(3, 2), draw(2, members)), (draw(2), draw(members)), "tanh", gates)


def combination(units: int) -> Combination:
    """Of two members; with hidden units a network."""
    weights = RANDOM.normal(size=units or 2)
    fitted = Weights(
        np.array([-1.0, 0.4]), np.array([0.7, 2.0]), RANDOM.normal(size=(2, units)),
        RANDOM.normal(size=units), weights, np.array(-0.3),
    )  # fmt: skip
    points = {"balanced": 0.5, "sensitive": 0.2}
    return Combination(("one", "two"), "blend", fitted, 1.7, 0.2, points, Alarm(0.1, 0.1, 0.1, 0.9, 20))


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_parts_of_the_items_add_up_to_the_logit_of_the_member(summary, count) -> None:
    score, weight = RANDOM.random(count).astype(np.float32), RANDOM.random(count)
    for by in (None, weight):
        for mean in (-2.0, 1.0):
            parts = scored(score, by, summary).parts(mean)
            assert parts.sum() == pytest.approx(float(summary_logit(summary, score, by)) - mean, abs=1e-6)


def test_a_patient_who_looks_like_the_mean_patient_has_no_evidence() -> None:
    parts = scored(np.full(4, expit(-2.0)), None, "blend").parts(-2.0)
    np.testing.assert_allclose(parts, 0, atol=1e-6)


def test_parts_of_a_head_on_bags_add_up_and_follow_its_attention() -> None:
    head_on_bags, views = head(), [RANDOM.normal(size=(9, 3)) for _ in range(3)]
    found = attended([gates_and_logits(head_on_bags, view) for view in views])
    score = np.mean([attend(head_on_bags, view)[0] for view in views])
    assert found.parts(0.3).sum() == pytest.approx(logit(score) - 0.3, abs=1e-6)
    expected = np.mean([attend(head_on_bags, view)[1] for view in views], axis=0)
    np.testing.assert_allclose(found.attention, expected)
    assert found.attention.sum() == pytest.approx(1)


@pytest.mark.parametrize("units", [0, 3], ids=["linear", "network"])
def test_evidence_adds_up_to_the_logit_of_the_patient(units) -> None:
    made = combination(units)
    cells = {
        "one": scored(RANDOM.random(6), None, "blend"),
        "two": attended([gates_and_logits(head(), np.ones((6, 3)))]),
    }
    mean = made.fitted.mean
    logits = np.array([cells[name].parts(at).sum() + at for name, at in zip(made.members, mean, strict=True)])
    found = evidence_of(list("abcdef"), cells, made, logits)
    assert list(found.columns) == ["score_one", "score_two", "attention_two"]
    total = made.logit(logits[None])[0] - made.logit(mean[None])[0]
    assert found.evidence.sum() == pytest.approx(total, abs=1e-6)
    # A patient without items of the second member has the evidence of the first alone.
    logits[1] = np.nan
    alone = evidence_of(list("abcdef"), {"one": cells["one"]}, made, logits)
    total = made.logit(logits[None])[0] - made.logit(mean[None])[0]
    assert alone.evidence.sum() == pytest.approx(total, abs=1e-6)


def test_a_cell_with_a_higher_score_has_more_evidence() -> None:
    score = np.array([0.1, 0.9, 0.5])
    assert np.argsort(scored(score, None, "blend").parts(-1.0)).tolist() == [0, 2, 1]
