"""Another laboratory: what it changes, how far, and that its changes are one laboratory's."""

import numpy as np
import pytest
from laboratories import (
    KINDS,
    REAL,
    STAIN,
    STRENGTHS,
    Laboratory,
    colours_of,
    draw_laboratory,
    recoloured,
    shifted,
)
from skimage.color import hed2rgb, rgb2hed

EDGE = Laboratory((1.0, -1.0, 1.0), (1.0, -1.0), 1.0, 1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def smear() -> np.ndarray:
    """Purple cells with fine grains on a pink field."""
    random = np.random.Generator(np.random.Philox(1))
    y, x = np.mgrid[:96, :128]
    field = np.array([232, 205, 210]) * np.ones((96, 128, 1))
    field[np.hypot(y - 40, x - 50) < 25] = (120, 70, 150)
    return (field + random.integers(-12, 12, (96, 128, 1))).astype(np.uint8)


def change(smear: np.ndarray, *arguments) -> float:
    return float(np.abs(shifted(smear, *arguments).astype(float) - smear).mean())


def test_at_strength_0_nothing_changes(smear):
    assert (shifted(smear, EDGE, 0.0) == smear).all()
    assert (shifted(smear, EDGE, 1.0, ()) == smear).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_more_at_each_strength(kind, smear):
    first, second, third = (change(smear, EDGE, strength, (kind,)) for strength in STRENGTHS.values())
    assert 0.3 < first < second < third
    assert shifted(smear, EDGE, 1.0, (kind,)).shape == smear.shape


def test_a_laboratory_changes_everything_the_same_way(smear):
    """Colours of a pixel depend on that pixel alone, not on what else the smear shows."""
    colours = ("stain", "white_balance", "gamma")
    whole = shifted(smear, EDGE, 1.0, colours)
    assert (shifted(smear[:20, 30:], EDGE, 1.0, colours) == whole[:20, 30:]).all()


def test_stain_is_that_of_haematoxylin_and_eosin(smear):
    """As scikit-image separates and mixes them, where no amount is below 0 (which it cuts off)."""
    stains = np.moveaxis(np.mgrid[1:6, 1:6, 1:3], 0, -1).reshape(10, 5, 3) * 0.04
    image = np.rint(255 * hed2rgb(stains)).astype(np.uint8)
    expected = 255 * hed2rgb(rgb2hed(image) * (1 + STAIN * np.array(EDGE.stain)))
    assert np.abs(shifted(image, EDGE, 1.0, ("stain",)) - expected).max() <= 1.0


def test_white_stays_white_whatever_the_stain(smear):
    white = np.full((8, 8, 3), 255, np.uint8)
    assert (shifted(white, EDGE, 2.0, ("stain", "gamma", "blur", "resolution")) == 255).all()


def test_focus_and_pixels_lose_detail_and_keep_brightness(smear):
    for kind in ("blur", "resolution"):
        out = shifted(smear, EDGE, 1.0, (kind,)).astype(float)
        assert out.std() < smear.std()
        assert out.mean() == pytest.approx(smear.mean(), abs=1)


def test_laboratories_differ_and_are_drawn_from_seed_and_number():
    drawn = {draw_laboratory(seed, number) for seed in (1, 2) for number in range(3)}
    assert len(drawn) == 6
    assert draw_laboratory(1, 0) == draw_laboratory(1, 0)
    assert all(0.5 <= abs(far) <= 1 for one in drawn for far in (*one.stain, *one.white_balance, one.gamma))


@pytest.mark.parametrize("name", REAL)
def test_cells_get_the_colours_of_a_real_laboratory(name, smear):
    """Within what 8 bits and their limits allow."""
    mean, spread = colours_of([recoloured(smear, colours_of([smear]), REAL[name])])
    assert np.abs(np.array(mean) - REAL[name][0]).max() < 4
    assert np.abs(np.array(spread) - REAL[name][1]).max() < 4
    assert np.abs(recoloured(smear, REAL[name], REAL[name]).astype(int) - smear).max() <= 1
