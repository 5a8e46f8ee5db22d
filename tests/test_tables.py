"""A table is read back as it was written, and its file has the same bytes each time."""

import csv

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aplsmear.tables import read_table, write_table


def test_a_long_table_is_read_back_as_it_was_written(tmp_path):
    """It is read in parts; a text with a `'` in front, and a column's first text, are in the last part."""
    rows = 20_000
    table = pd.DataFrame(
        {
            "item": [f"c{row}" for row in range(rows - 1)] + ["=1+1"],
            "fab": [""] * (rows - 1) + ["m3"],
            "view": np.arange(rows),
        }
    )
    write_table(tmp_path / "a.csv", table)
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.csv"), table.astype({"item": str, "fab": str}))


def test_a_table_is_read_back_as_it_was_written(tmp_path):
    table = pd.DataFrame(
        {
            "patient": ["007", "NA", "é, ß"],
            "special_characteristics": ["None", "", 'Auer rods|"x"'],
            "fold": np.array([0, 1, 2]),
            "probability": [0.5, 1e-7, 1.0],
        }
    )
    write_table(tmp_path / "new" / "a.csv", table)
    again = read_table(tmp_path / "new" / "a.csv")
    assert again["patient"].tolist() == ["007", "NA", "é, ß"]  # text, and no missing value
    assert again["special_characteristics"].tolist() == ["None", "", 'Auer rods|"x"']
    assert again["fold"].dtype == np.int64
    assert again["probability"].tolist() == [0.5, 1e-7, 1.0]
    write_table(tmp_path / "b.csv", again)
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "new" / "a.csv").read_bytes()


def test_the_bytes_of_a_table_are_known(tmp_path):
    write_table(tmp_path / "a.csv", pd.DataFrame({"item": ["1", "2"], "probability": [1 / 3, 2.0]}))
    assert (tmp_path / "a.csv").read_bytes() == b"item,probability\n1,0.333333\n2,2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]  # no temporary file is left


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)
        | st.text("'=+-@\t\n\uff1d1", max_size=6),
        min_size=1,
    )
)
@example(["=1+1", "'=1", "''", "'", "-5", "+49", "@SUM(A1)", "\t=1", "\uff1d1"])
def test_no_text_is_written_as_a_formula_and_every_text_is_read_back(tmp_path, names):
    write_table(tmp_path / "a.csv", pd.DataFrame({"patient": names, "probability": -0.5}))
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        for name, row in zip(names, csv.DictReader(file), strict=True):
            assert not row["patient"].startswith(("=", "+", "-", "@", "\t", "\n", "\uff1d"))
            assert row["patient"] in (name, f"'{name}")
            assert row["probability"] == "-0.5"
    assert read_table(tmp_path / "a.csv")["patient"].tolist() == names


def test_an_empty_table_keeps_its_columns(tmp_path):
    write_table(tmp_path / "a.csv", pd.DataFrame({"cell": [], "y0": []}))
    again = read_table(tmp_path / "a.csv")
    assert list(again.columns) == ["cell", "y0"]
    assert len(again) == 0
