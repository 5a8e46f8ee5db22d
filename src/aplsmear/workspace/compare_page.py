"""Experiments side by side on one page that needs no network: numbers, parameters, plots and pictures.

The plots are those of DVC, Vega-Lite specifications, drawn here once and for all. As in
`aplsmear.reports.ensemble`, the page is built as a tree, so every text is escaped; no script runs, nothing is
loaded from elsewhere.
"""

from __future__ import annotations

import base64
import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from aplsmear.files import whole
from aplsmear.reports.ensemble import Node, tag

_HEADLINE = "auroc.value"
_SHOWN_ABOVE = {"auroc.value", "auroc.low", "auroc.high"}
_DIGITS = 4
_WIDE = 520.0  # px; a drawing that is wider has the row for itself
_TEXT = ("font-family", "font-size", "font-weight", "font-style", "fill", "opacity")
_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}

Values = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Compared:
    """What is known of some revisions.

    Attributes:
        revisions: their names, as people typed them; the others are held against the first.
        metrics: file -> dotted name of a number -> its value in each revision, None where there is none.
        params: the same of parameters, with values of any kind.
        plots: title -> Vega-Lite specification, its data inside.
        pictures: title -> revision -> the file's bytes (PNG, JPEG or GIF).
    """

    revisions: Sequence[str]
    metrics: Values
    params: Values
    plots: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)


def page(compared: Compared) -> str:
    """The whole comparison as HTML."""
    title = " / ".join(compared.revisions)
    style = "".join(
        resources.files(f"aplsmear.{room}").joinpath(name).read_text(encoding="utf-8")
        for room, name in (("reports", "report.css"), ("workspace", "compare.css"))
    )
    first = compared.revisions[0]
    body = tag(
        "main",
        tag("h1", title),
        tag("p", f"Experiments side by side: how the others differ from {first}.", class_="lead"),
        *_headline(compared),
        _params(compared),
        _numbers(compared),
        *_plots(compared),
        *_pictures(compared),
    )
    root = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", style),
        ),
        tag("body", body),
        lang="en",
    )
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"


def write_page(path: Path, compared: Compared) -> None:
    """Write `page`; a reader finds the old file or the new one, whole."""
    with whole(path) as part:
        part.write_text(page(compared), encoding="utf-8", newline="\n")


# --- sections -------------------------------------------------------------------------------------


def _headline(compared: Compared) -> Iterator[ET.Element]:
    """The AUROC of all that has one, ensembles first."""
    rows: list[list[Node]] = []
    for file, numbers in sorted(compared.metrics.items()):
        if _HEADLINE in numbers:
            nothing = [None] * len(compared.revisions)
            ends = (numbers.get(f"auroc.{end}", nothing) for end in ("low", "high"))
            intervals = [
                f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
                for low, high in zip(*ends, strict=True)
            ]
            rows.append([str(Path(file).parent), *_against_first(numbers[_HEADLINE], intervals)])
    if not rows:
        yield _section("AUROC", tag("p", "None of these has a number named auroc.value."))
        return
    remark = "Below each, its 95 % interval. A difference that is small beside the intervals says nothing."
    yield _section(
        "AUROC on held-out items",
        _table(["", *compared.revisions], rows, numbers=True),
        tag("p", remark, class_="note"),
    )


def _params(compared: Compared) -> ET.Element:
    rows: list[list[Node]] = []
    for file, params in sorted(compared.params.items()):
        for name, values in sorted(params.items()):
            if any(value != values[0] for value in values[1:]):
                texts = [_plain(value) for value in values]
                cells = [
                    tag("td", text, class_="param changed" if text != texts[0] else "param") for text in texts
                ]
                rows.append([name if file == "params.yaml" else f"{file}: {name}", *cells])
    if not rows:
        return _section("Parameters", tag("p", "All are the same."))
    return _section("Parameters that differ", _table(["parameter", *compared.revisions], rows))


def _numbers(compared: Compared) -> ET.Element:
    rows: list[list[Node]] = []
    same = 0
    for file, numbers in sorted(compared.metrics.items()):
        for name, values in sorted(numbers.items()):
            if name in _SHOWN_ABOVE:
                continue
            if any(_apart(values[0], value) for value in values[1:]):
                rows.append([f"{Path(file).parent} {name}", *_against_first(values)])
            else:
                same += 1
    if not rows:
        return _section("Other numbers", tag("p", f"All {same} are the same."))
    remark = tag("p", f"{same} more are the same.", class_="note")
    return _section(
        "Other numbers that differ", _table(["", *compared.revisions], rows, numbers=True), remark
    )


def _plots(compared: Compared) -> Iterator[ET.Element]:
    figures = []
    for place, (title, specification) in enumerate(compared.plots.items()):
        drawing = draw(specification, f"plot{place}")
        wide = float(drawing.get("width", "0")) > _WIDE
        figures.append(
            tag(
                "figure",
                tag("div", drawing, class_="scroll"),
                tag("figcaption", title),
                class_="wide" if wide else "plot",
            )
        )
    if figures:
        yield _section("Plots", tag("div", *figures, class_="plots"))


def _pictures(compared: Compared) -> Iterator[ET.Element]:
    parts: list[Node] = []
    for title, shots in sorted(compared.pictures.items()):
        figures = [
            tag(
                "figure",
                tag("img", src=_embedded(shots[revision]), alt=f"{title} of {revision}"),
                tag("figcaption", revision),
            )
            for revision in compared.revisions
            if revision in shots
        ]
        parts += [tag("h3", title), tag("div", *figures, class_="shots")]
    if parts:
        yield _section("Pictures", *parts)


# --- parts ----------------------------------------------------------------------------------------


def draw(specification: Mapping[str, Any], name: str) -> ET.Element:
    """A Vega-Lite specification as an SVG element to put into a page, drawn without a network.

    Args:
        specification: with its data; what it asks for from elsewhere is refused.
        name: goes before every id, since a page holds many drawings.

    Raises:
        ValueError: this is no specification that can be drawn.
    """
    import vl_convert

    root = ET.fromstring(vl_convert.vegalite_to_svg(_switched_on(specification), allowed_base_urls=[]))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            own = f"{name}-{value}" if key == "id" else value.replace("url(#", f"url(#{name}-")
            element.set(key, own)
        if element.tag == "text":  # the page's own style for texts must not win
            style = "; ".join(f"{key}: {element.attrib.pop(key)}" for key in _TEXT if key in attributes)
            element.set("style", style)
    width = root.get("width", "0")
    root.attrib.pop("height", None)
    root.set("style", f"width: {width}px; max-width: 100%")
    return root


def _switched_on(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every check box ticked: a hand cannot do so on paper."""
    found: dict[str, Any] = copy.deepcopy(dict(specification))
    for param in found.get("params", []):
        bound = param.get("bind")
        if isinstance(bound, dict) and bound.get("input") == "checkbox":
            param["value"] = True
    return found


def _section(title: str, *children: Node) -> ET.Element:
    return tag("section", tag("h2", title), *children)


def _against_first(values: Sequence[Any], intervals: Sequence[str] = ()) -> list[ET.Element]:
    """A cell for each value, with its interval, and with how far it is from the first."""
    cells = []
    for place, value in enumerate(values):
        apart = _apart(values[0], value)
        below = [tag("small", text) for text in intervals[place : place + 1] if text]
        if apart and not math.isnan(apart):
            below.append(tag("small", f"{apart:+g}", class_="more" if apart > 0 else "less"))
        cells.append(tag("td", _number(value), *below, class_="number changed" if apart else "number"))
    return cells


def _apart(first: Any, other: Any) -> float:
    """The difference in the digits that are shown; not a number where only one of them is one."""
    known = [isinstance(value, (int, float)) for value in (first, other)]
    if all(known):
        return float(round(other - first, _DIGITS))
    return float("nan") if any(known) else 0.0


def _table(header: Sequence[str], rows: Sequence[Sequence[Node]], *, numbers: bool = False) -> ET.Element:
    side = [{"class_": "number"} if numbers and place else {} for place in range(len(header))]
    head = tag("tr", *(tag("th", text, scope="col", **more) for text, more in zip(header, side, strict=True)))
    body = [tag("tr", tag("th", name, scope="row"), *cells) for name, *cells in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _embedded(picture: bytes) -> str:
    kind = next((kind for mark, kind in _SIGNATURES.items() if picture.startswith(mark)), "image/svg+xml")
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"
