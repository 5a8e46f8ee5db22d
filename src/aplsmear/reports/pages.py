"""Pages from Jinja templates: one frame, one stylesheet, one set of charts for all of them.

A template lies in the room of its page (``reports/templates``, ``prediction``, ``workspace``), so a change of
one page makes no stage stale that writes another. Text from data is escaped, a name that a template lacks is
an error, and equal content gives equal bytes. A page opens offline: it has no script and loads nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from scipy.special import expit

from aplsmear import __version__, words
from aplsmear.evaluation.operating_points import wilson_interval
from aplsmear.files import whole

_DIAGNOSES = {"apl": "APL", "aml": "other AML", "healthy": "healthy"}
_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


def render(template: str, **content: Any) -> str:
    """Fill in a template: a path below ``aplsmear``, such as ``reports/templates/ensemble.html.j2``.

    Raises jinja2.UndefinedError if it names something that `content` lacks.
    """
    return _ENVIRONMENT.get_template(template).render(content)


def write(path: Path, text: str) -> None:
    """Write a page as UTF-8; a reader finds the old file or the new one, whole."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def diagnosis(name: str) -> str:
    """A diagnosis as people write it."""
    return _DIAGNOSES.get(name, name)


def member_scores(members: Sequence[str], logits: np.ndarray) -> list[tuple[str, float | None]]:
    """The summary of each member for one patient as a probability; None: the member had no cell or smear.

    Logits are float64 (members,), NaN where there is none.
    """
    return [
        (member, None if np.isnan(logit) else float(expit(logit)))
        for member, logit in zip(members, logits, strict=True)
    ]


def curve_content(
    table: pd.DataFrame, curves: Mapping[str, pd.DataFrame], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """What `curves.html.j2` draws: points of the charts, and numbers of patients (is, called).

    The table has ``label, verdict, sensitive`` of each patient; `curves` are of `curve_tables`, `measured` of
    `aplsmear.ensembles.combination.measure`. ``at`` has the rates at both operating points.
    """
    band = curves["band"]
    return {
        "at": {"balanced": measured, "sensitive": measured["at_sensitive"]},
        "prevalence": float(table["label"].mean()),
        "roc": points(curves["roc"], "fpr", "tpr"),
        "band": points(band, "fpr", "low") + points(band[::-1], "fpr", "high"),
        "precision_recall": points(curves["precision_recall"], "recall", "precision"),
        "calibration": with_ends(curves["calibration"]),
        "confusion": {
            point: [
                [int(((table["label"] == label) & (table[column] == call)).sum()) for call in (1, 0)]
                for label in (1, 0)
            ]
            for point, column in (("balanced", "verdict"), ("sensitive", "sensitive"))
        },
    }


def with_ends(calibration: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `aplsmear.evaluation.curves.calibration_table`, with the 95 % interval of each share."""
    shares = [wilson_interval(round(seen * n), int(n)) for seen, n in points(calibration, "observed", "n")]
    table = calibration.assign(low=[each.low for each in shares], high=[each.high for each in shares])
    return records(table)


def study_content(
    patients: pd.Series,
    smears: pd.DataFrame,
    cells: pd.DataFrame,
    left_out: Mapping[str, Any],
    logits: np.ndarray,
) -> dict[str, Any]:
    """What study.j2 needs about the patients of a page, given their names.

    `smears` (``patient, site``) and `cells` (``patient``) may be of other patients, too. `left_out`: what ->
    ``count`` (`aplsmear.data.dataset`). `logits` are summaries of the members, float64 (patients, members),
    NaN where there is none.
    """
    smears, cells = (each[each["patient"].isin(set(patients))] for each in (smears, cells))
    return {
        "patients": len(patients),
        "smears": len(smears),
        "cells": len(cells),
        "sites": len({*smears["site"], *cells.get("site", ())} - {""}),
        "left_out": words.left_out(left_out),
        "incomplete": int(np.isnan(logits).any(axis=1).sum()),
    }


def points(table: pd.DataFrame, x: str, y: str) -> list[tuple[float, float]]:
    """Two columns as points of a chart."""
    return list(zip(table[x].tolist(), table[y].tolist(), strict=True))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def data_uri(picture: bytes) -> str:
    """A picture (PNG, JPEG, GIF or SVG) as an address that holds it."""
    kind = next((kind for mark, kind in _SIGNATURES.items() if picture.startswith(mark)), "image/svg+xml")
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def _percent(share: float) -> str:
    """A place between 0 and 1, as CSS writes it."""
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("aplsmear", ""),
    autoescape=jinja2.select_autoescape((), ("md.j2",), default_for_string=True, default=True),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.globals["version"] = __version__
_ENVIRONMENT.filters |= {"data_uri": data_uri, "percent": _percent}
