"""Bottleneck features on disk: rows in the order of the views, opened without being read."""

import numpy as np
import pandas as pd
import pytest

from aplsmear.errors import UserError
from aplsmear.features.store import read_features, write_features
from aplsmear.files import rows_of

INDEX = pd.DataFrame({"item": ["a", "a", "007"], "view": [0, 1, 0]})
ROWS = {
    "early": np.array([[1, 2], [3, 4], [5, 6]], np.float16),
    "late": np.array([[7], [8], [65504]], np.float16),
}


def batches(*sizes: int):
    start = 0
    for size in sizes:
        yield [ROWS[layer][start : start + size] for layer in ("early", "late")]
        start += size


def test_features_come_back_by_name_memory_mapped(tmp_path):
    write_features(tmp_path / "net", INDEX, ["early", "late"], batches(2, 1))
    found = read_features(tmp_path, ["net"])
    assert list(found) == ["net/early", "net/late"]
    for layer, rows in ROWS.items():
        features = found[f"net/{layer}"]
        assert isinstance(features.values, np.memmap)
        assert features.values.dtype == np.float16
        np.testing.assert_array_equal(features.values, rows)
        assert features.index.to_dict("list") == {"item": ["a", "a", "007"], "view": [0, 1, 0]}
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [
        "early.npy",
        "index.csv",
        "late.npy",
    ]


def test_features_of_several_backbones_stand_behind_one_another(tmp_path):
    for name in ("net", "own"):
        write_features(tmp_path / name, INDEX, ["early", "late"], batches(3))
    found = read_features(tmp_path, ["net", "own"])
    joint = found["net/late+own/early"]
    assert joint.values.shape == (3, 3)
    np.testing.assert_array_equal(joint.values[0:2], [[7, 1, 2], [8, 3, 4]])
    np.testing.assert_array_equal(rows_of(joint.values, np.array([[2, 0]])), [[[65504, 5, 6], [7, 1, 2]]])
    assert "net/late+own/early" not in found  # `any` searches single backbones
    for name in ("net/late+own/none", "net/none", "net/early+none/early"):
        with pytest.raises(KeyError, match=name[:8]):
            found[name]
    write_features(tmp_path / "own", INDEX[:2], ["early", "late"], batches(2))
    with pytest.raises(UserError, match=r"net/early\+own/early are of other views"):
        read_features(tmp_path, ["net", "own"])["net/early+own/early"]


def test_the_size_of_batches_changes_no_byte(tmp_path):
    for name, sizes in (("one", (3,)), ("three", (1, 1, 1))):
        write_features(tmp_path / name, INDEX, ["early", "late"], batches(*sizes))
    for name in ("early.npy", "late.npy", "index.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


@pytest.mark.parametrize("index", [INDEX[:2], pd.concat([INDEX, INDEX])])
def test_rows_that_are_too_few_or_too_many_leave_nothing_behind(tmp_path, index):
    with pytest.raises(ValueError, match=r"rows or more, not"):
        write_features(tmp_path / "net", index, ["early", "late"], batches(2, 1))
    assert list((tmp_path / "net").iterdir()) == []


def test_no_views_give_an_index_of_no_rows_and_no_features(tmp_path):
    write_features(tmp_path / "net", INDEX[:0], ["early", "late"], iter([]))
    assert [path.name for path in (tmp_path / "net").iterdir()] == ["index.csv"]
    assert read_features(tmp_path, ["net"]) == {}


def test_features_of_a_backbone_that_is_no_longer_named_or_not_there_are_an_error(tmp_path):
    write_features(tmp_path / "old", INDEX, ["early", "late"], batches(3))
    with pytest.raises(UserError, match=r"does not name: old\..* lacks the backbones net: .*`dvc pull"):
        read_features(tmp_path, ["net"])
