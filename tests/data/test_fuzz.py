"""A few files of `make fuzz`, and small bombs: a data set or its problems, in limited time and memory."""

import os
import tracemalloc
from pathlib import Path

import fuzz
import pytest

from aplsmear.compute.engine import Here
from aplsmear.data.dataset import DataSetError, read_data_set
from aplsmear.images.reading import ImageError, decode


@pytest.fixture
def folder(tmp_path) -> Path:
    fuzz.sound(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["tables", "images"])
def test_damaged_files_give_a_data_set_or_its_problems(folder, kind):
    """As `make fuzz` does, but in this process."""
    seeds = [*fuzz.TABLES.values()] if kind == "tables" else fuzz.seed_pictures()
    ends = set()
    for number in range(40):
        for place, data in fuzz.damaged(kind, 2, number, seeds).items():
            (folder / place).write_bytes(data)
        outcome = fuzz.judged(folder, number)
        assert outcome.end in (fuzz.DATA_SET, fuzz.REFUSED), outcome.text
        ends.add(outcome.end)
        fuzz.sound(folder)
    assert fuzz.REFUSED in ends


def problems(folder: Path) -> list:
    with pytest.raises(DataSetError) as error:
        read_data_set(folder, {}, min_box=8, skip_bad_images=False, engine=Here(1))
    return error.value.problems


def test_a_problem_in_every_row_takes_memory_in_proportion_to_the_rows(folder):
    """If each message named all other rows, a table like this would make gigabytes of messages."""
    rows = "".join(f"{n},{n}.png,{{'{('healthy', 'aml')[n % 2]}'}},P\n" for n in range(3_000))
    (folder / "wsi.csv").write_text("id,imgName,label,patient\n" + rows, encoding="utf-8")
    (folder / "labeled_cells.csv").unlink()
    tracemalloc.start()
    found = [one for one in problems(folder) if one.column == "patient"]
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
    assert len(found) == 3_000
    assert found[0].expected == "one diagnosis for each patient, not healthy in row 2, aml in row 3"


def test_each_misspelt_label_is_reported_once(folder):
    rows = "".join(f"{n},1,\"[2, 4, 30, 40]\",{{'Promyelocyte{n}'}}\n" for n in range(100))
    (folder / "labeled_cells.csv").write_text("id,wsi,bbox,cellType\n" + rows, encoding="utf-8")
    found = [one for one in problems(folder) if "did you mean" in one.expected]
    assert len(found) == 100
    assert {one.value for one in found} == {f"Promyelocyte{n}" for n in range(100)}


def test_a_title_of_many_words_takes_time_in_proportion_to_its_length(folder):
    """`make fuzz` found a header of 33,000 times "ID" that took 71 s of CPU time."""
    (folder / "labeled_cells.csv").write_text("ID " * 40_000 + "x;wsi\n1;1\n", encoding="utf-8")
    outcome = fuzz.judged(folder, 1)
    assert (outcome.end, outcome.seconds < fuzz.SECONDS) == (fuzz.REFUSED, True)


def test_a_table_that_never_ends_or_is_huge_is_not_read(folder):
    table = folder / "labeled_cells.csv"
    table.unlink()
    os.mkfifo(table)
    assert [one.expected for one in problems(folder)] == ["a file that can be read (not a file)"]
    table.unlink()
    with table.open("wb") as file:
        file.truncate(10**9 + 1)  # takes no room on the disk
    assert [one.expected for one in problems(folder)] == ["a file that can be read (more than 1,000 MB)"]


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    """Each scan is a pass over all pixels, and takes a few bytes."""
    with pytest.raises(ImageError, match="more than 200 scans"):
        decode(fuzz.many_scans(300, 64))
    assert decode(fuzz.many_scans(20, 64)).shape == (64, 64, 3)
