"""Colours brought to a reference: two laboratories' pictures of one smear become alike."""

import numpy as np
import pytest
from laboratories import Laboratory, shifted

from aplsmear.images.stains import StainError, normalised

OTHER = Laboratory((-1.0, 0.6, 0.0), (1.0, -0.6), -0.5, 0.0, 0.0, 0.0)
PALE = Laboratory((-1.0, -0.6, -0.8), (0.0, 0.0), 0.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def smear() -> np.ndarray:
    random = np.random.Generator(np.random.Philox(1))
    y, x = np.mgrid[:120, :160]
    field = np.array([235, 215, 218]) * np.ones((120, 160, 1))
    field[np.hypot(y - 40, x - 50) < 30] = (150, 110, 190)
    field[np.hypot(y - 40, x - 50) < 20] = (90, 40, 130)
    field[np.hypot(y - 80, x - 110) < 25] = (205, 150, 160)
    return np.clip(field + random.normal(0, 6, (120, 160, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("method", "laboratory"), [("reinhard", OTHER), ("macenko", PALE)])
def test_another_laboratory_looks_much_the_same_afterwards(method, laboratory, smear):
    """Macenko takes the lamp for white: stain is what it undoes."""
    elsewhere = shifted(smear, laboratory, 1.0, ("stain", "white_balance", "gamma"))

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.abs(one.astype(float) - other).mean())

    before = apart(smear, elsewhere)
    assert apart(normalised(smear, method), normalised(elsewhere, method)) < before / 2


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_pictures_stay_pictures_and_bytes_stay_the_same(method, smear):
    first, second = normalised(smear, method), normalised(smear.copy(), method)
    assert first.dtype == np.uint8
    assert first.shape == smear.shape
    assert (first == second).all()
    assert np.corrcoef(first.mean(2).ravel(), smear.mean(2).ravel())[0, 1] > 0.95  # dark stays dark


def test_none_is_none(smear):
    assert normalised(smear, "none") is smear


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_an_empty_field_is_an_error(method):
    with pytest.raises(StainError, match="hardly anything in it is stained"):
        normalised(np.full((64, 64, 3), 245, np.uint8), method)
