"""What `aplsmear check` says about pictures: how they were read, and in which nothing may be seen."""

import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from aplsmear.compute.engine import Here
from aplsmear.data.dataset import DataSetError, names_of, read_data_set

Y, X = np.mgrid[0:192, 0:256]


def field(seed: int) -> np.ndarray:
    """A pale field with thirty purple discs."""
    dice = np.random.default_rng(seed)
    found = np.full((192, 256, 3), (225, 205, 215), np.int16)
    for y, x, radius in dice.integers((10, 10, 6), (182, 246, 12), (30, 3)).tolist():
        cv2.circle(found, (x, y), radius, (130, 70, 150), -1)
    return (found + dice.normal(0, 3, found.shape)).clip(0, 255).astype(np.uint8)


FIELDS = [field(seed) for seed in range(6)]


def write(folder: Path, pictures: dict[str, np.ndarray], names: list[str] | None = None) -> None:
    (folder / "wsi").mkdir()
    for name, pixels in pictures.items():
        path = folder / "wsi" / name
        tifffile.imwrite(path, pixels) if name.endswith(".tif") else Image.fromarray(pixels).save(path)
    rows = [f"{number},{name},{{'healthy'}}\n" for number, name in enumerate(names or pictures)]
    (folder / "wsi.csv").write_text("id,imgName,label\n" + "".join(rows), encoding="utf-8")


def read(folder: Path, **options):
    return read_data_set(
        folder, {}, **({"min_box": 8, "skip_bad_images": False, "engine": Here(1)} | options)
    )


def remarks(folder: Path) -> list[str]:
    unsaid = ("no patient column", "no labeled_cells.csv")
    return [one for one in read(folder).report["remarks"] if not one.startswith(unsaid)]


def test_ordinary_pictures_need_no_remark(tmp_path):
    write(tmp_path, {f"{number}.png": pixels for number, pixels in enumerate(FIELDS)})
    assert remarks(tmp_path) == []


def with_burnt_in(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.copy()
    pixels[0, 0] = 65535
    pixels[150:190, 100:250] = 65535  # a scale bar: an eighth of the picture
    return pixels


def test_the_levels_of_a_set_are_those_of_its_histogram_whatever_is_burnt_in(tmp_path):
    deep = [pixels.astype(np.uint16) << 4 for pixels in FIELDS]
    deep[2] = with_burnt_in(deep[2])
    write(tmp_path, {f"{number}.tif": pixels for number, pixels in enumerate(deep)})
    names = ", ".join(f"wsi/{number}.tif" for number in range(5))
    assert remarks(tmp_path) == [
        f"pictures read so: levels of 12 of 16 bits, by its histogram: {names} and 1 more"
    ]


def test_pictures_of_other_levels_than_the_others_are_a_problem_that_names_both(tmp_path):
    """Else one camera would be four times too dark."""
    deep = {f"{number}.tif": pixels.astype(np.uint16) << 6 for number, pixels in enumerate(FIELDS)}
    deep["2.tif"] = FIELDS[2].astype(np.uint16) << 8
    write(tmp_path, deep)
    with pytest.raises(DataSetError) as caught:
        read(tmp_path)
    (problem,) = caught.value.problems
    assert (problem.row, problem.value) == (4, "wsi/2.tif")
    assert "16 of 16 bits, but 5 other pictures 14 of 16 bits" in problem.expected
    assert problem.fix.startswith("save all pictures as 8-bit RGB")
    left = read(tmp_path, skip_bad_images=True).report["left_out"]["smears_with_bad_image"]
    assert left["count"] == 1


DOUBTS = {
    "nearly one colour": np.full_like(FIELDS[0], (225, 205, 215)) + np.random.default_rng(1).integers(
        0, 6, FIELDS[0].shape, dtype=np.uint8),
    "white or black nearly everywhere": np.where(FIELDS[0] > 60, 255, FIELDS[0]).astype(np.uint8),
    "dark": field(9) >> 2,
    "with nothing stained": np.repeat(cv2.putText(
        np.full((192, 256), 235, np.uint8), "P 12  APL", (5, 90), 0, 1.4, 20, 4)[:, :, None], 3, axis=2),
    "out of focus": cv2.GaussianBlur(field(9), (0, 0), 5),
}  # fmt: skip


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_picture_in_which_nothing_is_seen_is_named_with_the_figure(doubt, tmp_path):
    others = {f"{number}.png": pixels for number, pixels in enumerate(FIELDS)}
    write(tmp_path, others | {"blank.png": DOUBTS[doubt]})
    (remark,) = remarks(tmp_path)
    assert remark.startswith(f"pictures {doubt}")
    assert "wsi/blank.png (" in remark
    assert any(letter.isdigit() for letter in remark)


@pytest.mark.parametrize("doubt", DOUBTS)
def test_also_without_others_beside_it(doubt, tmp_path):
    write(tmp_path, {"blank.png": DOUBTS[doubt]})
    assert [one.startswith(f"pictures {doubt}") for one in remarks(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("a.PNG", "a.png"),
        ("a.png", "a.PNG"),
        ("a.Jpg", "a.jpg"),
        (unicodedata.normalize("NFD", "Müller é.png"), unicodedata.normalize("NFC", "Müller é.png")),
        (unicodedata.normalize("NFC", "Müller é.png"), unicodedata.normalize("NFD", "Müller é.PNG")),
    ],
)
def test_files_are_found_by_another_case_of_the_ending_or_unicode_form_and_it_is_said(
    written, named, tmp_path
):
    write(tmp_path, {written: FIELDS[0], "b.png": FIELDS[1]}, [named, "b.png"])
    found = read(tmp_path)
    assert found.smears["image"].tolist() == [f"wsi/{written}", "wsi/b.png"]
    assert [one for one in remarks(tmp_path) if one.startswith("pictures whose files")]
    assert remarks(tmp_path)[0].endswith("rows 2")
    assert ("image", f"wsi/{written}") in names_of(tmp_path)  # what a pseudonym is made of


def test_no_file_is_chosen_where_two_fit(tmp_path):
    write(tmp_path, {"a.PNG": FIELDS[0], "a.Png": FIELDS[1]}, ["a.png"])
    with pytest.raises(DataSetError, match="no such file"):
        read(tmp_path)


def test_two_rows_for_one_file_are_a_problem(tmp_path):
    write(tmp_path, {"a.PNG": FIELDS[0]}, ["a.png", "a.PNG"])
    with pytest.raises(DataSetError, match="a picture that no other row names"):
        read(tmp_path)
