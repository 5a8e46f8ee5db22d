"""One ensemble for new patients, and its page: it opens offline, with the same bytes for the same results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear import words
from aplsmear.compute.engine import HERE, Engine
from aplsmear.ensembles.bundle import Bundle
from aplsmear.prediction.predict import CARDS, Models, Verdict, judge_patients, verdict_table
from aplsmear.prediction.recalibration import adapted, in_words
from aplsmear.reports import pages


class Alone:
    """One ensemble for new patients, as `aplsmear.prediction.answer.Panel` is for several."""

    def __init__(self, bundle: Bundle, fold: int | None, adapt: bool, evidence: bool) -> None:
        """Choose the models that never saw a fold (None: the final models).

        With `adapt`, `adapted` shifts all logits to the patients that it gets. `evidence` is as for `Models`.
        """
        self.models = Models(bundle, bundle.outer_fold_of(fold), evidence=evidence)
        self.bundles, self.combination, self.adapt = [bundle], self.models.combination, adapt
        self.positive, self.negative = map(pages.diagnosis, (bundle.model.positive, bundle.model.negative))
        self.remarks = [
            f"The ensemble {bundle.model.name} is for patients with one of two diagnoses: {self.positive}, "
            f"{self.negative}. For others, its numbers mean nothing."
        ]

    def judge(
        self, root: Path, smears: pd.DataFrame, cells: pd.DataFrame, engine: Engine = HERE
    ) -> Iterator[Verdict]:
        """The verdict on every patient; the arguments are those of `judge_patients`."""
        return judge_patients(self.models, root, smears, cells, engine)

    def adapted(self, found: Sequence[Verdict]) -> Alone:
        """The ensemble for the results of these patients; a remark says how far their logits are shifted."""
        if not self.adapt:
            return self
        shifted = copy(self)
        shifted.combination = adapted(self.combination, np.array([each.logits for each in found]))
        how = in_words(self.combination, shifted.combination, "them")
        shifted.remarks = [
            *self.remarks,
            f"Adapted to these {len(found)} patients: their logits are {how}",
        ]
        return shifted

    def table(self, found: Sequence[Verdict]) -> pd.DataFrame:
        """The table that `predict` writes: `verdict_table`."""
        return verdict_table(found, self.combination, self.bundles[0].model.cell_curve)

    def lines(self, _table: pd.DataFrame) -> list[str]:
        """What `predict` prints about the table: nothing."""
        return []

    def verdicts(self, found: Sequence[Verdict]) -> dict[str, Sequence[Verdict]]:
        """The verdicts by the name of the ensemble."""
        return {self.bundles[0].model.name: found}

    def page(
        self,
        found: Sequence[Verdict],
        table: pd.DataFrame,
        left_out: Mapping[str, Any],
        remarks: Sequence[str],
    ) -> str:
        """The page of new patients as HTML.

        The table has its rows as in `found`. `left_out` is of the report of
        `aplsmear.data.dataset.read_data_set`. The remarks stand in the head of the page.
        """
        (bundle,) = self.bundles
        members = [member.task for member in bundle.members]
        patients = [
            {**row, "pictures": each.pictures, "scores": pages.member_scores(members, each.logits)}
            for each, row in zip(found, pages.records(table), strict=True)
        ]
        return pages.render(
            "prediction/page.html.j2",
            name=bundle.model.name,
            positive=self.positive,
            negative=self.negative,
            patients=sorted(patients, key=lambda row: (-row["probability"], row["patient"])),
            cards=CARDS,
            left_out=words.left_out(left_out),
            remarks=remarks,
            model=bundle.model,
            summary=self.combination.summary,
            thresholds=self.combination.thresholds,
            alarm=self.combination.alarm,
        )
