"""The page of new patients: it opens offline, with the same bytes for the same results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from aplsmear.ensembles.bundle import Bundle
from aplsmear.ensembles.combination import Combination
from aplsmear.prediction.predict import Verdict
from aplsmear.reports import pages

CARDS = 100  # patients with a card of cells, those with the highest probability


def write_page(
    path: Path,
    bundle: Bundle,
    combination: Combination,
    verdicts: Sequence[Verdict],
    table: pd.DataFrame,
    left_out: Mapping[str, Any],
    remarks: Sequence[str],
) -> None:
    """Write the page.

    `table` (of `aplsmear.prediction.predict.verdict_table`) has its rows as in `verdicts`. `left_out` is of
    the report of `aplsmear.data.dataset.read_data_set`. The remarks stand in the head of the page.
    """
    members = [member.task for member in bundle.members]
    patients = [
        {**row, "pictures": each.pictures, "scores": pages.member_scores(members, each.logits)}
        for each, row in zip(verdicts, pages.records(table), strict=True)
    ]
    text = pages.render(
        "prediction/page.html.j2",
        name=bundle.model.name,
        positive=pages.diagnosis(bundle.model.positive),
        negative=pages.diagnosis(bundle.model.negative),
        patients=sorted(patients, key=lambda row: (-row["probability"], row["patient"])),
        cards=CARDS,
        left_out=left_out,
        remarks=remarks,
        model=bundle.model,
        summary=combination.summary,
        thresholds=combination.thresholds,
        alarm=combination.alarm,
    )
    pages.write(path, text)
