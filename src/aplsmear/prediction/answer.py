"""One answer for each new patient, from the verdicts of several ensembles in one pass over the smears."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear import words
from aplsmear.answer.coupling import DIAGNOSES, Answers, calls, check_manifests, probabilities, shifted
from aplsmear.answer.measures import UNSURE, predictive_values
from aplsmear.answer.report import names_of
from aplsmear.compute.engine import HERE, Engine
from aplsmear.ensembles.bundle import MANIFEST, Bundle
from aplsmear.prediction.predict import CARDS, Models, Pictures, Verdict, judge_together
from aplsmear.reports import pages
from aplsmear.tables import as_written


@dataclass(frozen=True)
class PatientAnswer:
    """The one answer for a patient."""

    verdicts: tuple[Verdict, ...]  # of each ensemble, without pictures
    chances: np.ndarray  # probabilities of `DIAGNOSES`, float64 (3,)
    shown: tuple[str, str]  # the two diagnoses that `pictures` compare
    pictures: Pictures  # of the ensemble that compares them

    @property
    def probability(self) -> float:
        """The probability of APL."""
        return float(self.chances[DIAGNOSES.index("apl")])

    @property
    def warnings(self) -> dict[str, str]:
        """As `Verdict.warnings`. A patient is unfamiliar if no ensemble was trained on similar patients."""
        found = {}
        for kind in ("items", "stain", "distance"):
            texts = [each.warnings.get(kind, "") for each in self._by(kind)]
            if all(texts) or (kind == "items" and any(texts)):
                found[kind] = next(filter(None, texts))
        return found

    def nearest(self, kind: str) -> float:
        """The smallest ``distance`` or ``stain``; NaN: there is none."""
        return float(getattr(self._by(kind)[0], kind))

    def _by(self, kind: str) -> list[Verdict]:
        """The verdicts, the one with the smallest ``distance`` or ``stain`` first."""
        if kind == "items":
            return list(self.verdicts)
        values = {id(each): getattr(each, kind) for each in self.verdicts}
        return sorted(self.verdicts, key=lambda each: (math.isnan(values[id(each)]), values[id(each)]))


class Panel:
    """Several ensembles and the fit that makes one answer of their verdicts."""

    remarks: Sequence[str] = ()  # on what these ensembles are for

    def __init__(
        self,
        bundles: Sequence[Bundle],
        answers: Answers,
        fold: int | None = None,
        prevalence: Sequence[float] | None = None,
        evidence: bool = False,
    ) -> None:
        """Choose the fit; bundles in any order.

        `answers` are of `read_answers`, `fold` is as for `Bundle.outer_fold_of`, `prevalence` that of
        `DIAGNOSES` (None: of the training patients), `evidence` as for `Models`. Raises UserError if there
        is no answer of these ensembles, they are of another run, or there is no such fold.
        """
        answer = answers.of([bundle.model.name for bundle in bundles])
        named = {bundle.model.name: bundle for bundle in bundles}
        check_manifests(answers, {name: bundle.folder / MANIFEST for name, bundle in named.items()})
        self.bundles = [named[name] for name in answer.ensembles]
        self.models = [
            Models(bundle, bundle.outer_fold_of(fold), evidence=evidence) for bundle in self.bundles
        ]
        self.pairs = [answers.pairs[name] for name in answer.ensembles]
        self.fitted = answer.folds[self.models[0].outer_fold]
        self.prevalence = list(prevalence or self.fitted.shares)
        self.is_given, self.sure = prevalence is not None, answers.sure
        held_out = np.array([each.probabilities for each in answer.held_out])
        self._label = np.array([DIAGNOSES.index(each.diagnosis) for each in answer.held_out])
        moved = shifted(held_out, answer.folds[-1].shares, self.prevalence)
        self._called = calls(moved, self.sure)

    def judge(
        self, root: Path, smears: pd.DataFrame, cells: pd.DataFrame, engine: Engine = HERE
    ) -> Iterator[PatientAnswer]:
        """The answer for every patient; the arguments are those of `judge_together`."""
        for verdicts in judge_together(self.models, root, smears, cells, engine):
            pairs = zip(self.models, verdicts, strict=True)
            logits = [as_written(models.combination.logit(each.logits[None])[0]) for models, each in pairs]
            (chances,) = probabilities(self.fitted, np.array([logits]), self.pairs, self.prevalence)
            place = self._pictured(chances, verdicts)
            bare = tuple(replace(each, pictures=([], [])) for each in verdicts)
            yield PatientAnswer(bare, chances, self.pairs[place], verdicts[place].pictures)

    def _pictured(self, chances: np.ndarray, verdicts: Sequence[Verdict]) -> int:
        """The ensemble whose cells are shown: that of the two most probable diagnoses, if it has pictures."""
        likely = {DIAGNOSES[k] for k in np.argsort(chances)[1:]}
        places = range(len(verdicts))
        return max(places, key=lambda n: (bool(verdicts[n].pictures[0]), {*self.pairs[n]} == likely, -n))

    def adapted(self, _found: Sequence[PatientAnswer]) -> Panel:
        """The ensembles for the table and the page: these; one answer is not adapted."""
        return self

    def table(self, found: Sequence[PatientAnswer]) -> pd.DataFrame:
        """The table that `predict` writes.

        ``patient, answer, reason, healthy, aml, apl, cells, smears, distance, stain, warning``: ``reason``
        is that of an answer ``unsure``.
        """
        chances = np.array([each.chances for each in found])
        reasons = [self._reason(each) for each in found]
        called = np.where([bool(reason) for reason in reasons], UNSURE, chances.argmax(axis=1))
        columns: dict[str, Any] = {
            "patient": [each.verdicts[0].patient for each in found],
            "answer": [names_of(each) for each in called],
            "reason": reasons,
            **dict(zip(DIAGNOSES, chances.T, strict=True)),
            "cells": [each.verdicts[0].cells for each in found],
            "smears": [each.verdicts[0].smears for each in found],
        }
        columns |= {kind: [each.nearest(kind) for each in found] for kind in ("distance", "stain")}
        return pd.DataFrame(columns | {"warning": ["; ".join(each.warnings.values()) for each in found]})

    def _reason(self, each: PatientAnswer) -> str:
        """Why a patient is not called; empty: the patient is."""
        if any(np.isnan(verdict.logits).any() for verdict in each.verdicts):
            return each.warnings["items"]
        if calls(each.chances[None], self.sure)[0] != UNSURE:
            return ""
        first, second = np.argsort(-each.chances, kind="stable")[:2]
        likely = " or ".join(f"{DIAGNOSES[k]} ({each.chances[k]:.2f})" for k in (first, second))
        return f"{likely}: a call needs {self.sure:.2f}"

    @property
    def values(self) -> pd.DataFrame:
        """`predictive_values` of the calls at the prevalence, from the held-out training patients."""
        return predictive_values(
            self._label, self._called, self.prevalence, DIAGNOSES, self.bundles[0].model.seed
        )

    def lines(self, table: pd.DataFrame) -> list[str]:
        """What `predict` prints about the table: `values` in words, and the number of each answer."""
        lines = [f"{self.whose}:"]
        for row in pages.records(self.values):
            ppv, npv = (
                "{:.2f} ({:.2f} to {:.2f})".format(*(row[f"{name}{end}"] for end in ("", "_low", "_high")))
                for name in ("ppv", "npv")
            )
            ppv = "none (no patient is called so)" if math.isnan(row["ppv"]) else ppv
            lines.append(f"  {row['diagnosis']}: PPV {ppv}, NPV {npv}")
        counts = table["answer"].value_counts()
        return [*lines, ", ".join(f"{counts.get(name, 0)} {name}" for name in (*DIAGNOSES, "unsure"))]

    def verdicts(self, found: Sequence[PatientAnswer]) -> dict[str, Sequence[Verdict]]:
        """The verdicts by the names of the ensembles."""
        each = zip(*(one.verdicts for one in found), strict=True)
        return dict(zip((bundle.model.name for bundle in self.bundles), each, strict=True))

    @property
    def whose(self) -> str:
        """The prevalence in words."""
        shares = [f"{100 * share:.3g} %" for share in self.prevalence]
        what = zip(shares, ("are healthy", "have other AML", "have APL"), strict=True)
        first, second, third = (" ".join(part) for part in what)
        source = "as --prevalence says" if self.is_given else "as in training; --prevalence changes it"
        return f"Where {first}, {second} and {third} ({source})"

    def page(
        self,
        found: Sequence[PatientAnswer],
        table: pd.DataFrame,
        left_out: Mapping[str, Any],
        remarks: Sequence[str],
    ) -> str:
        """The page of new patients as HTML; arguments as for `aplsmear.prediction.page.Alone.page`."""
        patients = [
            {**row, "pictures": each.pictures, "shown": [pages.diagnosis(name) for name in each.shown]}
            for each, row in zip(found, pages.records(table), strict=True)
        ]
        return pages.render(
            "prediction/answer.html.j2",
            patients=sorted(patients, key=lambda row: (-row["apl"], row["patient"])),
            diagnoses=[(name, pages.diagnosis(name)) for name in DIAGNOSES],
            cards=CARDS,
            panel=self,
            values=pages.records(self.values),
            left_out=words.left_out(left_out),
            remarks=remarks,
        )
