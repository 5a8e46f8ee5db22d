"""A page for people about new patients: offline, the same bytes again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pandas as pd
from scipy.special import expit

import aplsmear
from aplsmear.ensembles.bundle import Bundle
from aplsmear.ensembles.combination import Combination
from aplsmear.files import whole
from aplsmear.prediction.predict import Judged
from aplsmear.reports.ensemble import WORDS, Node, document, grid, lane, legend, pictures, section, tag

CARDS = 100  # patients with a card of cells, those with the highest probability


def write_page(
    path: Path,
    bundle: Bundle,
    combination: Combination,
    judged: Sequence[Judged],
    table: pd.DataFrame,
    left_out: Mapping[str, Any],
    remarks: Sequence[str],
) -> None:
    """Write the page.

    Args:
        path: of the file.
        bundle: that judged.
        combination: that gave the probabilities.
        judged: of `aplsmear.prediction.predict.judge_patients`.
        table: of `aplsmear.prediction.predict.verdict_table`, rows alike.
        left_out: of the report of `aplsmear.data.dataset.read_data_set`.
        remarks: for the head of the page, such as that it was adapted.
    """
    model = bundle.model
    positive, negative = (WORDS.get(each, each) for each in (model.positive, model.negative))
    ranked = table.sort_values(["probability", "patient"], ascending=[False, True])
    rows = [(judged[int(str(place))], row) for place, row in ranked.iterrows()]
    body = [
        *_head(model.name, positive, negative, table, remarks),
        _everybody(rows, combination, positive, negative),
        _notes(rows, left_out),
        _cards(rows, bundle, positive),
        _model(bundle, combination),
        _limits(positive, negative),
    ]
    with whole(path) as part:
        page = document(f"{positive} or {negative}? New patients", body)
        part.write_text(page, encoding="utf-8", newline="\n")


_Rows = Sequence[tuple[Judged, "pd.Series[Any]"]]  # highest probability first


def _head(
    name: str, positive: str, negative: str, table: pd.DataFrame, remarks: Sequence[str]
) -> Iterator[ET.Element]:
    yield tag("h1", f"{positive} or {negative}? New patients")
    yield tag(
        "p", f"What the ensemble {name} says of {len(table)} patients it has never seen.", class_="lead"
    )
    yield tag(
        "p",
        tag("b", "For research only."),
        " Not a medical device; no diagnosis may rest on this page. See the limits at its end.",
        class_="warning",
    )
    yield from (tag("p", remark, class_="warning") for remark in remarks)
    counts = (
        ("patients", len(table), ""),
        (f"called {positive}", int(table["verdict"].sum()), "balanced operating point"),
        (f"called {positive}", int(table["sensitive"].sum()), "sensitive operating point"),
        ("with a warning", int((table["warning"] != "").sum()), "see below"),
    )
    keys = (tag("div", tag("span", a), tag("b", str(b)), tag("span", c), class_="key") for a, b, c in counts)
    yield tag("div", *keys, class_="keys")


def _everybody(rows: _Rows, combination: Combination, positive: str, negative: str) -> ET.Element:
    lanes: list[Node] = []
    for _, row in rows:
        called = {2: "both", 1: "sensitive", 0: ""}[int(row["verdict"]) + int(row["sensitive"])]
        value, warned = float(row["probability"]), " (!)" if row["warning"] else ""
        lanes += [
            tag("span", str(row["patient"]) + warned, class_="who"),
            lane(
                value, value, value,
                positive=bool(row["verdict"]), marks=sorted(set(combination.thresholds.values())),
            ),
            tag("span", f"{value:.2f}" + (f" · {called}" if called else ""), class_="number"),
        ]  # fmt: skip
    return section(
        "Every patient",
        tag(
            "p",
            f"Calibrated probability of {positive}, highest first; lines: the operating points; at the "
            f"right, those (sensitive, or both) at which the patient is called {positive}. (!): see the "
            "warnings.",
        ),
        legend(f"called {positive} at the balanced point", f"called {negative} there"),
        tag("div", tag("div", *lanes, class_="rows"), class_="patients"),
    )


def _notes(rows: _Rows, left_out: Mapping[str, Any]) -> ET.Element:
    warned = [(each, row) for each, row in rows if row["warning"]]
    parts: list[Node] = []
    if warned:
        lines: list[list[Node]] = [
            [each.patient, str(each.cells), str(each.smears), tag("span", str(row["warning"]))]
            for each, row in warned
        ]
        parts.append(grid(["patient", "cells", "smears", "warning"], lines))
    else:
        parts.append(tag("p", "None."))
    for what, left in left_out.items():
        if left["count"]:
            parts.append(tag("p", f"Left out: {left['count']:,} {what.replace('_', ' ')}.", class_="note"))
    return section(
        "Warnings",
        tag(
            "p",
            "A verdict on a patient unlike those of training, or on few cells, deserves little trust. The "
            "limit is what 99 of 100 training patients keep, each judged as a stranger.",
        ),
        *parts,
    )


def _cards(rows: _Rows, bundle: Bundle, positive: str) -> ET.Element:
    cards = [_card(each, row, bundle) for each, row in rows[:CARDS]]
    about = "What each member says: its summary, as a probability of its own question."
    if bundle.model.pictured_by:
        about += (
            f" Above, the cells that speak most for and most against {positive} in the eyes of "
            f"{bundle.model.pictured_by}, the cell member that contributes most."
        )
    if len(rows) > CARDS:
        about += f" The {CARDS} patients with the highest probability."
    return section("Patient by patient", tag("p", about), tag("div", *cards, class_="cards"))


def _card(each: Judged, row: pd.Series[Any], bundle: Bundle) -> ET.Element:
    lanes: list[Node] = []
    for member, said in zip(bundle.members, each.logits, strict=True):
        score, known = float(expit(said)), not np.isnan(said)
        lanes += [
            tag("span", member.task, class_="who"),
            lane(score, score, score, positive=bool(row["verdict"]))
            if known
            else tag("span", "nothing seen"),
            tag("span", f"{score:.2f}" if known else "", class_="number"),
        ]
    seen = f"{each.cells} cells, {each.smears} smear{'s' if each.smears > 1 else ''}"
    return tag(
        "div",
        tag("b", each.patient),
        tag("div", f"probability {row['probability']:.2f}; {seen}", class_="note"),
        *([tag("div", str(row["warning"]), class_="note")] if row["warning"] else []),
        *pictures(*each.pictures),
        tag("div", *lanes, class_="rows"),
        class_="card",
    )


def _model(bundle: Bundle, combination: Combination) -> ET.Element:
    model = bundle.model
    rows: list[list[Node]] = [
        ["ensemble", model.name],
        ["members", ", ".join(member.task for member in model.members)],
        ["summary of a patient's scores", combination.summary.replace("_", "-")],
        ["aplsmear", aplsmear.__version__],
    ]
    rows += [
        [f"{point} operating point", f"{at:.3f}"] for point, at in sorted(combination.thresholds.items())
    ]
    inputs: list[list[Node]] = [[name, tag("code", digest)] for name, digest in sorted(model.inputs.items())]
    return section(
        "The model",
        grid(["", "value"], rows),
        tag("h3", "What it was made from"),
        grid(["input", "md5, as in dvc.lock"], inputs),
    )


def _limits(positive: str, negative: str) -> ET.Element:
    texts = (
        "Research only. This is not a medical device and was not validated as one.",
        "Models of this kind are known to lose much of their accuracy on smears from another laboratory, "
        "stain, microscope or camera, operating points more than the order of patients. No warning does not "
        "mean that these smears are like those of training.",
        f"Probabilities presume that {positive} is as common as in training, among {positive} and {negative} "
        "alone. A patient with any other condition is not foreseen.",
        "A low probability does not rule out APL. Where it is suspected, treat and test as guidelines say.",
    )
    return section("Limits of use", tag("ul", *(tag("li", text) for text in texts)))
