"""The report of an ensemble and the card of its model: equal numbers give equal bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Findings(Results):
    """The results of an ensemble, and the pictures of the cells that the page shows."""

    pictures: Mapping[str, bytes]  # cell -> JPEG


def page(found: Findings) -> str:
    """The report as HTML, which opens offline."""
    return pages.render("reports/templates/ensemble.html.j2", **content(found))


def model_card(found: Findings) -> str:
    """What the model is for, how good it is and its limits, as Markdown without a patient's name."""
    seed, thresholds = found.settings["seed"], found.verdicts.combinations[-1].thresholds
    shown = content(found) | {"seed": seed, "thresholds": thresholds}
    return pages.render("reports/templates/model_card.md.j2", **shown)


def with_pictures(results: Results, views: Path) -> Findings:
    """The results, with the pictures of the cells that `page` shows, from the file of their views."""
    cells = {cell for ends in wanted_cells(results).values() for end in ends for cell in end}
    return Findings(**vars(results), pictures=plain_views(views, cells) if cells else {})


def wanted_cells(results: Results) -> dict[str, tuple[list[str], list[str]]]:
    """The cells on the cards: patient -> cells with the most evidence for and against the positive diagnosis.

    Patients without cells are left out. If no member reads cells, there is nobody.
    """
    column, table = EVIDENCE + results.inputs.name, results.verdicts.table
    places = {place for shown in _patients_with_a_card(table).values() for place in shown}
    cells = results.evidence[results.evidence["patient"].isin(table["patient"].iloc[sorted(places)])]
    if column not in cells:
        return {}
    found = {}
    for patient, mine in cells.groupby("patient"):
        most, least = most_evidence(mine[column].to_numpy(), _SHOWN)
        found[str(patient)] = (mine["cell"].iloc[most].tolist(), mine["cell"].iloc[least].tolist())
    return found


def content(found: Findings) -> dict[str, Any]:
    """What the templates of the report and of the model card show, as plain data."""
    table, measured, last = found.verdicts.table, found.measured, found.verdicts.combinations[-1]
    items = found.inputs.items
    positive, negative = map(
        pages.diagnosis, (found.inputs.ensemble.positive, found.inputs.ensemble.negative)
    )
    folds = sorted(table["fold"].unique())
    return {
        "name": found.inputs.name,
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
            table["patient"], items["smear"], items["cell"], found.inputs.left_out, found.verdicts.logits
        ),
        **pages.curve_content(table, found.curves, measured),
        "patients": pages.records(table.sort_values(["probability", "patient"], ascending=[False, True])),
        "thresholds_of": {fold: found.verdicts.combinations[fold].thresholds for fold in folds},
        **_cards(found),
        **_importance(found.importance),
        "linear": not last.fitted.hidden.shape[1],
        "members": list(_members(found)),
        "comparison": pages.records(found.comparison),
        "cells": pages.records(found.cells.table),
        "alarm": last.alarm,
        "balanced": last.thresholds["balanced"],
        "allowed": [(each, smallest_miss_rate(last.alarm.patients, each)) for each in _CONFIDENCES],
        "chosen": found.verdicts.chosen,
        "inputs": found.inputs.md5,
        "settings": list(flat(found.settings)),
    }


def _patients_with_a_card(table: pd.DataFrame) -> dict[str, list[int]]:
    """Rows of the patients who get a card, by the reason."""
    certainty = (table["probability"] - 0.5).abs()
    reasons = {
        "certain": certainty,
        "uncertain": table["high"] - table["low"],
        "wrong": certainty[table["verdict"] != table["label"]],
    }
    return {
        reason: [int(place) for place in key.sort_values(ascending=False, kind="stable").index[:_CARDS]]
        for reason, key in reasons.items()
    }


def _cards(found: Findings) -> dict[str, list[dict[str, Any]]]:
    verdicts, cells = found.verdicts, wanted_cells(found)
    members, rows = verdicts.combinations[-1].members, pages.records(verdicts.table)

    def card(place: int) -> dict[str, Any]:
        ends = cells.get(str(rows[place]["patient"]), ([], []))
        most, least = (
            [(cell, found.pictures[cell]) for cell in end if cell in found.pictures] for end in ends
        )
        scores = pages.member_scores(members, verdicts.logits[place])
        return {**rows[place], "most": most, "least": least, "scores": scores}

    return {
        reason: [card(place) for place in places]
        for reason, places in _patients_with_a_card(verdicts.table).items()
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


def _members(found: Findings) -> Iterator[dict[str, Any]]:
    """Each member with its patients, the median of their items, and its weight in the last model.

    A network has weights of hidden units, and none of members.
    """
    fitted = found.verdicts.combinations[-1].fitted
    weights = [None] * len(found.inputs.members) if fitted.hidden.shape[1] else fitted.weights.tolist()
    patients = found.verdicts.table["patient"]
    for place, (name, table) in enumerate(found.inputs.members.items()):
        counts = table[(table["outer_fold"] == 0) & table["patient"].isin(patients)]["items"]
        yield {"name": name, "patients": len(counts), "median": counts.median(), "weight": weights[place]}
