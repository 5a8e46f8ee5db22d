"""Nucleated cells are found with any stain, magnification and number of workers."""

import json
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import linear_sum_assignment
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.data.dataset import read_data_set
from aplsmear.data.schema import KAGGLE_CELL_COLUMNS
from aplsmear.errors import UserError
from aplsmear.sources.cell_finder import BOX, MIN_SIZE, find_cells
from aplsmear.sources.cell_folder import contact_sheet, expected_size, find_all, kaggle_rows, next_steps
from aplsmear.sources.cell_size import Estimate, boxes_at, choose, ladder, lengths
from aplsmear.sources.drawn import Smear, draw_smear, generator, patient_smears, sample_patient

TYPICAL = 60.0  # px, of the demo's cells
SEED = 4


def estimate_of(image: np.ndarray) -> Estimate:
    measured = [lengths(image)]
    sizes = ladder(measured)
    return choose(sizes, measured, [boxes_at(image, sizes)])


@cache
def smear_of(patient: int) -> Smear:
    """A drawn smear; each patient has another stain and camera."""
    return next(smear for _, smear in patient_smears(patient, SEED))


@cache
def field_without_cells() -> np.ndarray:
    rng = generator(SEED, 0)
    return draw_smear(sample_patient("healthy", rng), rng, n_cells=0).image


def drawn(smear: Smear) -> np.ndarray:
    return np.array([cell.box for cell in smear.cells])


def right(there: np.ndarray, here: np.ndarray) -> int:
    """Number of boxes that agree, one to one, with an IoU of at least 0.5."""
    start = np.maximum(there[:, None, :2], here[None, :, :2])
    common = np.prod(np.clip(np.minimum(there[:, None, 2:], here[None, :, 2:]) - start, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (there, here)]
    overlap = common / (areas[0][:, None] + areas[1][None] - common)
    one, other = linear_sum_assignment(-overlap)
    return int((overlap[one, other] >= 0.5).sum())


def boxes_of(image: np.ndarray, size: float) -> np.ndarray:
    return find_cells(image, size)[list(BOX)].to_numpy()


def rescaled(image: np.ndarray, factor: float) -> np.ndarray:
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=method)


def test_drawn_cells_are_found_and_hardly_anything_else() -> None:
    there = [drawn(smear_of(patient)) for patient in range(1, 11)]
    here = [boxes_of(smear_of(patient).image, TYPICAL) for patient in range(1, 11)]
    hits = sum(map(right, there, here))
    assert hits / sum(map(len, there)) >= 0.95
    assert hits / sum(map(len, here)) >= 0.95


def test_a_box_includes_the_cytoplasm() -> None:
    smear = next(s for s in map(smear_of, range(1, 11)) if any(c.plan.kind == "plasma cell" for c in s.cells))
    wide = np.array([cell.box for cell in smear.cells if cell.plan.kind == "plasma cell"])
    assert right(wide, boxes_of(smear.image, TYPICAL)) == len(wide)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_size_is_estimated_at_any_magnification(factor: float) -> None:
    smear = smear_of(2)
    image = rescaled(smear.image, factor)
    size = estimate_of(image).size
    typical = np.median(np.sqrt(np.prod(drawn(smear)[:, 2:] - drawn(smear)[:, :2], axis=1)))
    assert size == pytest.approx(typical * factor, rel=0.3)
    found = boxes_of(image, size) / factor
    hits = right(drawn(smear), found)
    assert hits >= 0.95 * len(drawn(smear))
    assert hits >= 0.95 * len(found)


@pytest.mark.parametrize("factor", [0.7, 2.0])
def test_a_few_cells_among_red_cells_are_enough_to_estimate_the_size(factor: float) -> None:
    rng = generator(SEED, 1)
    smear = draw_smear(sample_patient("apl", rng), rng, n_cells=2)
    estimate = estimate_of(rescaled(smear.image, factor))
    there = drawn(smear)
    typical = np.median(np.sqrt(np.prod(there[:, 2:] - there[:, :2], axis=1))) * factor
    assert typical * 0.7 < estimate.size < typical * 1.5
    assert right(there, boxes_of(rescaled(smear.image, factor), estimate.size) / factor) == len(there)
    assert not estimate.doubts


def test_the_lobes_of_a_nucleus_are_one_cell() -> None:
    """Without a ruler, the size on which the neighbouring sizes agree is taken, not that of the lobes."""
    image = np.full((300, 400, 3), (235, 228, 232), np.uint8)
    lobes = [
        (y + dy, x + dx)
        for y in (90, 210)
        for x in (90, 200, 310)
        for dy, dx in ((-15, -12), (0, 14), (17, -8))
    ]
    for y, x in [(90, 90), (90, 200), (90, 310), (210, 90), (210, 200), (210, 310)]:
        cv2.circle(image, (x, y), 38, (205, 190, 220), -1, cv2.LINE_AA)
    for y, x in lobes:
        cv2.circle(image, (x, y), 12, (75, 45, 130), -1, cv2.LINE_AA)
    estimate = estimate_of(image)
    assert estimate.red is None
    assert 65 < estimate.size < 120
    assert len(boxes_of(image, estimate.size)) == 6
    assert any("red cells" in doubt for doubt in estimate.doubts)


@settings(max_examples=8, deadline=None)
@given(
    size=st.floats(20, 150),
    top=st.integers(0, 200),
    left=st.integers(0, 200),
    height=st.integers(1, 280),
    width=st.integers(1, 440),
)
def test_boxes_lie_inside_the_picture_and_no_two_are_the_same(
    size: float, top: int, left: int, height: int, width: int
) -> None:
    image = smear_of(3).image[top : top + height, left : left + width]
    boxes = boxes_of(image, size)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= image.shape[:2]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)


PICTURES = {
    "red cells and platelets": field_without_cells,
    "white": lambda: np.full((200, 300, 3), 255, np.uint8),
    "black": lambda: np.zeros((200, 300, 3), np.uint8),
    "a few pixels": lambda: np.full((3, 5, 3), 90, np.uint8),
    "grey": lambda: np.repeat(smear_of(1).image[..., 1:2], 3, axis=2),
}


@pytest.mark.parametrize("name", PICTURES)
def test_without_a_stained_nucleus_no_cell_is_found(name: str) -> None:
    image = PICTURES[name]()
    assert estimate_of(image).size is None
    assert find_cells(image, TYPICAL).empty


def test_measures_agree_with_the_drawn_cells() -> None:
    smear = smear_of(2)
    found = find_cells(smear.image, TYPICAL)
    drawn_sizes = np.sqrt(4 / np.pi * np.array([cell.mask.sum() for cell in smear.cells]))
    assert found["equivalentDiameter"].median() == pytest.approx(np.median(drawn_sizes), rel=0.1)
    assert (found["convexArea"] >= np.pi / 4 * found["equivalentDiameter"] ** 2 * 0.99).all()
    assert found["meanIntensity"].between(0.1, 0.9).all()
    larger = find_cells(rescaled(smear.image, 2), 2 * TYPICAL)
    assert larger["perimeter"].median() == pytest.approx(2 * found["perimeter"].median(), rel=0.1)


def test_the_expected_size_may_be_given_in_micrometres() -> None:
    assert expected_size(None, 0.1) == pytest.approx(140)
    assert expected_size(80, None) == 80
    assert expected_size(None, None) is None
    for size, micrometres in ((80, 0.1), (-1, None), (None, 0), (None, 9), (MIN_SIZE / 2, None)):
        with pytest.raises(UserError):
            expected_size(size, micrometres)


def test_a_large_picture_is_searched_in_windows_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    image = smear_of(2).image
    whole = boxes_of(image, TYPICAL)
    monkeypatch.setattr("aplsmear.sources.cell_finder._WINDOW", 150)
    parts = boxes_of(image, TYPICAL)
    assert right(whole, parts) >= 0.95 * max(len(whole), len(parts))


# --- a folder ------------------------------------------------------------------------------------------


def folder_of(path: Path, pictures: dict[str, np.ndarray], *, table: bool = True) -> Path:
    """A data set without boxes."""
    (path / "wsi").mkdir(parents=True)
    for name, image in pictures.items():
        Image.fromarray(image).save(path / "wsi" / f"{name}.png")
    if table:
        rows = [f"{name},{name}.png,{{'healthy'}}" for name in pictures]
        (path / "wsi.csv").write_text("\n".join(["id,imgName,label", *rows]) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["cells", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, " ".join(done.output.split())


def test_the_command_writes_a_data_set_that_check_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no params.yaml, whose tasks would ask for labels
    root = folder_of(tmp_path / "set", {"a": smear_of(1).image, "empty": field_without_cells()})
    code, output = run(root)
    assert code == 0
    assert "smears without a cell (1): empty" in output
    table = pd.read_csv(root / "labeled_cells.csv", dtype=str, keep_default_na=False)
    assert tuple(table.columns) == KAGGLE_CELL_COLUMNS
    boxes = np.array([json.loads(box) for box in table["bbox"]])
    assert right(drawn(smear_of(1)), boxes) >= 0.9 * len(boxes)
    data = read_data_set(root, {}, min_box=8, skip_bad_images=False)
    assert len(data.cells) == len(table)
    assert CliRunner().invoke(app, ["check", str(root)]).exit_code == 0
    with Image.open(root / "labeled_cells.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.info == {}


def test_an_existing_table_is_never_lost(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"a": smear_of(1).image})
    old = 'id,wsi,bbox\n1,a,"[1, 2, 30, 40]"\n'
    (root / "labeled_cells.csv").write_text(old, encoding="utf-8")
    code, output = run(root, "--size", TYPICAL)
    assert code == 1
    assert "--overwrite" in output
    assert (root / "labeled_cells.csv").read_text(encoding="utf-8") == old
    code, output = run(root, "--size", TYPICAL, "--overwrite")
    assert code == 0
    assert "labeled_cells.1.csv" in output
    assert (root / "labeled_cells.1.csv").read_text(encoding="utf-8") == old
    assert len(pd.read_csv(root / "labeled_cells.csv")) > 10


def test_without_wsi_csv_a_table_with_empty_labels_is_written(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"b": smear_of(1).image, "a": smear_of(2).image}, table=False)
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini"):  # systems put them beside pictures
        (root / "wsi" / name).write_bytes(b"\0\5\x16\7")
    code, output = run(root, "--size", TYPICAL, "--out", tmp_path / "boxes.csv")
    assert code == 0
    assert "fill in the labels" in output
    assert "aplsmear predict" in output
    assert (root / "wsi.csv").read_text(encoding="utf-8") == "id,imgName,label\na,a.png,\nb,b.png,\n"
    assert not (root / "labeled_cells.csv").exists()
    assert set(pd.read_csv(tmp_path / "boxes.csv")["wsi"]) == {"a", "b"}


def test_the_advice_fits_the_labels_that_are_there(tmp_path: Path) -> None:
    """`check` of smears without labels lists a problem for each: it is advised only where it helps."""
    root = folder_of(tmp_path / "set", {"a": smear_of(1).image, "b": smear_of(2).image})
    table = root / "wsi.csv"
    assert next_steps(root) == [f"Then: aplsmear check {root}"]
    table.write_text("id,imgName,label\na,a.png,{'healthy'}\nb,b.png,\n", encoding="utf-8")
    assert "1 of 2 smears have no label" in next_steps(root)[0]
    table.write_text("id,imgName\na,a.png\nb,b.png\n", encoding="utf-8")
    predict, train = next_steps(root)
    assert "aplsmear predict" in predict
    assert "check" not in predict
    assert "fill in the labels" in train


def test_an_uncertain_size_is_shown_with_the_boxes_of_every_candidate(tmp_path: Path) -> None:
    """Two cells and no red cell: nothing decides the size."""
    image = np.full((200, 300, 3), 240, np.uint8)
    for x in (80, 220):
        cv2.circle(image, (x, 100), 30, (75, 45, 130), -1, cv2.LINE_AA)
    root = folder_of(tmp_path / "set", {"a": image})
    code, output = run(root)
    assert code == 0
    assert "uncertain: there are too few red cells to compare with; cells found: only 2" in output
    assert "--size PX" in output
    with Image.open(root / "labeled_cells_sizes.png") as sheet:
        assert sheet.height > sheet.width / 3  # more than a row of four: one smear at each size


@pytest.mark.parametrize("given", [(), ("--size", TYPICAL)])
def test_without_any_cell_a_message_says_so_and_no_table_is_written(
    tmp_path: Path, given: tuple[object, ...]
) -> None:
    root = folder_of(tmp_path / "set", {"empty": field_without_cells()})
    code, output = run(root, *given)
    assert code == 1
    assert "No table was written" in output
    assert sorted(path.name for path in root.iterdir()) == ["labeled_cells.png", "wsi", "wsi.csv"]


def test_a_search_that_is_impossible_is_refused_with_a_message(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"a": smear_of(1).image})
    (root / "wsi" / "a.png").write_bytes(b"\x89PNG\r\n")
    code, output = run(root)
    assert code == 1
    assert "a.png" in output
    assert run(root, "--out", tmp_path / "boxes.png")[0] == 1
    assert run(tmp_path / "nowhere")[0] == 1
    (tmp_path / "bare" / "wsi").mkdir(parents=True)
    assert "put the pictures" in run(tmp_path / "bare")[1]


def test_the_number_of_workers_does_not_change_the_result(tmp_path: Path, monkeypatch) -> None:
    pictures = {str(patient): smear_of(patient).image for patient in (1, 2)}
    root = folder_of(tmp_path / "set", pictures)
    smears = pd.DataFrame({"smear": list(pictures), "image": [f"wsi/{name}.png" for name in pictures]})
    found = []
    for workers in ("1", "2"):
        monkeypatch.setenv("LOKY_MAX_CPU_COUNT", workers)
        found.append(find_all(root, smears))
    one, two = found
    assert one.size == two.size
    pd.testing.assert_frame_equal(kaggle_rows(one.cells), kaggle_rows(two.cells))
    sheets = [contact_sheet(root, smears, search.cells).tobytes() for search in (one, two)]
    assert sheets[0] == sheets[1]


def test_the_contact_sheet_of_many_smears_shows_some_of_them(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set", {"a": smear_of(1).image[:40, :60]})
    many = pd.DataFrame({"smear": [str(number) for number in range(500)], "image": "wsi/a.png"})
    cells = pd.DataFrame({"smear": ["7"], "y0": [1], "x0": [2], "y1": [30], "x1": [40]})
    page = contact_sheet(root, many, cells)
    assert page.width * page.height < 10_000_000
    assert page.tobytes() != contact_sheet(root, many, cells[:0]).tobytes()  # the one with most is shown
