"""One page for people about an ensemble: self-contained, the same bytes for the same numbers.

HTML and SVG are built as trees (`tag`), so every text is escaped. Nothing is loaded from elsewhere, no
script runs, and neither a time nor a random name is written.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pandas as pd
from scipy.special import expit

import aplsmear
from aplsmear.ensembles.combination import Candidate, Verdicts, high_is_positive
from aplsmear.ensembles.run import Results
from aplsmear.evaluation.operating_points import wilson_interval
from aplsmear.files import whole
from aplsmear.images.view_store import plain_views

Node = ET.Element | str

WORDS = {"apl": "APL", "aml": "other AML", "healthy": "healthy"}
_METRICS = {
    "auroc": ("AUROC", "chance that a random {positive} patient scores above a random {negative} one"),
    "average_precision": ("average precision", "area under the precision-recall curve"),
    "brier": ("Brier score", "mean squared error of the probability; 0 is best"),
    "calibration_slope": ("calibration slope", "1 is right; below 1, probabilities are too sure"),
    "calibration_intercept": ("calibration intercept", "0 is right; above 0, probabilities are too low"),
}
_CALLS = ("sensitivity", "specificity", "balanced_accuracy")
_SHOWN = 3  # patients of each kind that get a card


@dataclass(frozen=True)
class Findings(Results):
    """The results of an ensemble, and the pictures of the cells that the page shows.

    Attributes:
        pictures: cell -> JPEG.
    """

    pictures: Mapping[str, bytes]

    @property
    def positive(self) -> str:
        """The positive diagnosis, as people write it."""
        return WORDS.get(self.ensemble.positive, self.ensemble.positive)

    @property
    def negative(self) -> str:
        """The negative diagnosis, as people write it."""
        return WORDS.get(self.ensemble.negative, self.ensemble.negative)


def tag(name: str, /, *children: Node, **attributes: object) -> ET.Element:
    """An element; text children are escaped when it is written.

    Args:
        name: of the element.
        children: texts and elements.
        attributes: ``class_`` stands for ``class``, ``_`` for ``-``.
    """
    element = ET.Element(
        name, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()}
    )
    last: ET.Element | None = None
    for child in children:
        if isinstance(child, str):
            if last is None:
                element.text = (element.text or "") + child
            else:
                last.tail = (last.tail or "") + child
        else:
            element.append(child)
            last = child
    return element


def page(found: Findings) -> str:
    """The whole report as HTML."""
    title = f"{found.positive} or {found.negative}?"
    sections = [
        *_head(found, title),
        _cohort(found),
        _numbers(found),
        _curves(found),
        _patients(found),
        _certain(found),
        _members(found),
        _comparison(found),
        _making(found),
        _versions(found),
        _limits(found),
    ]
    return document(f"{title} {found.name}", sections)


def document(title: str, body: Iterable[Node]) -> str:
    """A self-contained page of HTML in the one look of all reports."""
    style = resources.files("aplsmear.reports").joinpath("report.css").read_text(encoding="utf-8")
    root = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", style),
        ),
        tag("body", tag("main", *body)),
        lang="en",
    )
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"


def write_page(path: Path, found: Findings) -> None:
    """Write `page`; a reader finds the old file or the new one, whole."""
    with whole(path) as part:
        part.write_text(page(found), encoding="utf-8", newline="\n")


def with_pictures(results: Results, views: Path) -> Findings:
    """The results, with the pictures of the cells that `write_page` shows.

    Args:
        results: of `aplsmear.ensembles.run.judge_and_compare`.
        views: the views of all cells, of `aplsmear.images.view_store.ViewWriter`.
    """
    member = results.pictured_by
    wanted = wanted_cells(results.verdicts, member, results.members[member]) if member else {}
    cells = {cell for ends in wanted.values() for end in ends for cell in end}
    return Findings(**vars(results), pictures=plain_views(views, cells) if cells else {})


def wanted_cells(
    verdicts: Verdicts, name: str, member: pd.DataFrame
) -> dict[str, tuple[list[str], list[str]]]:
    """The cells that speak most for and most against the positive diagnosis in the patients who get a card.

    Args:
        verdicts: of `aplsmear.ensembles.combination.judge`.
        name: of the member that chooses; one that scores cells.
        member: its table, of `aplsmear.ensembles.pooling.summarise_patients`.

    Returns:
        For each of these patients whom the member has scored: the cells for and the cells against.
    """
    own = {row["patient"]: row for row in _records(member[member["outer_fold"] == member["fold"]])}
    places = {place for shown in _noteworthy(verdicts.table).values() for place in shown}
    patients = verdicts.table["patient"].iloc[sorted(places)]
    ends = ("highest", "lowest") if high_is_positive(verdicts, name) else ("lowest", "highest")
    return {
        patient: (json.loads(own[patient][ends[0]]), json.loads(own[patient][ends[1]]))
        for patient in patients
        if patient in own
    }


def measures(found: Findings) -> list[tuple[str, str, Mapping[str, float]]]:
    """Title, meaning and ``value, low, high`` of each number that hangs on no operating point."""
    words = {"positive": found.positive, "negative": found.negative}
    return [
        (title, meaning.format(**words), found.measured[key]) for key, (title, meaning) in _METRICS.items()
    ]


def calls(found: Findings, point: str) -> Mapping[str, Mapping[str, float]]:
    """The numbers at the operating point ``balanced`` or ``sensitive``, each ``value, low, high``."""
    return found.measured if point == "balanced" else found.measured[f"at_{point}"]


def limits(found: Findings) -> tuple[str, ...]:
    """What nobody who reads the numbers may forget, in sentences."""
    n = int(found.measured["n_patients"])
    return (
        "Research only. This is not a medical device and was not validated as one.",
        f"The numbers hold for patients like these {n}: same laboratories, stain, microscope and camera. "
        "Models of this kind are known to lose much of their accuracy elsewhere; operating points more "
        "than AUROC.",
        f"Probabilities presume that {found.positive} is as common as here, among {found.positive} and "
        f"{found.negative} alone. A patient with any other condition is not foreseen.",
        "With few patients the intervals are wide; a difference well inside them says nothing.",
        "A low probability does not rule out APL. Where it is suspected, treat and test as guidelines say.",
    )


# --- sections -------------------------------------------------------------------------------------


def _head(found: Findings, title: str) -> Iterable[ET.Element]:
    measured, sensitive = found.measured, found.measured["at_sensitive"]
    n = int(measured["n_patients"])
    yield tag("h1", title)
    yield tag(
        "p",
        f"What the ensemble {found.name} says of {n} patients, each judged by models that never saw them.",
        class_="lead",
    )
    yield tag(
        "p",
        tag("b", "For research only."),
        " Not a medical device; no diagnosis may rest on this page. See the limits at its end.",
        class_="warning",
    )
    keys = (
        ("AUROC", measured["auroc"]),
        ("sensitivity, balanced point", measured["sensitivity"]),
        ("specificity, balanced point", measured["specificity"]),
        ("specificity, sensitive point", sensitive["specificity"]),
    )
    yield tag(
        "div",
        *(
            tag(
                "div",
                tag("span", name),
                tag("b", _number(value["value"])),
                tag("span", _range(value)),
                class_="key",
            )
            for name, value in keys
        ),
        class_="keys",
    )


def _cohort(found: Findings) -> ET.Element:
    table = found.verdicts.table
    folds = sorted(table["fold"].unique())
    rows = []
    for label, word in ((1, found.positive), (0, found.negative)):
        mine = table[table["label"] == label]
        counts = [str((mine["fold"] == fold).sum()) for fold in folds]
        rows.append([word, str(len(mine)), *counts])
    rows.append(["all", str(len(table)), *(str((table["fold"] == fold).sum()) for fold in folds)])
    return section(
        "Cohort and folds",
        tag(
            "p",
            "Patients were dealt into folds once, stratified by diagnosis. The verdict on a patient comes "
            "from members, combination, calibration and operating points that were fitted and chosen "
            "without his fold.",
        ),
        grid(
            ["diagnosis", "patients", *(f"fold {fold}" if fold == folds[0] else str(fold) for fold in folds)],
            rows,
            numbers=True,
        ),
    )


def _numbers(found: Findings) -> ET.Element:
    named = measures(found)
    points = {
        "balanced": "both errors weigh the same",
        "sensitive": f"aims at 0.95: no {found.positive} missed",
    }
    for point, meaning in points.items():
        called = calls(found, point)
        named += [(key.replace("_", " "), f"{point} point; {meaning}", called[key]) for key in _CALLS]
    rows: list[list[Node]] = [
        [_explained(title, meaning), _number(value["value"]), _range(value)]
        for title, meaning, value in named
    ]
    return section(
        "Numbers",
        tag("p", "On held-out patients, with 95 % intervals over patients.", class_="note"),
        grid(["measure", "value", "95 % interval"], rows, numbers=True),
    )


def _curves(found: Findings) -> ET.Element:
    table, measured = found.verdicts.table, found.measured
    share = float(table["label"].mean())
    n_positive, n = int(measured["n_positive"]), int(measured["n_patients"])
    points = [
        (1 - values["specificity"]["value"], values["sensitivity"]["value"], style)
        for values, style in ((measured, "point"), (measured["at_sensitive"], "hollow"))
    ]
    roc = _chart(
        "1 - specificity",
        "sensitivity",
        _area(found.band["fpr"], found.band["low"], found.band["high"]),
        _line([0, 1], [0, 1], "chance"),
        _line(found.roc["fpr"], found.roc["tpr"], "curve"),
        *(_dot(x, y, style, 5) for x, y, style in points),
    )
    recall, precision = found.precision_recall["recall"], found.precision_recall["precision"]
    calibration = found.calibration
    bars = []
    for predicted, observed, count in zip(
        calibration["predicted"], calibration["observed"], calibration["n"], strict=True
    ):
        interval = wilson_interval(round(observed * count), int(count))
        bars += [_line([predicted] * 2, [interval.low, interval.high], "whisker"), _dot(predicted, observed)]
    charts = [
        _figure(
            "ROC",
            roc,
            "Band: 95 % of the curves of resampled patients. Filled: balanced operating point; hollow: "
            "sensitive one.",
        ),
        _figure(
            "Precision and recall",
            _chart(
                "recall (sensitivity)",
                "precision",
                _line([0, 1], [share, share], "chance"),
                _line(recall, precision, "curve"),
            ),
            f"Dashed: calling everybody positive, with {n_positive} of {n} patients {found.positive}.",
        ),
        _figure(
            "Calibration",
            _chart("predicted probability", "observed share", _line([0, 1], [0, 1], "chance"), *bars),
            "Patients in groups of like probability, with the 95 % interval of each share. On the dashed "
            "line, probabilities are right.",
        ),
        *(
            _figure(f"Calls at the {point} point", _confusion(found, column), "Patients.")
            for point, column in (("balanced", "verdict"), ("sensitive", "sensitive"))
        ),
    ]
    return section("Curves and calls", tag("div", *charts, class_="charts"))


def _patients(found: Findings) -> ET.Element:
    table = found.verdicts.table.sort_values(["probability", "patient"], ascending=[False, True])
    rows: list[Node] = []
    for row in _records(table):
        called = {2: "both", 1: "sensitive", 0: ""}[int(row["verdict"]) + int(row["sensitive"])]
        rows += [
            tag("span", str(row["patient"]), class_="who"),
            lane(row["probability"], row["low"], row["high"], positive=bool(row["label"])),
            tag("span", f"{row['probability']:.2f}" + (f" · {called}" if called else ""), class_="number"),
        ]
    return section(
        "Every patient",
        tag(
            "p",
            f"Probability of {found.positive}, highest first, with the 95 % interval over combinations "
            "refitted on resampled patients; at the right, the operating points (sensitive, or both) at "
            f"which he is called {found.positive}.",
        ),
        legend(found.positive, found.negative),
        tag("div", tag("div", *rows, class_="rows"), class_="patients"),
    )


def _certain(found: Findings) -> ET.Element:
    member = found.pictured_by
    cells = wanted_cells(found.verdicts, member, found.members[member]) if member else {}
    parts: list[Node] = []
    for title, places in _noteworthy(found.verdicts.table).items():
        cards = [_card(found, place, cells) for place in places]
        parts += [tag("h3", title), tag("div", *cards, class_="cards") if cards else tag("p", "Nobody.")]
    about = "What each member says of some patients: its summary, as a probability of its own question."
    if member:
        about += (
            f" Above, the cells that speak most for and most against {found.positive} in the eyes of "
            f"{member}, the cell member that contributes most."
        )
    return section("The most and the least certain", tag("p", about), *parts)


def _noteworthy(table: pd.DataFrame) -> dict[str, list[int]]:
    """Rows of the patients who get a card, by why."""
    certainty = (table["probability"] - 0.5).abs()
    kinds = {
        "Most certain": certainty,
        "Least certain: widest interval": table["high"] - table["low"],
        "Wrong at the balanced point, the surest first": certainty[table["verdict"] != table["label"]],
    }
    return {
        title: [int(place) for place in key.sort_values(ascending=False, kind="stable").index[:_SHOWN]]
        for title, key in kinds.items()
    }


def _card(found: Findings, place: int, cells: Mapping[str, tuple[list[str], list[str]]]) -> ET.Element:
    row = found.verdicts.table.loc[place]
    positive = bool(row["label"])
    rows: list[Node] = []
    for member, said in zip(
        found.verdicts.combinations[-1].members, found.verdicts.logits[place], strict=True
    ):
        score = float(expit(said))
        known = not np.isnan(said)
        rows += [
            tag("span", member, class_="who"),
            lane(score, score, score, positive=positive) if known else tag("span", "no cell or smear"),
            tag("span", f"{score:.2f}" if known else "", class_="number"),
        ]
    return tag(
        "div",
        tag("b", str(row["patient"])),
        f" · {found.positive if positive else found.negative}",
        tag(
            "div",
            f"probability {row['probability']:.2f} ({row['low']:.2f} to {row['high']:.2f}), fold "
            f"{row['fold']}",
            class_="note",
        ),
        *_pictures(found, str(row["patient"]), cells),
        tag("div", *rows, class_="rows"),
        class_="card",
    )


def _pictures(
    found: Findings, patient: str, cells: Mapping[str, tuple[list[str], list[str]]]
) -> Iterator[ET.Element]:
    ends = cells.get(patient, ([], []))
    shown = [[(cell, found.pictures[cell]) for cell in end if cell in found.pictures] for end in ends]
    yield from pictures(*shown)


def pictures(most: Sequence[tuple[str, bytes]], least: Sequence[tuple[str, bytes]]) -> Iterator[ET.Element]:
    """Cells, as name and JPEG, that speak for and against the positive diagnosis, in a row each."""
    for word, cells in (("for", most), ("against", least)):
        images = [
            tag(
                "img",
                src="data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii"),
                alt=f"cell {name}",
                title=f"cell {name}",
            )
            for name, jpeg in cells
        ]
        if images:
            yield tag("div", tag("span", word, class_="note"), *images, class_="pictures")


def _members(found: Findings) -> ET.Element:
    table = found.importance
    most = max(0.05, float(table[["auroc_drop", "low", "high"]].abs().to_numpy().max()))
    rows: list[Node] = []
    for row in _records(table.sort_values(["auroc_drop", "member"], ascending=[False, True])):
        rows += [
            tag("span", str(row["member"]), class_="who"),
            lane(
                *((value / most + 1) / 2 for value in (row["auroc_drop"], row["low"], row["high"])),
                positive=row["auroc_drop"] > 0,
                marks=[0.5],
            ),
            tag("span", f"{row['auroc_drop']:+.3f}", class_="number"),
        ]
    final = found.verdicts.combinations[-1].fitted
    linear = not final.hidden.shape[1]
    patients = found.verdicts.table["patient"]
    lines = []
    for place, (member, said) in enumerate(found.members.items()):
        items = said[(said["outer_fold"] == 0) & said["patient"].isin(patients)]["items"]
        weight = [f"{final.weights[place]:+.3f}"] if linear else []
        lines.append([member, str(len(items)), f"{items.median():g}", *weight])
    remark = "Items: cells or smears, the median of patients."
    if linear:
        remark += " Weight: of its standardised logit, in the model for new patients."
    return section(
        "What each member contributes",
        tag(
            "p",
            "Drop of the AUROC when what a member says is permuted among the patients of a fold: the mean "
            "and the middle 95 % of the permutations, right of the line where the ensemble needs it. "
            "Members that say the same stand in for each other.",
        ),
        tag("div", *rows, class_="rows"),
        tag("h3", "What stands behind them"),
        grid(
            ["member", "patients", "items each", *(["weight"] if linear else [])],
            lines,
            numbers=True,
        ),
        tag("p", remark, class_="note"),
    )


def _comparison(found: Findings) -> ET.Element:
    rows: list[Node] = []
    cells = []
    for place, row in enumerate(_records(found.comparison)):
        rows += [
            tag("span", str(row["against"]), class_="who"),
            lane(row["auroc"], row["low"], row["high"], positive=place == 0, marks=[0.5]),
            tag("span", f"{row['auroc']:.3f}", class_="number"),
        ]
        if place:
            span = f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}"
            cells.append(
                [str(row["against"]), f"{row['difference']:+.3f}", span, _p(row["p"]), _p(row["p_holm"])]
            )
    return section(
        "Is the ensemble worth it?",
        tag(
            "p",
            "AUROC of the ensemble, of each member alone (with the summary that does best without the "
            "held-out fold) and of plain baselines, on the same held-out patients, with 95 % intervals "
            "from 0 to 1; line: chance.",
        ),
        tag("div", *rows, class_="rows"),
        tag("h3", "Ensemble minus baseline"),
        grid(["baseline", "difference", "95 % interval", "p (DeLong)", "p (Holm)"], cells, numbers=True),
    )


def _making(found: Findings) -> ET.Element:
    chosen = found.verdicts.chosen
    rows = [
        [
            f"without fold {outer_fold}" if outer_fold < len(chosen) - 1 else "for new patients",
            *_described(candidate),
        ]
        for outer_fold, candidate in enumerate(chosen)
    ]
    parts: list[Node] = [
        tag(
            "p",
            "Candidate combinations are compared on the inner folds alone; the simplest within one "
            "standard error of the best is taken. Its probabilities are calibrated on the same inner "
            "folds.",
        ),
        grid(["chosen", "combination", "summary of a patient's scores", "C"], rows),
    ]
    return section("How the verdicts were made", *parts)


def _versions(found: Findings) -> ET.Element:
    return section(
        "Versions",
        tag(
            "p",
            f"aplsmear {aplsmear.__version__}. The md5 of each input is the one in dvc.lock: ",
            tag("code", "git log -S MD5 -- dvc.lock"),
            " finds the commit that holds the code, parameters and data behind this page.",
        ),
        grid(
            ["input", "md5"], [[name, tag("code", digest)] for name, digest in sorted(found.inputs.items())]
        ),
        grid(["parameter", "value"], [[name, text] for name, text in _flat(found.settings)]),
    )


def _limits(found: Findings) -> ET.Element:
    return section("Limits of use", tag("ul", *(tag("li", text) for text in limits(found))))


# --- parts ----------------------------------------------------------------------------------------


def _explained(title: str, meaning: str) -> ET.Element:
    return tag("span", title, tag("span", meaning, class_="meaning"))


def section(title: str, *children: Node) -> ET.Element:
    """A part of the page under a title."""
    return tag("section", tag("h2", title), *children)


def grid(header: Sequence[str], rows: Iterable[Sequence[Node]], numbers: bool = False) -> ET.Element:
    """A table whose first column names the row; `numbers`: the others stand right."""

    def style(column: int) -> dict[str, str]:
        return {"class_": "number"} if numbers and column else {}

    head = tag("tr", *(tag("th", text, scope="col", **style(column)) for column, text in enumerate(header)))
    body = [
        tag(
            "tr",
            *(
                tag("td", cell, **style(column)) if column else tag("th", cell, scope="row")
                for column, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def legend(positive: str, negative: str) -> ET.Element:
    """What the two colours and shapes stand for."""
    return tag(
        "p",
        *(
            tag("span", tag("i", class_=side), word)
            for side, word in (("positive", positive), ("negative", negative))
        ),
        class_="legend",
    )


def lane(value: float, low: float, high: float, *, positive: bool, marks: Sequence[float] = ()) -> ET.Element:
    """A value and its interval on a line from 0 to 1."""
    ends = np.clip([value, low, high], 0, 1) * 100
    return tag(
        "span",
        *(tag("u", style=f"left:{100 * mark:.1f}%") for mark in marks),
        tag("i", style=f"left:{ends[1]:.1f}%;width:{ends[2] - ends[1]:.1f}%"),
        tag("b", style=f"left:{ends[0]:.1f}%"),
        class_="lane " + ("positive" if positive else "negative"),
    )


def _confusion(found: Findings, column: str) -> ET.Element:
    table = found.verdicts.table
    rows = []
    for label, word in ((1, found.positive), (0, found.negative)):
        counts = [((table["label"] == label) & (table[column] == call)).sum() for call in (1, 0)]
        cells = [
            tag("td", str(count), class_="right" if call == label else "wrong")
            for call, count in zip((1, 0), counts, strict=True)
        ]
        rows.append(tag("tr", tag("th", f"is {word}", scope="row"), *cells))
    called = (f"called {found.positive}", f"called {found.negative}")
    head = tag("tr", tag("th"), *(tag("th", text, scope="col") for text in called))
    return tag(
        "div", tag("table", tag("thead", head), tag("tbody", *rows), class_="confusion"), class_="scroll"
    )


def _figure(title: str, drawing: ET.Element, caption: str) -> ET.Element:
    return tag("figure", tag("h3", title), drawing, tag("figcaption", caption))


def _described(candidate: Candidate) -> list[Node]:
    units = f", {candidate.units} hidden units" if candidate.units else ""
    return [candidate.model + units, candidate.summary.replace("_", "-"), f"{candidate.C:g}"]


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as lines: dotted name and value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _number(value: float) -> str:
    return f"{value:.3f}"


def _range(interval: Mapping[str, float]) -> str:
    return f"{interval['low']:.3f} to {interval['high']:.3f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


# --- charts: the unit square in a frame of 340 x 310 -------------------------------------------------

_LEFT, _TOP, _SIDE_X, _SIDE_Y = 44.0, 10.0, 286.0, 250.0


def _x(value: float) -> float:
    return _LEFT + _SIDE_X * value


def _y(value: float) -> float:
    return _TOP + _SIDE_Y * (1 - value)


def _chart(x_label: str, y_label: str, *drawn: ET.Element) -> ET.Element:
    ticks: list[Node] = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        ticks += [
            _line([tick, tick], [0, 1], "grid"),
            _line([0, 1], [tick, tick], "grid"),
            tag("text", f"{tick:g}", x=f"{_x(tick):.1f}", y=f"{_y(0) + 15:.1f}", text_anchor="middle"),
            tag("text", f"{tick:g}", x=f"{_x(0) - 6:.1f}", y=f"{_y(tick) + 4:.1f}", text_anchor="end"),
        ]
    middle = f"{_y(0.5):.1f}"
    return tag(
        "svg",
        *ticks,
        *drawn,
        tag("text", x_label, x=f"{_x(0.5):.1f}", y="300", text_anchor="middle"),
        tag("text", y_label, x="12", y=middle, text_anchor="middle", transform=f"rotate(-90 12 {middle})"),
        viewBox="0 0 340 310",
        role="img",
        aria_label=f"{y_label} against {x_label}",
    )


def _path(x: Iterable[float], y: Iterable[float]) -> str:
    return "M" + "L".join(f"{_x(a):.1f} {_y(b):.1f}" for a, b in zip(x, y, strict=True))


def _line(x: Iterable[float], y: Iterable[float], style: str) -> ET.Element:
    return tag("path", d=_path(x, y), class_=style)


def _area(x: pd.Series, low: pd.Series, high: pd.Series) -> ET.Element:
    return tag("path", d=_path([*x, *x[::-1]], [*low, *high[::-1]]) + "Z", class_="area")


def _dot(x: float, y: float, style: str = "point", radius: float = 4) -> ET.Element:
    return tag("circle", cx=f"{_x(x):.1f}", cy=f"{_y(y):.1f}", r=f"{radius:g}", class_=style)
