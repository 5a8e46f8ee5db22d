"""Augmented views: the changes that imgaug describes, made by fewer steps."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from aplsmear.images.augmentation import (
    Change,
    Pyramid,
    draw_change,
    make_augmenter,
    recoloured,
    source_factor,
    view_matrix,
)
from aplsmear.images.reading import decode
from aplsmear.images.views import cell_views, cut, smear_views
from aplsmear.params import Augment

OFF = {"margin": 0.0, "rotate": 0.0, "scale": 0.0, "shift": 0.0, "hue": 0, "saturation": 0, "brightness": 0.0}
OFF |= {"blur": 0.0, "noise": 0.0, "views": 2, "extra_views": {}}
OFF |= {"size": {"cell": 40, "smear": 48}}
GEOMETRY = {"rotate": 180.0, "scale": 0.2, "shift": 0.1}
COLOURS = {"hue": 20, "saturation": 60, "brightness": 0.4, "blur": 2.0, "noise": 20.0}
NOTHING = Change(False, 0, 0.0, 1.0, (0.0, 0.0), 0, 0, 1.0, 0.0, 0.0, 1)
BOX = (80, 100, 160, 180)  # 80 px


def settings(**changed: object) -> Augment:
    return Augment(**OFF | changed)


@pytest.fixture(scope="module")
def smear() -> np.ndarray:
    """A smooth field with a cell that no flip and no turn leaves as it is."""
    y, x = np.mgrid[:240, :320]
    field = np.array((230, 200, 205)) * (0.9 + 0.1 * np.sin(y / 9) * np.cos(x / 7))[..., None]
    field[np.hypot(y - 120, x - 140) < 34] = (90, 40, 130)
    field[np.hypot(y - 104, x - 130) < 12] = (200, 60, 90)
    field[np.hypot(y - 128, x - 156) < 8] = (60, 160, 190)
    return cv2.GaussianBlur(field.astype(np.uint8), (0, 0), 2)


def view_of(smear: np.ndarray, change: Change, size: int, box: tuple[int, int, int, int] = BOX) -> np.ndarray:
    side = box[2] - box[0]
    matrix, shift = view_matrix(change, side / size, side)
    centre = np.array([(box[1] + box[3]) / 2, (box[0] + box[2]) / 2])
    return Pyramid(smear).warped(matrix, centre + shift, size)


def by_imgaug(
    wide: np.ndarray, knobs: Augment, change: Change, size: int, field: object = None
) -> np.ndarray:
    return make_augmenter(knobs, size, field, change).augment_image(wide)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


@pytest.mark.parametrize("size", [80, 40, 52])  # as large as the box, half of it, and between
def test_geometry_is_that_of_imgaug(size, smear):
    knobs = settings(**GEOMETRY)
    width = 2 * round(size * source_factor(knobs) / 2)
    wide = cut(smear, BOX, 80 * width / size, width)
    for seed in range(40):
        change = replace(NOTHING, **{name: getattr(draw_change(knobs, seed), name) for name in (
            "flip", "turns", "rotate", "scale", "shift")})  # fmt: skip
        ours, theirs = view_of(smear, change, size), by_imgaug(wide, knobs, change, size)
        assert apart(ours, theirs) < 1.5
        assert apart(ours, theirs) < apart(ours[::-1], theirs) / 5  # so the comparison can tell


def test_geometry_of_a_whole_smear_is_that_of_imgaug(smear):
    knobs, size = settings(**GEOMETRY), 48
    height, width = size, size * 320 // 240
    field = cv2.resize(smear, (width, height), interpolation=cv2.INTER_AREA)
    side = 2 * int(np.ceil(width * source_factor(knobs) / 2))
    above, left = (side - height) // 2, (side - width) // 2
    wide = cv2.copyMakeBorder(field, above, above, left, left, cv2.BORDER_REFLECT)
    for seed in range(20):
        change = draw_change(knobs, seed)
        sides = np.array([320.0, 240.0])
        matrix, shift = view_matrix(change, sides / size, 320.0)
        ours = Pyramid(smear).warped(matrix, sides / 2 + shift, size)
        theirs = by_imgaug(wide, knobs, change, size, (height, width))
        assert apart(ours, theirs) < 2.5
        assert apart(ours, theirs) < apart(ours[::-1], theirs) / 3


@pytest.mark.parametrize("blur", [2.0, 10.0])
def test_colours_and_focus_are_those_of_imgaug(blur, smear):
    knobs, view = settings(**COLOURS | {"blur": blur}), smear[80:160, 100:180]
    for seed in range(40):
        change = replace(draw_change(knobs, seed), flip=False, turns=0, noise=0.0)
        ours, theirs = recoloured(view, change), by_imgaug(view, knobs, change, 80)
        assert apart(ours, theirs) < 1
        assert np.abs(ours.astype(int) - theirs).max() <= 8  # imgaug rounds once more


def test_noise_is_as_wide_as_that_of_imgaug():
    grey = np.full((80, 80, 3), 128, np.uint8)
    for wide in (2.0, 4.0, 20.0):
        ours = recoloured(grey, replace(NOTHING, noise=wide)).astype(float) - 128
        theirs = by_imgaug(grey, settings(noise=1.0), replace(NOTHING, noise=wide), 80).astype(float) - 128
        assert abs(ours.mean()) < 0.05 * wide
        assert ours.std() == pytest.approx(theirs.std(), rel=0.05)
        assert np.corrcoef(ours[..., 0].ravel(), ours[..., 1].ravel())[0, 1] < 0.1


def test_views_are_as_bright_coloured_varied_and_sharp_as_those_of_imgaug(smear):
    """By their distribution: each draws its own random numbers."""
    knobs = settings(**GEOMETRY | COLOURS | {"blur": 0.8, "noise": 4.0}, size={"cell": 40, "smear": 48})
    width = round(40 * source_factor(knobs))
    wide, augmenter = cut(smear, BOX, 80 * width / 40, width), make_augmenter(knobs, 40)
    augmenter.seed_(1)
    theirs = np.stack([augmenter.augment_image(wide) for _ in range(400)])
    ours = np.stack([decode(view.image) for view in cell_views(Pyramid(smear), BOX, "a", 400, knobs, 1)][1:])

    def described(views: np.ndarray) -> np.ndarray:
        grey = [cv2.Laplacian(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.CV_64F).std() for view in views]
        means = views.mean(axis=(1, 2))
        return np.array(
            [*means.mean(axis=0), *means.std(axis=0), views.std(axis=(1, 2)).mean(), np.mean(grey)]
        )

    np.testing.assert_allclose(described(ours), described(theirs), rtol=0.1)


def test_with_every_setting_at_0_an_augmented_view_is_the_plain_one_flipped_or_turned(smear):
    plain = smear[80:160, 100:180]
    turned = [np.rot90(each, turns) for each in (plain, plain[:, ::-1]) for turns in range(4)]
    found = set()
    for seed in range(40):
        change = draw_change(settings(), seed)
        view = recoloured(view_of(smear, change, 80), change)
        (which,) = [place for place, one in enumerate(turned) if (view == one).all()]
        found.add(which)
    assert found == set(range(8))


@pytest.mark.parametrize("name", GEOMETRY | COLOURS)
def test_every_setting_changes_its_own_number_and_the_view(name, smear):
    different = []
    for seed in range(16):
        before = draw_change(settings(), seed)
        after = draw_change(settings(**{name: (GEOMETRY | COLOURS)[name]}), seed)
        assert replace(before, **{name: getattr(after, name)}) == after
        views = (recoloured(view_of(smear, change, 40), change) for change in (before, after))
        different.append(apart(*views) > 0.1)
    assert sum(different) >= 9


def test_numbers_fill_their_ranges_evenly():
    knobs = settings(**GEOMETRY | COLOURS)
    drawn = [draw_change(knobs, seed) for seed in range(4000)]
    for name, low, high in (
        ("rotate", -180, 180), ("scale", 0.8, 1.2), ("brightness", 0.6, 1.4), ("blur", 0, 2),
        ("noise", 0, 20),
    ):  # fmt: skip
        values = (np.array([getattr(change, name) for change in drawn]) - low) / (high - low)
        assert np.histogram(values, 4, (0, 1))[0] == pytest.approx(1000, rel=0.12)
    assert {change.hue for change in drawn} == set(range(-20, 21))
    assert {change.saturation for change in drawn} == set(range(-60, 61))
    assert {(change.flip, change.turns) for change in drawn} == {
        (f, t) for f in (False, True) for t in range(4)
    }


def test_a_change_of_hue_leaves_white_white():
    white = np.full((32, 32, 3), 255, np.uint8)
    assert (recoloured(white, replace(NOTHING, hue=20, saturation=0)) == 255).all()


def test_a_view_reaches_no_further_than_its_source():
    knobs = settings(**GEOMETRY)
    side = round(64 * source_factor(knobs)) + 2

    def rims_seen(side: int) -> int:
        rimmed = np.pad(np.full((side - 2, side - 2, 3), 255, np.uint8), ((1, 1), (1, 1), (0, 0)))
        box = ((side - 64) // 2, (side - 64) // 2, (side + 64) // 2, (side + 64) // 2)
        return sum(view_of(rimmed, draw_change(knobs, seed), 64, box).min() < 255 for seed in range(100))

    assert rims_seen(side + side % 2) == 0
    assert rims_seen(90) > 20


@pytest.mark.parametrize(
    "box", [(-20, -10, 60, 70), (200, 280, 280, 360), (0, 0, 20, 20), (80, 100, 160, 180)]
)
@pytest.mark.parametrize("size", [20, 40])
def test_beyond_the_smear_its_edge_is_mirrored(box, size, smear):
    far = cv2.copyMakeBorder(smear, 160, 160, 160, 160, cv2.BORDER_REFLECT)
    there = tuple(side + 160 for side in box)
    for seed in range(10):
        change = draw_change(settings(**GEOMETRY), seed)
        np.testing.assert_array_equal(view_of(smear, change, size, box), view_of(far, change, size, there))


def test_a_smear_wider_than_opencv_can_warp():
    wide = np.random.default_rng(1).integers(0, 256, (64, 33_000, 3)).astype(np.uint8)
    box, part = (0, 32_900, 64, 32_964), wide[:, 32_768:]
    change = draw_change(settings(), 1)
    expected = view_of(part, change, 64, (0, 132, 64, 196))
    np.testing.assert_array_equal(view_of(wide, change, 64, box), expected)
    assert len(list(smear_views(Pyramid(wide), "a", 2, settings(**GEOMETRY), 1))) == 3


def test_a_view_that_shrinks_the_smear_uses_every_pixel():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 200
    for size in (16, 30, 100):
        assert np.abs(view_of(stripes, NOTHING, size, (0, 0, 256, 256)).astype(int) - 100).max() <= 40
    assert (view_of(stripes, NOTHING, 16, (0, 0, 256, 256)) == 100).all()
