"""Views of cells and smears: what a plain one shows, what an augmented one may change, and by what."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from processors import INSTALL, can_emulate, output_of

from aplsmear.errors import UserError
from aplsmear.images.augmentation import Pyramid
from aplsmear.images.reading import decode, encode_jpeg
from aplsmear.images.views import (
    cell_views,
    cut,
    resize,
    smear_views,
    unused_labels,
    view_multipliers,
    view_seed,
)
from aplsmear.params import Augment
from made_views import all_views

OFF = {"margin": 0.0, "rotate": 0.0, "scale": 0.0, "shift": 0.0, "hue": 0, "saturation": 0, "brightness": 0.0}
OFF |= {"blur": 0.0, "noise": 0.0}
KNOBS = {"rotate": 45.0, "scale": 0.3, "shift": 0.2, "hue": 20, "saturation": 60, "brightness": 0.4}
KNOBS |= {"blur": 2.0, "noise": 20.0}
PINK, PURPLE = (230, 200, 205), (90, 40, 130)


def knobs(**changed: object) -> Augment:
    return Augment(**({"size": {"cell": 32, "smear": 48}, "views": 2, "extra_views": {}} | OFF | changed))


@pytest.fixture(scope="module")
def smear() -> np.ndarray:
    """A smooth field with a purple 40 px cell whose upper left corner is at (y, x) = (30, 60)."""
    y, x = np.mgrid[:120, :160]
    field = np.array(PINK) * (0.9 + 0.1 * np.sin(y / 9) * np.cos(x / 7))[..., None]
    field[30:70, 60:100] = PURPLE
    field[34:42, 64:80] = (200, 60, 90)  # something that a turn or a flip moves
    return field.astype(np.uint8)


BOX = (30, 60, 70, 100)


def test_a_plain_view_shows_the_box_and_its_margin_or_the_middle_of_the_box(smear):
    (plain,) = cell_views(Pyramid(smear), BOX, "1", 0, knobs(size={"cell": 40, "smear": 48}), 1)
    assert (plain.item, plain.view) == ("1", 0)
    assert plain.image == encode_jpeg(smear[30:70, 60:100])
    (wider,) = cell_views(Pyramid(smear), BOX, "1", 0, knobs(size={"cell": 60, "smear": 48}, margin=0.5), 1)
    assert wider.image == encode_jpeg(smear[20:80, 50:110])
    (middle,) = cell_views(Pyramid(smear), BOX, "1", 0, knobs(size={"cell": 20, "smear": 48}, margin=-0.5), 1)
    assert middle.image == encode_jpeg(smear[40:60, 70:90])


def test_colours_stay_in_the_order_red_green_blue(smear):
    plain, changed = (decode(view.image) for view in cell_views(Pyramid(smear), BOX, "1", 1, knobs(), 1))
    for view in (plain, changed):
        assert np.abs(np.median(view, axis=(0, 1)) - PURPLE).max() < 8


def test_an_oblong_box_is_cut_as_a_square_around_its_middle(smear):
    assert (cut(smear, (40, 60, 60, 100), 40, 40) == smear[30:70, 60:100]).all()


def test_beyond_the_smear_its_edge_is_mirrored():
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    corner = cut(image, (0, 0, 4, 4), 8, 8)  # reaches 2 px beyond, up and to the left
    assert (corner[2:, 2:] == image[:6, :6]).all()
    assert (corner[1::-1, 2:] == image[:2, :6]).all()
    assert (corner[2:, 1::-1] == image[:6, :2]).all()
    assert cut(image, (6, 6, 10, 10), 100, 32).shape == (32, 32, 3)  # wider than the whole smear


def test_shrinking_averages_and_does_not_skip():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert (resize(stripes, 16) == 100).all()


def test_a_smear_is_shown_whole(smear):
    plain, *others = smear_views(Pyramid(smear), "7", 2, knobs(), 1)
    assert plain.image == encode_jpeg(resize(smear, 48))
    assert [(view.item, view.view) for view in others] == [("7", 1), ("7", 2)]
    assert all(decode(view.image).shape == (48, 48, 3) for view in others)


def test_a_view_depends_on_seed_item_and_view_alone(smear):
    settings = knobs(**KNOBS)
    three = {view.view: view.image for view in cell_views(Pyramid(smear), BOX, "1", 3, settings, 5)}
    one = {view.view: view.image for view in cell_views(Pyramid(smear), BOX, "1", 1, settings, 5)}
    assert one.items() <= three.items()
    list(cell_views(Pyramid(smear), BOX, "other", 2, settings, 5))  # what came before does not matter
    assert {view.view: view.image for view in cell_views(Pyramid(smear), BOX, "1", 3, settings, 5)} == three
    assert len(set(three.values())) == 4
    for item, seed in (("2", 5), ("1", 6)):
        other = {view.view: view.image for view in cell_views(Pyramid(smear), BOX, item, 3, settings, seed)}
        assert other[0] == three[0]
        assert not {other[view] for view in (1, 2, 3)} & {three[view] for view in (1, 2, 3)}


def test_view_seeds_are_what_they_were():
    """They are part of the record: with others the same parameters would give other pictures."""
    assert view_seed(1, "17", 1) == 341913195
    assert len({view_seed(seed, item, view) for seed in (1, 2) for item in "abc" for view in (1, 2)}) == 12


CELLS = pd.DataFrame(
    {
        "cell": ["1", "2", "3"],
        "smear": ["1", "1", "3"],
        "patient": ["P1", "P1", "P3"],
        "special_characteristics": ["Auer rods|Faggot cell", "None", ""],
        "diagnosis": ["apl", "apl", "healthy"],
        "y0": [30, 0, 10],
        "x0": [60, 0, 10],
        "y1": [70, 30, 40],
        "x1": [100, 30, 50],
    }
)
SMEARS = pd.DataFrame(
    {
        "smear": ["1", "2", "3"],
        "patient": ["P1", "P2", "P3"],
        "image": ["a.png", "b.png", "c.png"],
        "diagnosis": ["apl", "aml", "healthy"],
    }
)


def test_rare_items_get_as_many_copies_as_their_most_wanted_label_says():
    assert view_multipliers(CELLS, {"Auer rods": 3, "Faggot cell": 6, "apl": 2}).tolist() == [6, 2, 1]
    assert view_multipliers(CELLS, {}).tolist() == [1, 1, 1]
    assert view_multipliers(SMEARS, {"apl": 2}).tolist() == [2, 1, 1]


def test_a_misspelt_rare_label_is_an_error_and_an_absent_one_is_named():
    assert unused_labels({"Auer rods": 3, "Mitosis": 2, "apl": 2}, [SMEARS, CELLS]) == ["Mitosis"]
    with pytest.raises(UserError, match=r"'Auer rods'\?\)\n.*'APL' .*'apl'\?"):
        unused_labels({"Auer rod": 3, "APL": 2}, [SMEARS, CELLS])
    assert unused_labels({"apl": 2}, [SMEARS[1:], CELLS[2:]]) == ["apl"]  # no aml was meant


@pytest.fixture
def folder(tmp_path, smear) -> Path:
    for shade, name in enumerate(SMEARS["image"]):
        Image.fromarray(smear - np.uint8(5 * shade)).save(tmp_path / name)
    return tmp_path


def test_views_of_a_data_set_by_hand(folder, smear, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    settings = knobs(**KNOBS, extra_views={"Faggot cell": 3, "apl": 2})
    first, second, third = all_views(folder, SMEARS, CELLS, settings, 1)
    assert [(view.item, view.view) for view in first["smear"]] == [("1", view) for view in range(5)]
    assert [(view.item, view.view) for view in second["smear"]] == [("2", 0), ("2", 1), ("2", 2)]
    assert [(view.item, view.view) for view in first["cell"]] == [
        *[("1", view) for view in range(7)],
        *[("2", view) for view in range(5)],
    ]
    assert second["cell"] == []
    assert [view.item for view in third["cell"]] == ["3", "3", "3"]
    assert first["cell"] == [
        *cell_views(Pyramid(smear), BOX, "1", 6, settings, 1),
        *cell_views(Pyramid(smear), (0, 0, 30, 30), "2", 4, settings, 1),
    ]


def test_the_image_of_a_smear_is_opened_once(folder, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    opened, plain = [], Path.open

    def noting(path: Path, *arguments: object, **options: object) -> object:
        opened.append(path)
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", noting)
    list(all_views(folder, SMEARS, CELLS, knobs(), 1))
    of_smears = [path for path in opened if path.parent == folder]
    assert sorted(of_smears) == sorted(folder / image for image in SMEARS["image"])


def test_another_order_of_smears_and_cells_gives_the_same_views(folder, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    settings = knobs(**KNOBS)

    def views(smears: pd.DataFrame, cells: pd.DataFrame) -> set:
        return {
            (level, view)
            for group in all_views(folder, smears, cells, settings, 1)
            for level, of_level in group.items()
            for view in of_level
        }

    assert views(SMEARS, CELLS) == views(SMEARS[::-1], CELLS[::-1])


def test_a_data_set_without_cells_has_views_of_smears_alone(folder, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    groups = list(all_views(folder, SMEARS, CELLS[:0], knobs(), 1))
    assert all(group["cell"] == [] and len(group["smear"]) == 3 for group in groups)


def test_one_process_and_two_give_the_same_bytes(folder):
    SMEARS.to_csv(folder / "smears.csv", index=False)
    CELLS.to_csv(folder / "cells.csv", index=False)
    code = f"""
import sys
from pathlib import Path
from aplsmear.params import Augment
from aplsmear.images.view_store import view_writer
from aplsmear.tables import read_table
from aplsmear.images.views import parts_of, views_of_parts
here = Path(sys.argv[1])
settings = Augment.model_validate_json('{knobs(**KNOBS).model_dump_json()}')
with view_writer({{level: Path(sys.argv[2]) / level for level in ("cell", "smear")}}) as write:
    tables = [read_table(here / f"{{level}}s.csv") for level in ("smear", "cell")]
    for views in views_of_parts(parts_of(here, *tables, settings), settings, 1):
        write(views)
"""
    written = []
    for count in ("1", "2"):
        output_of(code, str(folder), str(folder / count), LOKY_MAX_CPU_COUNT=count)
        written.append([(folder / count / level).read_bytes() for level in ("cell", "smear")])
    assert written[0] == written[1]


ALL_CHANGES = """
import hashlib, sys
import aplsmear
import cv2
import numpy as np
from aplsmear.images.augmentation import Pyramid
from aplsmear.images.views import cell_views, smear_views
from aplsmear.params import Augment
cv2.setNumThreads(int(sys.argv[2]))
settings = Augment.model_validate_json(sys.argv[1])
field = np.random.default_rng(1).integers(0, 256, (300, 400, 3)).astype(np.uint8)
smear = Pyramid(cv2.resize(field[:30, :40], (400, 300), interpolation=cv2.INTER_LINEAR))
boxes = [(100, 100, 140, 160), (0, 0, 90, 90), (200, 300, 300, 400), (150, 200, 165, 215)]
views = [view for box in boxes for view in cell_views(smear, box, str(box), 8, settings, 1)]
views += smear_views(smear, "a", 8, settings, 1)
print(len(views), hashlib.sha256(b"".join(view.image for view in views)).hexdigest())
"""


def digest_of_views(threads: int = 1, processor: str = "") -> str:
    """A hash of views in which everything changes, from a process of its own."""
    return output_of(ALL_CHANGES, knobs(**KNOBS).model_dump_json(), str(threads), processor=processor)


def test_views_are_the_same_bytes_with_any_number_of_threads():
    assert digest_of_views(threads=1) == digest_of_views(threads=4)


@pytest.mark.skipif(not can_emulate(), reason=INSTALL)
@pytest.mark.parametrize("processor", ["Haswell", "EPYC"])
def test_views_are_the_same_bytes_on_another_processor(processor):
    """By Intel and by AMD, with AVX2 and without AVX-512, emulated."""
    assert digest_of_views(processor=processor) == digest_of_views()
