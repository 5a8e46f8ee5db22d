"""Experiments side by side on one page that opens offline: numbers, parameters, plots and pictures.

The plots are those of DVC, Vega-Lite specifications. Each is drawn once as an SVG picture and put into the
page as an image, so that nothing in it can run, load, or become HTML.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aplsmear.reports import pages

_AUROC, *_ENDS = _ABOVE = ("auroc.value", "auroc.low", "auroc.high")
_DIGITS = 4
# What is better, by the name of a number: more, less, or nearer to the value. Other numbers are not judged.
_MORE = {"auroc", "average_precision", "balanced_accuracy", "difference", "sensitivity", "specificity"}
_LESS = {"brier"}
_NEARER = {"calibration_slope": 1.0, "calibration_intercept": 0.0}
_WIDE = 520.0  # px; a wider plot has a row of its own
_DARK = """<style>@media screen and (prefers-color-scheme: dark) {
.role-axis-label text, .role-axis-title text, .role-legend-label text, .role-legend-title text,
.role-title text, .role-title-text text { fill: #c8d0da }
.role-axis-grid line { stroke: #343d4a }
.role-axis-domain line, .role-axis-tick line { stroke: #9aa5b4 }
}</style>"""

Values = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Compared:
    """What DVC has of some revisions."""

    revisions: Sequence[str]  # as people typed them; the others are compared with the first
    metrics: Values  # file -> dotted name -> the value in each revision, None where there is none
    params: Values  # the same, with values of any kind
    plots: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # title -> Vega-Lite with its data
    pictures: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)  # title -> revision -> bytes


def page(compared: Compared) -> str:
    """The whole comparison as HTML."""
    headline, others, same = [], [], 0
    for file, numbers in sorted(compared.metrics.items()):
        folder = str(Path(file).parent)
        tasks = numbers.get("task", [None] * len(compared.revisions))
        if _AUROC in numbers:
            headline.append((folder, _beside_first(_AUROC, numbers[_AUROC], tasks, _intervals(numbers))))
        for name, values in sorted(numbers.items()):
            if name in _ABOVE:
                continue
            if any(_difference(values[0], value) for value in values[1:]):
                others.append((f"{folder} {name}", _beside_first(name, values, tasks)))
            else:
                same += 1
    return pages.render(
        "workspace/compare.html.j2",
        revisions=list(compared.revisions),
        headline=headline,
        params=_params(compared.params),
        others=others,
        same=same,
        plots=[_plot(title, specification) for title, specification in compared.plots.items()],
        pictures=compared.pictures,
    )


def draw(specification: Mapping[str, Any]) -> str:
    """Draw a Vega-Lite specification with its data as SVG, without a network; data from elsewhere is refused.

    Check boxes are switched on: nobody can tick them in a picture. Raises ValueError if it cannot be drawn.
    """
    import vl_convert

    drawn: dict[str, Any] = copy.deepcopy(dict(specification))
    for param in drawn.get("params", []):
        bound = param.get("bind")
        if isinstance(bound, dict) and bound.get("input") == "checkbox":
            param["value"] = True
    svg = vl_convert.vegalite_to_svg(drawn, config={"background": "transparent"}, allowed_base_urls=[])
    return svg.replace(">", ">" + _DARK, 1)


def _plot(title: str, specification: Mapping[str, Any]) -> dict[str, Any]:
    svg = draw(specification)
    width = re.match(r'<svg [^>]*\bwidth="([\d.]+)"', svg)
    return {"title": title, "svg": svg.encode(), "wide": width is not None and float(width[1]) > _WIDE}


def _params(params: Values) -> list[tuple[str, list[str]]]:
    """The parameters that differ, as text."""
    return [
        (name if file == "params.yaml" else f"{file}: {name}", [_plain(value) for value in values])
        for file, found in sorted(params.items())
        for name, values in sorted(found.items())
        if any(value != values[0] for value in values[1:])
    ]


def _intervals(numbers: Mapping[str, Sequence[Any]]) -> list[tuple[float, float] | None]:
    """The 95 % interval of the AUROC of each revision, None where there is none."""
    nothing = [None] * len(numbers[_AUROC])
    pairs = zip(*(numbers.get(end, nothing) for end in _ENDS), strict=True)
    return [None if None in pair else pair for pair in pairs]


def _beside_first(
    name: str,
    values: Sequence[Any],
    tasks: Sequence[str | None],
    intervals: Sequence[tuple[float, float] | None] | None = None,
) -> list[dict[str, Any]]:
    """Each value with its interval and its difference from the first value; no difference: 0.

    Values of different tasks are not subtracted: the difference is NaN.
    """
    return [
        {
            "value": value,
            "task": task if len(set(tasks)) > 1 and name != "task" else None,
            "interval": interval,
            "difference": _difference(values[0], value) if task == tasks[0] else float("nan"),
            "better": _is_better(name, values[0], value) if task == tasks[0] else None,
        }
        for value, task, interval in zip(values, tasks, intervals or [None] * len(values), strict=True)
    ]


def _is_better(name: str, first: Any, other: Any) -> bool | None:
    """Whether a number is better than the first; None: neither is, or it is no such number."""
    measure = name.removesuffix(".value").rpartition(".")[2]
    if not all(isinstance(value, (int, float)) for value in (first, other)) or first == other:
        return None
    if measure in _NEARER:
        return bool(abs(other - _NEARER[measure]) < abs(first - _NEARER[measure]))
    return bool((other > first) == (measure in _MORE)) if measure in _MORE | _LESS else None


def _difference(first: Any, other: Any) -> float:
    """The difference in the digits that are shown; NaN where only one of the two is a number."""
    known = [isinstance(value, (int, float)) for value in (first, other)]
    if all(known):
        return float(round(other - first, _DIGITS))
    return float("nan") if any(known) else 0.0


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
