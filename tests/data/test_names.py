"""Two names that may mean the same patient or site are a problem, until the user says that they are two."""

import csv
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from aplsmear.data.dataset import DataSet, DataSetError, Problem, read_data_set
from aplsmear.data.names import changed_names, look_alikes
from aplsmear.data.pseudonyms import Pseudonyms
from aplsmear.evaluation.splits import make_folds


def read(
    root: Path, patients: list[str], distinct: list[tuple[str, ...]] = (), site: str = "", **options
) -> DataSet:
    """A data set of a smear for each of these patients, all healthy."""
    (root / "wsi").mkdir(exist_ok=True)
    rows = [["id", "imgName", "label", "patient", "site"]]
    for number, patient in enumerate(patients):
        if not (root / "wsi" / f"{number}.png").exists():
            Image.new("L", (16, 16), number).save(root / "wsi" / f"{number}.png")
        rows.append([number, f"{number}.png", "{'healthy'}", patient, site if number else site.upper()])
    with (root / "wsi.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    if distinct:
        with (root / "distinct.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("what", "name", "other"), *distinct])
    return read_data_set(root, {}, min_box=8, skip_bad_images=False, check_images=False, **options)


def problems(root: Path, patients: list[str], *arguments, **options) -> list[Problem]:
    with pytest.raises(DataSetError) as caught:
        read(root, patients, *arguments, **options)
    return caught.value.problems


PAIRS = [
    ("P012", "p012"), ("12", "0012"), ("P12", "P-012"), ("P-12", "P\u201012"), ("P-12", "P\u201312"),
    ("P_12", "P 12"), ("P12", "\u042012"), ("p12", "\u044012"), ("P12", "\uff30\uff11\uff12"),
    ("P012", "PO12"), ("P1", "Pl"), ("7", "7.0"), ("7", "7,00"), ("120000", "1.2E+05"), ("1200", "1,200"),
    ("Müller", "Muller"), ("Müller", "MÃ¼ller"), ("straße", "STRASSE"), ("\u0397ans", "Hans"),
    ("12", "\u0661\u0662"), ("Müller", "Mueller"), ("Øst", "Ost"), ("Łódź", "Lodz"), ("P012", "[P012]"),
    ("P12", "P\u202212"), ("Bern", "Bem"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_names_that_look_alike_are_a_problem_that_names_both(tmp_path, one, other):
    (found,) = [each for each in problems(tmp_path, [one, "Q3", other]) if "looks the same" in each.expected]
    assert (found.file, found.column) == ("wsi.csv", "patient")
    assert {found.value, found.expected.split("'")[1]} == {one, other}
    assert found.fix.count(one) or found.fix.count(other)


@pytest.mark.parametrize(("one", "other"), PAIRS[:12])
def test_names_that_the_user_declares_distinct_are_two_patients(tmp_path, one, other):
    found = read(tmp_path, [one, "Q3", other], [("patient", other, one)])
    assert found.smears["patient"].tolist() == [one, "Q3", other]


def test_the_message_holds_the_row_that_declares_two_patients(tmp_path):
    (found,) = problems(tmp_path, ["P012", "p012"])
    row = found.fix.split("`")[1]
    assert len(read(tmp_path, ["P012", "p012"], [tuple(row.split(","))]).smears) == 2


@pytest.mark.parametrize("blank", [" ", "\u00a0", "\t", "\u3000"])
def test_blanks_at_the_ends_do_not_make_another_patient(tmp_path, blank):
    assert set(read(tmp_path, ["P12", f"P12{blank}", f"{blank}P12"]).smears["patient"]) == {"P12"}


@pytest.mark.parametrize(
    "names",
    [
        ["P1", "P11", "P21", "P12", "P010"], ["1-12", "11-2", "1-1", "1-11"], ["7.1", "71", "7.11"],
        ["Hall", "Hail", "Hill"], ["+", "-", "*", "P*", "P"], ["健1", "康1"], ["PO12", "P12"], ["A1", "B1"],
    ],
)  # fmt: skip
def test_names_that_differ_are_no_problem(tmp_path, names):
    assert read(tmp_path, names).report["patients"] == len(names)


def test_sites_are_compared_as_patients_are(tmp_path):
    (found,) = problems(tmp_path, ["P1", "P2"], site="Ulm")
    assert (found.column, found.value) == ("site", "Ulm")
    assert read(tmp_path, ["P1", "P2"], [("site", "Ulm", "ULM")], site="Ulm").report["patients"] == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("1.2E+05", "rounded"), ("1,23457E+11", "rounded"), ("1234567890123450", "rounded"),
        ("3-Dec", "made a date"), ("Mrz 03", "made a date"), ("#N/A", "an error"),
        ("M\ufffdller", "lost a letter"), ("#####", "too narrow"), ("nan", "an empty field"),
        ("unknown", "many patients become one"), ("2024-12-03 00:00:00", "made a date"),
    ],
)  # fmt: skip
def test_a_name_that_a_spreadsheet_has_changed_is_a_problem(tmp_path, name, told):
    (found,) = problems(tmp_path, ["P1", name])
    assert (found.value, found.column) == (name, "patient")
    assert told in found.expected
    assert name in read(tmp_path, ["P1", name], [("patient", name, "")]).smears["patient"].tolist()


def test_a_long_number_that_ends_in_zero_by_chance_is_no_problem():
    assert changed_names(["1234567890123450", "1234567890123451"]) == []
    assert changed_names(["1234567890123450", "1234567890123460"]) != []


def test_with_pseudonyms_no_name_is_in_the_message_and_its_row_can_be_used(tmp_path):
    hidden = Pseudonyms("k" * 32)
    (found,) = problems(tmp_path, ["Anna", "ANNA"], pseudonyms=hidden)
    assert "anna" not in str(found).lower()
    row = found.fix.split("`")[1]
    assert len(read(tmp_path, ["Anna", "ANNA"], [tuple(row.split(","))], pseudonyms=hidden).smears) == 2


def test_a_wrong_row_of_the_declaration_is_a_problem(tmp_path):
    (found,) = problems(tmp_path, ["P1"], [("person", "P1", "p1")])
    assert (found.file, found.row, found.column) == ("distinct.csv", 2, "what")


def variants(name: str) -> list[st.SearchStrategy[str]]:
    """Ways in which a person or a program writes the same name."""
    forms = [name.upper(), name.lower(), f"{name} ", name.replace("-", "\u2011"), name.replace("A", "\u0410")]
    wide = "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in name)
    return [st.just(form) for form in [*forms, wide, f"{name}.0" if name.isdigit() else name]]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_patient_is_on_both_sides_of_a_split_under_two_names(tmp_path, data):
    """Any name in another form: one patient, who is in one fold, or a problem."""
    name = data.draw(st.text(string.ascii_uppercase + string.digits + "-", min_size=1, max_size=6))
    other = data.draw(st.one_of(variants(name)))
    try:
        smears = read(tmp_path, [name, other, "§1", "§2", "§3"]).smears
    except DataSetError:
        return
    assert make_folds(smears, 3, seed=1)["patient"].nunique() == len(set(smears["patient"])) == 4


@given(st.lists(st.text(max_size=20), max_size=8))
def test_any_names_can_be_compared_in_any_order(names):
    pairs = look_alikes(names, lambda *_: False)
    assert pairs == look_alikes(names[::-1], lambda *_: False)
    assert all(first < second for first, second in pairs)
    changed_names(names)
