"""Labels, how they are read, and the diagnosis that follows from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aplsmear.data.labels import LIKE, LabelError, clean_smear_labels, parse_labels
from aplsmear.words import misspelt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("  ", ()),
        ("set()", ()),
        ("{'Auer rods', 'Faggot cell'}", ("Auer rods", "Faggot cell")),
        ('{"Faggot cell", "Auer rods"}', ("Auer rods", "Faggot cell")),
        ("['aml', 'm3', ]", ("aml", "m3")),
        ("('aml',)", ("aml",)),
        ("{'None'}", ("None",)),
        ("{' Auer   rods', 'Auer rods', ''}", ("Auer rods",)),
        (r"{'O\'Brien cell'}", ("O'Brien cell",)),
    ],
)
def test_a_literal_of_strings_gives_its_labels(text, expected):
    assert parse_labels(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "aml",
        "nan",
        "{'aml'",
        "{'aml')",
        "{'a' 'b'}",
        "{'a',, 'b'}",
        "{1}",
        "{'a': 'b'}",
        "{b'a'}",
        "{f'{1}'}",
        "{'a' + 'b'}",
        "__import__('os').system('true')",
        "{'a', __import__('os')}",
        "{'a|b'}",
        "{'a\x00b'}",
        "{'" + "a" * 2000 + "'}",
        "(" * 900,
    ],
)
def test_any_other_text_is_refused_and_never_evaluated(text):
    with pytest.raises(LabelError):
        parse_labels(text)


@given(st.text(max_size=60) | st.text("{}[]()'\", \\abset", max_size=40))
def test_any_text_gives_labels_or_a_label_error(text):
    try:
        found = parse_labels(text)
    except LabelError:
        return
    assert parse_labels(repr(set(found))) == found


@given(st.frozensets(st.text("abcxyz '\"Å-", min_size=1, max_size=9).map(str.strip).filter(bool), max_size=4))
def test_a_set_as_python_writes_it_is_read_back(labels):
    tidy = {" ".join(label.split()) for label in labels}
    assert set(parse_labels(repr(set(labels)))) == tidy


@pytest.mark.parametrize(
    ("labels", "diagnosis", "fab"),
    [
        (["healthy"], "healthy", ()),
        (["Healthy"], "healthy", ()),
        (["AML"], "aml", ()),
        (["aml", "M2"], "aml", ("m2",)),
        (["m2"], "aml", ("m2",)),
        (["aml", "m3"], "apl", ("m3",)),
        (["APL"], "apl", ("m3",)),
        (["aml", "m4eo"], "aml", ("m4",)),
        (["aml", "M4 Eo", "m4"], "aml", ("m4",)),
        (["aml", "m5b", "m5a"], "aml", ("m5",)),
        (["aml", "m4", "m5a"], "aml", ("m4", "m5")),
        (["aml", "notclassified"], "aml", ("not_classified",)),
        ([], "", ()),
        (["50x.png"], "", ()),
    ],
)
def test_diagnosis_and_fab_class_follow_from_the_labels(labels, diagnosis, fab):
    cleaned = clean_smear_labels(labels)
    assert (cleaned.diagnosis, cleaned.fab) == (diagnosis, fab)


def test_parts_of_file_names_are_dropped_and_listed():
    cleaned = clean_smear_labels(["aml", "m1", "50x.png", "100x.png", "al", "ap", "BAL", "m445501"])
    assert cleaned.labels == ("aml", "m1")
    assert cleaned.dropped == ("100x.png", "50x.png", "al", "ap", "bal", "m445501")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["healhty"], "did you mean 'healthy'"),
        (["cml"], "'cml'"),
        (["aml", "m8"], "'m8'"),
        (["aml", "m412345"], "'m412345'"),
        (["healthy", "aml"], "healthy alone"),
        (["aml", "m3", "m2"], "not both"),
    ],
)
def test_unknown_and_contradicting_labels_are_refused(labels, told):
    with pytest.raises(LabelError, match=told):
        clean_smear_labels(labels)


def test_a_misspelt_label_is_distinguished_from_another_type_of_cell():
    known = ["Myeloblast", "Auer rods", "Monoblast", "Promyelocyte"]
    assert misspelt("auer rods", known, LIKE) == "Auer rods"
    assert misspelt("Promyelocite", known, LIKE) == "Promyelocyte"
    assert misspelt("Megaloblast", known, LIKE) is None
    assert misspelt("Promonocyte", known, LIKE) is None
