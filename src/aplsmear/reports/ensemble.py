"""The report of an ensemble and the card of its model: equal numbers give equal bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from aplsmear.ensembles.evidence import EVIDENCE, most_evidence
from aplsmear.ensembles.promise import smallest_miss_rate
from aplsmear.ensembles.run import Results
from aplsmear.images.view_store import plain_views
from aplsmear.params import flat
from aplsmear.reports import pages

_CONFIDENCES = (0.8, 0.9, 0.95)
_CARDS = 3  # patients that get a card, for each reason
_SHOWN = 4  # cells on a card for the positive diagnosis, and against it


def page(results: Results, pictures: Mapping[str, bytes]) -> str:
    """The report as HTML, which opens offline; `pictures` are the JPEGs of the cells that it shows."""

    def pictured(cells: Sequence[str]) -> list[tuple[str, bytes]]:
        return [(cell, pictures[cell]) for cell in cells if cell in pictures]

    shown = {
        reason: [each | {"most": pictured(each["most"]), "least": pictured(each["least"])} for each in found]
        for reason, found in cards(results).items()
    }
    return pages.render("reports/templates/ensemble.html.j2", **content(results), **shown)


def model_card(results: Results) -> str:
    """What the model is for, how good it is and its limits, as Markdown without a patient's name."""
    shown = content(results) | {"seed": results.settings["seed"]}
    shown["thresholds"] = results.verdicts.combinations[-1].thresholds
    return pages.render("reports/templates/model_card.md.j2", **shown)


def read_pictures(results: Results, views: Path) -> dict[str, bytes]:
    """The JPEGs of the cells that `page` shows, by cell, from the file of their views."""
    cells = {
        cell for found in cards(results).values() for each in found for cell in each["most"] + each["least"]
    }
    return plain_views(views, cells) if cells else {}


def cards(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The patients who get a card, by the reason: ``certain``, ``uncertain`` and ``wrong``.

    Each is a row of the verdicts with the ``scores`` of the members, and with the cells that have the
    ``most`` evidence for the positive diagnosis and the ``least``. There are none if no member reads cells.
    """
    table, cells, column = results.verdicts.table, results.evidence, EVIDENCE + results.inputs.name
    certainty = (table["probability"] - 0.5).abs()
    reasons = {
        "certain": certainty,
        "uncertain": table["high"] - table["low"],
        "wrong": certainty[table["verdict"] != table["label"]],
    }
    rows, members = pages.records(table), results.verdicts.combinations[-1].members

    def card(place: int) -> dict[str, Any]:
        mine = cells[cells["patient"] == rows[place]["patient"]] if column in cells else cells[:0]
        ends = most_evidence(mine[column].to_numpy(), _SHOWN) if len(mine) else ([], [])
        most, least = (mine["cell"].iloc[end].tolist() for end in ends)
        scores = pages.member_scores(members, results.verdicts.logits[place])
        return {**rows[place], "most": most, "least": least, "scores": scores}

    return {
        reason: [card(place) for place in key.sort_values(ascending=False, kind="stable").index[:_CARDS]]
        for reason, key in reasons.items()
    }


def content(results: Results) -> dict[str, Any]:
    """What the templates of the report and of the model card show, as plain data."""
    table, measured, last = results.verdicts.table, results.measured, results.verdicts.combinations[-1]
    items = results.inputs.items
    positive, negative = map(
        pages.diagnosis, (results.inputs.ensemble.positive, results.inputs.ensemble.negative)
    )
    folds = sorted(table["fold"].unique())
    return {
        "name": results.inputs.name,
        "positive": positive,
        "negative": negative,
        "folds": [str(fold) for fold in folds],
        "cohort": [
            (diagnosis, [int((chosen["fold"] == fold).sum()) for fold in folds])
            for diagnosis, chosen in (
                (positive, table[table["label"] == 1]),
                (negative, table[table["label"] == 0]),
                ("all", table),
            )
        ],
        "measured": measured,
        "study": pages.study_content(
            table["patient"], items["smear"], items["cell"], results.inputs.left_out, results.verdicts.logits
        ),
        **pages.curve_content(table, results.curves, measured),
        "patients": pages.records(table.sort_values(["probability", "patient"], ascending=[False, True])),
        "thresholds_of": {fold: results.verdicts.combinations[fold].thresholds for fold in folds},
        **_importance(results.importance),
        "linear": not last.fitted.hidden.shape[1],
        "members": list(_members(results)),
        "comparison": pages.records(results.comparison),
        "cells": pages.records(results.cells.table),
        "alarm": last.alarm,
        "balanced": last.thresholds["balanced"],
        "allowed": [(each, smallest_miss_rate(last.alarm.patients, each)) for each in _CONFIDENCES],
        "chosen": results.verdicts.chosen,
        "inputs": results.inputs.md5,
        "settings": list(flat(results.settings)),
    }


def _importance(table: pd.DataFrame) -> dict[str, Any]:
    """The drops of the AUROC, the largest first, and their places between -widest (0) and widest (1)."""
    widest = max(0.05, float(table[["auroc_drop", "low", "high"]].abs().to_numpy().max()))
    ranked = table.sort_values(["auroc_drop", "member"], ascending=[False, True])
    places = (ranked.set_index("member") / widest + 1) / 2
    places = places.rename(columns={"auroc_drop": "value"}).reset_index()
    return {
        "widest": widest,
        "importance": pages.records(places.assign(drop=ranked["auroc_drop"].to_numpy())),
    }


def _members(results: Results) -> Iterator[dict[str, Any]]:
    """Each member with its patients, the median of their items, and its weight in the last model.

    A network has weights of hidden units, and none of members.
    """
    fitted = results.verdicts.combinations[-1].fitted
    weights = [None] * len(results.inputs.members) if fitted.hidden.shape[1] else fitted.weights.tolist()
    patients = results.verdicts.table["patient"]
    for place, (name, table) in enumerate(results.inputs.members.items()):
        counts = table[(table["outer_fold"] == 0) & table["patient"].isin(patients)]["items"]
        yield {"name": name, "patients": len(counts), "median": counts.median(), "weight": weights[place]}
