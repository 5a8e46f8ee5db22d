"""Folds by patient: no patient on both sides, each held out once, for any order of the table."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aplsmear.errors import UserError
from aplsmear.evaluation.splits import inner_sets, make_folds, outer_set, tuning_sets

few = settings(max_examples=25, deadline=None)

DIAGNOSES = ("aml", "apl", "healthy")


@st.composite
def smears(draw: st.DrawFn) -> tuple[pd.DataFrame, int]:
    """Smears of patients with one to three smears each, and a number of folds that they allow."""
    folds = draw(st.integers(3, 6))
    rows = []
    for diagnosis in DIAGNOSES[: draw(st.integers(2, 3))]:
        for number in range(draw(st.integers(folds, folds + 7))):
            rows += [(f"{diagnosis}-{number}", diagnosis)] * draw(st.integers(1, 3))
    return pd.DataFrame(rows, columns=["patient", "diagnosis"]), folds


@few
@given(smears(), st.integers(0, 2**31 - 1), st.randoms(use_true_random=False))
def test_every_patient_is_held_out_once_for_any_order_of_the_rows(found, seed, random):
    table, folds = found
    split = make_folds(table, folds, seed)
    assert split["patient"].tolist() == sorted(set(table["patient"]))
    assert set(split["fold"]) == set(range(folds))
    order = list(range(len(table)))
    random.shuffle(order)
    pd.testing.assert_frame_equal(make_folds(table.iloc[order], folds, seed), split)


@few
@given(smears(), st.integers(0, 2**31 - 1))
def test_each_fold_has_its_share_of_every_diagnosis(found, seed):
    split = make_folds(*found, seed)
    for _, theirs in split.groupby("diagnosis"):
        shares = [int((theirs["fold"] == fold).sum()) for fold in range(found[1])]
        assert max(shares) - min(shares) <= 1


def test_another_seed_gives_other_folds():
    table = pd.DataFrame([(f"p{n}", "apl") for n in range(20)], columns=["patient", "diagnosis"])
    assert make_folds(table, 5, 1)["fold"].tolist() != make_folds(table, 5, 2)["fold"].tolist()


@few
@given(smears(), st.integers(0, 99))
def test_no_patient_is_on_both_sides_of_any_split_outer_or_inner(found, seed):
    """Check every network and all patients that it scores, as in `tune` and in the ensembles."""
    table, folds = found
    fold_of = make_folds(table, folds, seed).set_index("patient")["fold"]

    def trained_on(held_out: frozenset[int]) -> set[str]:
        return set(fold_of.index[~fold_of.isin(held_out)])

    for outer_fold in range(folds + 1):
        own = set(fold_of.index[fold_of == outer_fold])  # no patients in the last outer fold
        scored = Counter()
        for inner, held_out in inner_sets(outer_fold, folds).items():
            theirs = set(fold_of.index[fold_of == inner])
            scored.update(theirs)
            assert not theirs & trained_on(held_out)
            assert not own & (trained_on(held_out) | theirs)  # the choice has not seen the held-out
            assert trained_on(held_out) | theirs | own == set(fold_of.index)  # no other patient is left out
        assert scored == Counter(set(fold_of.index) - own)  # every other patient, once
        assert trained_on(outer_set(outer_fold, folds)) == set(fold_of.index) - own


@pytest.mark.parametrize("folds", range(3, 8))
def test_the_networks_of_a_trial_serve_every_outer_fold(folds):
    sets = tuning_sets(folds)
    assert len(sets) == len(set(sets)) == folds * (folds - 1) // 2
    for outer_fold in range(folds):
        assert set(inner_sets(outer_fold, folds).values()) == {pair for pair in sets if outer_fold in pair}
    assert set(inner_sets(folds, folds).values()) == {frozenset({fold}) for fold in range(folds)}
    assert outer_set(folds, folds) == frozenset()


def patients(**counts: int) -> pd.DataFrame:
    rows = [(f"{name}{n}", name) for name, count in counts.items() for n in range(count)]
    return pd.DataFrame(rows, columns=["patient", "diagnosis"])


def test_folds_of_six_patients():
    split = make_folds(patients(apl=3, healthy=3), 3, 1)
    assert list(split.columns) == ["patient", "diagnosis", "fold"]
    assert split["patient"].tolist() == ["apl0", "apl1", "apl2", "healthy0", "healthy1", "healthy2"]
    assert split["fold"].dtype == np.int64
    assert sorted(split["fold"][:3]) == sorted(split["fold"][3:]) == [0, 1, 2]


def test_too_few_patients_are_an_error_that_names_them_and_the_remedy():
    with pytest.raises(UserError, match=r"apl: 4, healthy: 3: set split\.folds in params\.yaml to 3 or add"):
        make_folds(patients(apl=4, aml=5, healthy=3), 5, 1)
    with pytest.raises(UserError, match=r"apl: 2: add patients$"):  # two folds would not do
        make_folds(patients(apl=2, aml=5), 5, 1)


def test_a_data_set_without_patients_is_an_error():
    with pytest.raises(UserError, match="no patient"):
        make_folds(patients(apl=1)[:0], 5, 1)
    with pytest.raises(UserError, match="no patient"):
        make_folds(of_sites("a")[:0], 5, 1, by="site")


@st.composite
def smears_of_sites(draw: st.DrawFn) -> tuple[pd.DataFrame, int]:
    """Sites that each have two diagnoses, and a number of folds up to theirs."""
    sites = draw(st.integers(3, 7))
    rows = []
    for site in range(sites):
        for diagnosis in DIAGNOSES[:2]:
            for number in range(draw(st.integers(1, 6))):
                rows += [(f"{site}-{diagnosis}-{number}", diagnosis, f"s{site}")] * draw(st.integers(1, 2))
    return pd.DataFrame(rows, columns=["patient", "diagnosis", "site"]), draw(st.integers(3, sites))


@few
@given(smears_of_sites(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_no_site_is_on_two_sides_of_a_split(found, seed, random):
    table, folds = found
    split = make_folds(table, folds, seed, by="site")
    assert list(split.columns) == ["patient", "diagnosis", "fold"]
    site = split["patient"].map(table.drop_duplicates("patient").set_index("patient")["site"])
    assert len(set(zip(site, split["fold"], strict=True))) == len(set(site))
    assert set(split["fold"]) == set(range(folds))
    assert all(set(theirs["diagnosis"]) == set(split["diagnosis"]) for _, theirs in split.groupby("fold"))
    order = list(range(len(table)))
    random.shuffle(order)
    pd.testing.assert_frame_equal(make_folds(table.iloc[order], folds, seed, by="site"), split)


def of_sites(*sites: str) -> pd.DataFrame:
    """A patient with APL and one with AML at each site named."""
    rows = [(f"{kind}{place}", kind, site) for place, site in enumerate(sites) for kind in ("apl", "aml")]
    return pd.DataFrame(rows, columns=["patient", "diagnosis", "site"])


def test_with_as_many_folds_as_sites_one_site_is_left_out_at_a_time():
    split = make_folds(of_sites("b", "a", "c", "a"), 3, 1, by="site").set_index("patient")["fold"]
    assert split.to_dict() == {
        "apl1": 0,
        "aml1": 0,
        "apl3": 0,
        "aml3": 0,
        "apl0": 1,
        "aml0": 1,
        "apl2": 2,
        "aml2": 2,
    }


def test_sites_that_cannot_be_split_are_an_error_with_the_remedy():
    with pytest.raises(UserError, match=r"no smear has a site: add a column `site`"):
        make_folds(of_sites("", "", "", ""), 3, 1, by="site")
    with pytest.raises(
        UserError, match=r"need at least 5 sites, but there are 3: a, b, c\. .* split\.folds to 3"
    ):
        make_folds(of_sites("a", "b", "c", "c", "b"), 5, 1, by="site")
    table = of_sites("a", "b", "c", "")
    table.loc[len(table)] = ["apl0", "apl", "b"]
    with pytest.raises(UserError) as error:
        make_folds(table, 3, 1, by="site")
    assert "2 patients have no site: aml3, apl3" in str(error.value)
    assert "patient 'apl0' has the sites a, b: correct the column `site`" in str(error.value)
    lopsided = of_sites("a", "b", "c", "c")[lambda each: ~each["patient"].isin(["apl1"])]
    with pytest.raises(
        UserError, match=r"fold 1 \(sites: b\) would have no patient with apl\nEach of 3 folds"
    ):
        make_folds(lopsided, 3, 1, by="site")
