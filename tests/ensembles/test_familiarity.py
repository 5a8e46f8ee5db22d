"""Patients who are like the training patients have small distances, others large ones."""

import numpy as np
import pandas as pd
import pytest

from aplsmear.ensembles.familiarity import (
    Moments,
    describe_features,
    describe_stain,
    how_stained,
    make_cloud,
    stain_of,
)
from aplsmear.features.store import Features
from aplsmear.images.reading import encode_jpeg
from aplsmear.images.view_store import View

PINK, DARK, BLUE = (220, 190, 205), (150, 110, 140), (170, 190, 225)


def people(count: int, seed: int, numbers: int = 200) -> np.ndarray:
    """Patients who differ along a few directions, and a little in everything."""
    directions = np.random.default_rng(1).normal(size=(4, numbers))
    random = np.random.default_rng(seed)
    return random.normal(size=(count, 4)) @ directions + 0.3 * random.normal(size=(count, numbers)) + 5


def picture(colour: tuple[int, int, int], item: str = "c", seed: int = 0) -> View:
    noise = np.random.default_rng(seed).normal(0, 8, (24, 24, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    return View(item, 0, encode_jpeg(pixels))


def test_similar_new_patients_are_mostly_within_the_limit_and_others_are_not() -> None:
    cloud = make_cloud(people(60, 2), np.arange(60) % 5)
    alike = np.array([cloud.distance(each) for each in people(400, 3)])
    assert 0.9 < (alike <= 1).mean() < 1
    assert all(cloud.distance(each) > 1 for each in people(20, 4) + 3)


def test_the_limit_comes_from_held_out_patients() -> None:
    """Measured in their own cloud, 20 patients with 200 numbers are all nearer than a new patient can be."""
    patients = people(20, 2)
    cloud = make_cloud(patients, np.arange(20) % 5)
    assert max(cloud.distance(each) for each in patients) < 0.9
    assert np.mean([cloud.distance(each) for each in people(100, 3)]) < 1


def test_a_number_that_never_varied_does_not_decide_alone() -> None:
    patients = people(40, 2)
    patients[:, 0] = 0
    cloud = make_cloud(patients, np.arange(40) % 5)
    stranger = people(1, 3)[0]
    stranger[0] = 0
    before = cloud.distance(stranger)
    stranger[0] = 0.01
    assert cloud.distance(stranger) == pytest.approx(before, rel=0.01)


def test_moments_of_rows_that_are_added_part_by_part() -> None:
    rows = np.random.default_rng(1).normal(3, 2, (50, 7)).astype(np.float16)
    moments = Moments()
    for part in np.array_split(rows, 6):
        moments.add(part)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(moments.describe(), np.concatenate([exact.mean(0), exact.std(0)]))


def test_patients_are_described_by_their_plain_views_alone() -> None:
    index = pd.DataFrame({"item": ["b", "b", "a", "c"], "view": [0, 1, 0, 0]})
    values = np.array([[1], [100], [3], [50]], np.float16)
    found = describe_features(Features("net/layer", index, values), {"b": "q", "a": "q"})
    assert {patient: numbers.tolist() for patient, numbers in found.items()} == {"q": [2.0, 1.0]}
    batches = [[picture(PINK, "b"), View("b", 1, b"augmented: not read")], [picture(PINK, "x")]]
    assert list(describe_stain(batches, {"b": "q"})) == ["q"]


@pytest.mark.parametrize(
    ("colour", "words"), [(PINK, ""), (DARK, "darker"), (BLUE, "bluer"), ((235, 215, 170), "redder")]
)
def test_how_a_stain_differs_in_words(colour, words) -> None:
    random = np.random.default_rng(5)
    lamps = [np.array(PINK) + random.normal(0, 6, 3) for _ in range(40)]
    common = np.array([stain_of(picture(tuple(lamp), seed=n)) for n, lamp in enumerate(lamps)])
    cloud = make_cloud(common, np.arange(40) % 5)
    found = stain_of(picture(colour, seed=99))
    assert (cloud.distance(found) > 1) == bool(words)
    assert words in how_stained(cloud, found)
