"""Views in one large file a level: streamed in, streamed out, the same bytes each time."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aplsmear.images.view_store import View, count_views, plain_views, read_index, read_views, view_writer

GROUPS = [
    {"smear": [View("7", 0, b"whole"), View("7", 1, b"turned")], "cell": [View("a", 0, b"\x00\xff")]},
    {"smear": [View("8", 0, b"other")], "cell": []},
    {"smear": [View("9", 0, b"last")], "cell": [View("b", 0, b""), View("c", 0, b"x"), View("c", 1, b"y")]},
]


@pytest.fixture
def paths(tmp_path):
    found = {level: tmp_path / level / "views.parquet" for level in ("cell", "smear")}
    with view_writer(found) as write:
        for group in GROUPS:
            write(group)
    return found


@pytest.mark.parametrize("level", ["cell", "smear"])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_what_goes_in_comes_out_in_full_batches(paths, level, batch):
    batches = list(read_views(paths[level], batch))
    expected = [view for group in GROUPS for view in group[level]]
    assert [view for each in batches for view in each] == expected
    assert [len(each) for each in batches[:-1]] == [batch] * (len(batches) - 1)
    assert count_views(paths[level]) == len(expected)


def test_memory_holds_a_group_and_not_the_file(tmp_path):
    with view_writer({"cell": tmp_path / "cell"}) as write:
        for group in range(30):
            write({"cell": [View(f"{group}_{n}", 0, bytes(10_000)) for n in range(100)]})
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() for _ in read_views(tmp_path / "cell", 64))
    assert most - before < 6e6  # of 30


def test_the_index_has_items_and_views_without_the_pictures(paths):
    expected = pd.DataFrame({"item": ["a", "b", "c", "c"], "view": [0, 0, 0, 1]})
    index = read_index(paths["cell"])
    assert index.astype({"item": object, "view": int}).to_dict("list") == expected.to_dict("list")


def test_pictures_are_stored_once(paths):
    """As statistics of a column they would be there a second and a third time."""
    picture = b"\xff\xd8" + bytes(range(256)) * 4
    with view_writer(paths) as write:
        write({"smear": [View("1", 0, picture)]})
    assert paths["smear"].read_bytes().count(picture) == 1
    assert pq.ParquetFile(paths["smear"]).metadata.num_rows == 1


def test_the_same_views_are_the_same_bytes(paths, tmp_path):
    again = {level: tmp_path / "again" / level for level in paths}
    with view_writer(again) as write:
        for group in GROUPS:
            write(group)
    assert all(again[level].read_bytes() == path.read_bytes() for level, path in paths.items())


def test_no_views_at_all_is_a_file_of_no_rows(tmp_path):
    with view_writer({"cell": tmp_path / "cell"}) as write:
        write({"cell": []})
    assert count_views(tmp_path / "cell") == 0
    assert list(read_views(tmp_path / "cell", 4)) == []
    assert len(read_index(tmp_path / "cell")) == 0


def test_an_error_leaves_no_file_of_any_level(tmp_path):
    def fail_half_way() -> None:
        with view_writer({level: tmp_path / level for level in ("cell", "smear")}) as write:
            write(GROUPS[0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_plain_views_of_some_items(paths):
    assert plain_views(paths["cell"], {"c", "a", "nobody"}) == {"a": b"\x00\xff", "c": b"x"}
    assert plain_views(paths["cell"], set()) == {}


@pytest.mark.parametrize(
    "rows", [range(0, 0), range(0, 7), range(3, 12), range(5, 6), range(10, 20), range(20)]
)
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_some_rows_of_a_file_of_views(rows, batch, tmp_path):
    views = [View(str(n), 0, b"%d" % n) for n in range(20)]
    with view_writer({"cell": tmp_path / "views"}) as write:
        for start, end in ((0, 5), (5, 6), (6, 15), (15, 20)):
            write({"cell": views[start:end]})
    found = list(read_views(tmp_path / "views", batch, rows))
    assert [view for some in found for view in some] == [views[row] for row in rows]
    assert all(len(some) == batch for some in found[:-1])
