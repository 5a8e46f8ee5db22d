"""How good is an ensemble with fewer cells of each patient, and how many more cells would settle a call?

Held-out patients get new probabilities from a part of their cells, by the combination that never saw them.
Members on smears keep their scores.

- AUROC, sensitivity and specificity at n cells: n different cells of each patient are drawn, and all cells
  of a patient who has fewer. That is what the ensemble would have had if only n cells had been found.
- The spread of a patient's logit at n cells: n cells are drawn with replacement from the patient's own
  (Efron, Ann Stat 1979;7:1; n may differ from their number, Bickel, Goetze & van Zwet, Stat Sin 1997;7:1).

The interval of a patient has two causes. More cells lessen the spread of the cells. They do not lessen that
of the models, which were fitted to few patients (the refits of `aplsmear.ensembles.combination`). So where
the models alone leave a call open, no number of cells is expected to settle it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
import pandas as pd
from pydantic import Field
from scipy.special import expit, logit, softmax
from scipy.stats import rankdata

from aplsmear.ensembles.combination import Combination, Verdicts
from aplsmear.ensembles.evidence import Items, attended, scored
from aplsmear.ensembles.pooling import CLIP, summary_logit
from aplsmear.evaluation.columns import ENDS, Z
from aplsmear.heads.bags import gates_and_logits
from aplsmear.heads.head import Head
from aplsmear.params import Strict

SIZES = (5, 10, 20, 50, 100)  # cells per patient
ALL = "all"
MOST = 1000  # cells of a patient that a laboratory can be asked for
_DRAWS = 100
_CLIP = 1e-6  # of the ends of a probability's interval

Redraw = Callable[[np.ndarray], np.ndarray]  # places of drawn cells (draws, n) -> logits (draws,)


class CellCurve(Strict):
    """The spread of a patient's calibrated logit against the number of cells, as a bundle stores it."""

    cells: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)  # ascending
    spread: list[Annotated[float, Field(ge=0)]]  # standard deviation at so many cells, from the cells alone
    models: Annotated[float, Field(ge=0)]  # standard deviation from the models alone

    def half_width(self, cells: float) -> float:
        """Half of the 95 % interval of the logit of a patient with so many cells (at least 1)."""
        place = np.log(np.clip(cells, self.cells[0], self.cells[-1]))
        spread = np.exp(np.interp(place, np.log(self.cells), np.log(np.maximum(self.spread, 1e-9))))
        outside = math.sqrt(np.exp(place) / cells)  # beyond the ends: as of a mean of independent cells
        return Z * math.hypot(spread * outside, self.models)

    def more_cells(self, margin: float, cells: int) -> int | None:
        """How many more cells are expected to settle the call of a patient with `cells` cells.

        `margin` is the distance of the patient's logit from that of the threshold. 0: the interval does not
        reach the threshold. None: it would still reach it with `MOST` cells.
        """
        margin, cells = abs(margin), max(cells, 1)
        if self.half_width(cells) <= margin:
            return 0
        enough = [each for each in range(cells + 1, MOST + 1) if self.half_width(each) <= margin]
        return enough[0] - cells if enough else None

    def advice(self, probability: float, threshold: float, cells: int) -> str:
        """In words, what more cells would do for the call of a patient; empty: the call is settled."""
        near, far = (float(logit(np.clip(each, _CLIP, 1 - _CLIP))) for each in (probability, threshold))
        more = self.more_cells(near - far, cells)
        if more == 0:
            return ""
        if more is None:
            return "unsure: more cells are not expected to settle the call"
        return f"unsure: about {more} more cells are expected to settle the call"


@dataclass(frozen=True)
class Curve:
    """The curve of one ensemble.

    The table has a row for each of `SIZES`, and one for all cells: ``drawn`` (5 ... all); ``cells``, their
    number, for all cells the median; ``patients`` that have so many; ``auroc``, ``sensitivity`` and
    ``specificity`` at the balanced point, each with ``..._low`` and ``..._high``, the 95 % interval over
    draws of cells and patients; ``width``, the mean width of the patients' 95 % intervals.
    """

    table: pd.DataFrame
    bundled: CellCurve  # for new patients


class CellMember(Protocol):
    """A member that reads cells."""

    def redraw(self, cells: np.ndarray, outer_fold: int, summary: str, /) -> Redraw:
        """What gives a patient's logits from drawn cells. `cells` int64 (n,) are all cells of the patient."""

    def items(self, cells: np.ndarray, outer_fold: int, summary: str, /) -> Items:
        """What the member computed of each cell of a patient."""


@dataclass(frozen=True)
class ScoredCells:
    """A member of level cell: scores of all cells and their weights (None: 1), (cells, outer folds)."""

    scores: np.ndarray
    weights: np.ndarray | None

    def redraw(self, cells: np.ndarray, outer_fold: int, summary: str) -> Redraw:
        """As for `CellMember`."""
        score = self.scores[cells, outer_fold]
        weight = None if self.weights is None else self.weights[cells, outer_fold]
        return lambda drawn: summary_logit(summary, score[drawn], None if weight is None else weight[drawn])

    def items(self, cells: np.ndarray, outer_fold: int, summary: str) -> Items:
        """As for `CellMember`."""
        weight = None if self.weights is None else self.weights[cells, outer_fold]
        return scored(self.scores[cells, outer_fold], weight, summary)


@dataclass(frozen=True)
class AttendedCells:
    """A member of level patient: its heads on bags, and the features that they read."""

    heads: Sequence[Head]  # of every outer fold
    values: Mapping[str, np.ndarray]  # float16 (views, channels), by the name of the features
    row: np.ndarray  # int64 (cells,): row of the plain view of each cell
    views: np.ndarray  # int64 (cells,): number of augmented views, in the rows after the plain one
    average: int  # augmented views whose scores are averaged with that of the plain view

    def redraw(self, cells: np.ndarray, outer_fold: int, _summary: str) -> Redraw:
        """As for `CellMember`; a head on bags has one score, so there is nothing to summarise."""
        seen = self._seen(cells, outer_fold)

        def probability(drawn: np.ndarray) -> np.ndarray:
            each = [
                expit((softmax(gates[drawn], axis=1) * logits[drawn]).sum(axis=1).mean(axis=1))
                for gates, logits in seen
            ]
            return np.asarray(logit(np.clip(np.mean(each, axis=0), CLIP, 1 - CLIP)))

        return probability

    def items(self, cells: np.ndarray, outer_fold: int, _summary: str) -> Items:
        """As for `CellMember`."""
        return attended(self._seen(cells, outer_fold))

    def _seen(self, cells: np.ndarray, outer_fold: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Gates and logits of the cells, for each view."""
        head = self.heads[outer_fold]
        values, row, views = self.values[head.features], self.row[cells], self.views[cells]
        return [
            gates_and_logits(head, values[row + np.minimum(view, views)]) for view in range(self.average + 1)
        ]


def cell_curve(
    verdicts: Verdicts, members: Mapping[str, CellMember], owner: np.ndarray, seed: int, draws: int = _DRAWS
) -> Curve:
    """Draw cells of every held-out patient, `draws` times for each number of cells.

    `members` are those that read cells; `owner`, str (cells,), is the patient of each cell, in the order of
    the members' arrays.
    """
    table, names = verdicts.table, verdicts.combinations[-1].members
    part = np.zeros((len(SIZES) + 1, draws, len(table)))  # logits from different cells; last: all cells
    spread = np.zeros((len(SIZES) + 1, len(table)))
    count = np.zeros(len(table), dtype=np.int64)
    for place, (patient, fold) in enumerate(zip(table["patient"], table["fold"], strict=True)):
        cells = np.flatnonzero(owner == patient)
        combination, own = verdicts.combinations[fold], verdicts.logits[place]
        redraws = {
            names.index(name): member.redraw(cells, fold, combination.summary)
            for name, member in members.items()
            if len(cells)
        }
        count[place] = len(cells)
        rng = np.random.Generator(np.random.Philox([seed, place]))
        mixed = rng.random((draws, len(cells))).argsort(axis=1)
        part[-1, :, place] = _logits(combination, own, {}, mixed)
        for step, size in enumerate([*SIZES, len(cells)]):
            if size < len(cells):
                part[step, :, place] = _logits(combination, own, redraws, mixed[:, :size])
            else:
                part[step, :, place] = part[-1, :, place]
            again = rng.integers(0, max(len(cells), 1), (draws, size))
            spread[step, place] = _logits(combination, own, redraws, again).std()
    return _curve(verdicts, part, spread, count, seed)


def _logits(
    combination: Combination, own: np.ndarray, redraws: Mapping[int, Redraw], drawn: np.ndarray
) -> np.ndarray:
    """Calibrated logits of one patient, float64 (draws,): members in `redraws` read the drawn cells."""
    logits = np.tile(own, (len(drawn), 1))
    for member, redraw in redraws.items():
        logits[:, member] = redraw(drawn)
    return combination.logit(logits)


def _curve(verdicts: Verdicts, part: np.ndarray, spread: np.ndarray, count: np.ndarray, seed: int) -> Curve:
    """The measures of `cell_curve`'s logits (sizes, draws, patients) and spreads (sizes, patients)."""
    table = verdicts.table
    label, fold = table["label"].to_numpy(), table["fold"].to_numpy()
    balanced = np.array([verdicts.combinations[each].thresholds["balanced"] for each in fold])
    low, high = (logit(np.clip(table[end], _CLIP, 1 - _CLIP)).to_numpy() for end in ("low", "high"))
    models = (high - low) / (2 * Z)
    own = part[-1, 0]
    draws = _resampled_patients(label, part.shape[1], seed)
    rows = []
    for step, drawn in enumerate([*map(str, SIZES), ALL]):
        enough = int((count >= SIZES[step]).sum()) if step < len(SIZES) else len(count)
        size = SIZES[step] if step < len(SIZES) else float(np.median(count))
        half = Z * np.hypot(spread[step], models)
        row: dict[str, float | str] = {"drawn": drawn, "cells": size, "patients": enough}
        called = expit(part[step]) >= balanced
        resampled = np.take_along_axis(part[step], draws, axis=1)
        row |= _with_ends("auroc", _aurocs(label, part[step]), _aurocs(label[draws[0]], resampled))
        for name, answer in (("sensitivity", 1), ("specificity", 0)):
            right = called == answer
            mine = draws[:, label[draws[0]] == answer]
            resampled = np.take_along_axis(right, mine, axis=1).mean(axis=1)
            row |= _with_ends(name, right[:, label == answer].mean(axis=1), resampled)
        row["width"] = float((expit(own + half) - expit(own - half)).mean())
        rows.append(row)
    together = np.sqrt((spread[:-1] ** 2).mean(axis=1))
    bundled = CellCurve(
        cells=list(SIZES),
        spread=[round(float(each), 6) for each in np.minimum.accumulate(together)],
        models=round(float(np.sqrt((models**2).mean())), 6),
    )
    return Curve(pd.DataFrame(rows), bundled)


def _resampled_patients(label: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Patients drawn with replacement within each diagnosis, negative first: int64 (draws, patients)."""
    rng = np.random.Generator(np.random.Philox(seed))
    classes = [np.flatnonzero(label == answer) for answer in (0, 1)]
    return np.concatenate([rng.choice(each, (draws, len(each))) for each in classes], axis=1)


def _aurocs(label: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The AUROC of each draw, float64 (draws,), by the ranks of its scores (draws, patients)."""
    positive, n = label == 1, int(label.sum())
    above = rankdata(score, axis=1)[:, positive].sum(axis=1) - n * (n + 1) / 2
    return np.asarray(above / (n * (len(label) - n)))


def _with_ends(name: str, values: np.ndarray, resampled: np.ndarray) -> dict[str, float]:
    """The mean over draws of cells, and the 95 % interval over draws of cells and patients."""
    value = float(values.mean())
    low, high = np.quantile(resampled, ENDS)
    return {name: value, f"{name}_low": min(float(low), value), f"{name}_high": max(float(high), value)}
