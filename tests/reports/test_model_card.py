"""The model card: the numbers and the limits of an ensemble, without a patient's name."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from test_ensemble_report import findings

from aplsmear import __version__
from aplsmear.reports import pages
from aplsmear.reports.ensemble import model_card


def test_the_card_has_purpose_numbers_operating_points_and_limits() -> None:
    found = findings()
    card = model_card(found)
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == [
        "# apl_aml: APL or other AML?",
        *(
            "## Use",
            "## Cohort",
            "## The study in short",
            "## How it was validated",
            "## Numbers",
            "## Operating points",
        ),
        *("## An alarm with a promise", "## What it is made of", "## Limits", "## Versions"),
    ]
    area = found.measured["auroc"]
    assert f"| AUROC | {area['value']:.3f} | {area['low']:.3f} to {area['high']:.3f} |" in card
    caught = found.measured["at_sensitive"]["sensitivity"]
    threshold = found.verdicts.combinations[-1].thresholds["sensitive"]
    meaning = "aims at a sensitivity of 0.95: no APL is to be missed"
    shown = f"{caught['value']:.3f} ({caught['low']:.3f} to {caught['high']:.3f})"
    assert f"| sensitive | {meaning} | {threshold:.3f} | {shown} |" in card
    table = found.verdicts.table
    assert (
        f"{len(table)} patients, {table['label'].sum()} APL and {(1 - table['label']).sum()} other AML"
        in card
    )
    assert "Not a medical device" in card
    assert f"aplsmear {__version__}" in card
    assert "| splits/folds.csv | `0123abcd` |" in card


def test_the_card_says_what_was_left_out_and_how_many_patients_a_study_needs() -> None:
    found = findings()
    logits = found.verdicts.logits.copy()
    logits[:2, 0] = np.nan
    card = model_card(replace(found, verdicts=replace(found.verdicts, logits=logits)))
    rows = dict(line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.count("|") == 4)
    n = len(found.verdicts.table)
    assert f"{n} patients, {n} smears, {n} cells, 1 site." in rows["data"]  # no cell of another patient
    assert "Left out of the whole data set: cells without a box: 4." in rows["missing data"]
    assert "2 patients without a score of some member" in rows["missing data"]
    caught = found.measured["sensitivity"]
    assert (
        f"the interval of the sensitivity is {caught['high'] - caught['low']:.2f} wide" in rows["sample size"]
    )


def test_no_patient_is_named_and_equal_findings_give_equal_bytes(tmp_path) -> None:
    for name in ("one", "two"):
        pages.write(tmp_path / name, model_card(findings(patient="Meier, Hans")))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    card = (tmp_path / "one").read_text(encoding="utf-8")
    assert [name for name in findings(patient="Meier, Hans").verdicts.table["patient"] if name in card] == []


def test_every_row_of_a_table_has_as_many_cells_as_its_header() -> None:
    found = findings()
    lines = model_card(found).splitlines()
    for above, line in pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert above.replace(r"\|", "").count("|") == line.replace(r"\|", "").count("|")
