"""Judge new patients by a bundle, in one pass over the smears, patient by patient.

The way down, all of it in `judge_patients`: smears -> views -> features -> a score of each head for each cell
and smear -> one summary per member and patient -> the calibrated probability of the combination. Views and
features are made as in the pipeline (JPEG, float16): a patient of the training cohort gets from the models of
the held-out fold exactly the probability in ``ensembles/<name>/predictions.csv``. Memory holds the views of a
few smears and the records of the patients that they belong to, for any number of patients.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, tee
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from aplsmear.compute.engine import HERE, Engine
from aplsmear.data.schema import CELLS_FILE
from aplsmear.ensembles.baselines import POOLED, Baselines
from aplsmear.ensembles.bundle import Bundle, Scorer
from aplsmear.ensembles.cell_curve import CellCurve
from aplsmear.ensembles.combination import Combination
from aplsmear.ensembles.evidence import Evidence, Items, attended, evidence_of, most_evidence, scored
from aplsmear.ensembles.familiarity import Mean, Moments, how_stained, stain_of
from aplsmear.ensembles.pooling import PLAIN, same_logits, summary_logit
from aplsmear.errors import UserError
from aplsmear.features.forward import FeatureRequest, features_of_views
from aplsmear.heads.bags import attend, gates_and_logits
from aplsmear.heads.head import mean_over_views, score
from aplsmear.images.reading import decode_jpeg, encode_jpeg, fitting
from aplsmear.images.view_store import View
from aplsmear.images.views import Part, parts_of, views_of_parts
from aplsmear.params import LEVELS, Level, of_backbones
from aplsmear.tables import as_written

CHUNK = 512  # views that go through the networks together: one partition
CARDS = 100  # patients with a card of cells on a page, those with the highest probability
SHOWN = 12  # cells of a patient that are shown for a diagnosis, and against it
_SIDE = 64  # px of a cell that is shown

Views = Mapping[Level, Sequence[View]]
_Piece = tuple[str, int, Views]  # patient, number of smears, views of these smears and of cells


class Picture(NamedTuple):
    """A cell that a page shows."""

    name: str
    jpeg: bytes
    evidence: float
    scores: list[tuple[str, float]]  # column of `Evidence` -> number


Pictures = tuple[list[Picture], list[Picture]]  # most evidence for the positive diagnosis; most against it


@dataclass(frozen=True)
class Verdict:
    """The result of an ensemble for one patient."""

    patient: str
    smears: int
    cells: int
    logits: np.ndarray  # float64 (members,): summaries, NaN where a member has no items of the patient
    probability: float  # calibrated, of the positive diagnosis
    distance: float  # from the training patients in features (`aplsmear.ensembles.familiarity`), or NaN
    stain: float  # from the training patients in stain, or NaN
    warnings: dict[str, str]  # by what they are about: items, stain, distance
    baselines: Mapping[str, float]  # probability by each plain baseline; empty if they are not wanted
    pictures: Pictures
    evidence: Evidence | None  # of the cells; None: not wanted, or no member reads cells


@dataclass
class _Record:
    """What is collected of a patient until all smears of the patient are processed."""

    smears: int = 0
    items: dict[Level, list[str]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    # By task, a score for each item; of a head on bags, the features of each cell.
    scores: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    features: Moments = field(default_factory=Moments)
    stain: Mean = field(default_factory=Mean)
    pooled: Mean = field(default_factory=Mean)
    pictures: dict[str, bytes] = field(default_factory=dict)


class Models:
    """The models of one outer fold of a bundle."""

    def __init__(
        self, bundle: Bundle, outer_fold: int, baselines: bool = False, evidence: bool = False
    ) -> None:
        """Collect what the models need; networks are built later, where they run.

        With `baselines`, the plain baselines of the bundle judge, too. With `evidence`, verdicts have the
        evidence of all cells, and pictures.
        """
        self.bundle, self.outer_fold, self.evidence = bundle, outer_fold, evidence
        self.baselines = bundle.baselines if baselines else Baselines({}, None)
        self.combination = bundle.combinations[outer_fold]
        scorers = {scorer.task: scorer for scorer in bundle.members}
        shares = {task for share in self.baselines.shares.values() for task in share.members}
        if bundle.weigh_by.task in shares or any(self._is_weighted(scorer) for scorer in bundle.members):
            scorers[bundle.weigh_by.task] = bundle.weigh_by
        # Of each level, the tasks whose heads score its items.
        self.scorers: dict[Level, list[Scorer]] = {
            level: [scorer for scorer in scorers.values() if scorer.member.images == level]
            for level in LEVELS
        }
        self.requests = [request for level in LEVELS for request in self._requests(level)]

    def _is_weighted(self, scorer: Scorer) -> bool:
        """Whether the scores of `Model.weigh_by` are the weights of its items."""
        weighted = self.combination.summary not in PLAIN
        return weighted and scorer.member.level == self.bundle.weigh_by.member.level

    def _requests(self, level: Level) -> Iterator[FeatureRequest]:
        names = {scorer.heads[self.outer_fold].features for scorer in self.scorers[level]}
        if self.bundle.model.reference_level == level:
            names.add(self.bundle.model.reference_features)
        if self.baselines.pooled and level == "cell":
            names.add(self.baselines.pooled.layer)
        single = {part for name in names for part in of_backbones(name)}
        for backbone in sorted({name.split("/")[0] for name in single}):
            layers = sorted(name.partition("/")[2] for name in single if name.split("/")[0] == backbone)
            yield self.bundle.backbone(backbone, level, layers)

    @property
    def views(self) -> int:
        """The largest number of augmented views that are averaged with the plain view."""
        averaged = [scorer.average for each in self.scorers.values() for scorer in each]
        return min(max(averaged), self.bundle.model.augment.views)

    def averaged(self, level: Level) -> int:
        """The largest number of augmented views of an item of a level that are averaged; -1: none is read."""
        if not any(request.level == level for request in self.requests):
            return -1
        return max((scorer.average for scorer in self.scorers[level]), default=0)

    def add_scores(self, chunk: Sequence[tuple[_Record, Views]], features: Mapping[str, np.ndarray]) -> None:
        """Score some smears and their cells, and add the scores to the records of their patients.

        A chunk has the record of the patient and the needed views of each smear; `features` are of all these
        views (`aplsmear.features.forward.features_of_views`).
        """
        for level in LEVELS:
            owners = [(record, view) for record, views in chunk for view in views[level]]
            if not owners:
                continue
            plain = np.flatnonzero([view.view == 0 for _, view in owners])
            more = np.diff(np.append(plain, len(owners))) - 1
            scores = {
                scorer.task: self._scores(scorer, features, plain, more) for scorer in self.scorers[level]
            }
            model, pooled = self.bundle.model, self.baselines.pooled
            for item, row in enumerate(plain):
                record, view = owners[row]
                record.items[level].append(view.item)
                if self.evidence and level == "cell":
                    record.pictures[view.item] = view.image
                for task, values in scores.items():
                    record.scores[task].append(values[item])
                if level == model.reference_level:
                    record.features.add(_joined(features, level, model.reference_features, [int(row)]))
                    record.stain.add(stain_of(view)[None])
                if pooled and level == "cell":
                    record.pooled.add(features[f"cell/{pooled.layer}"][row][None])

    def _scores(
        self, scorer: Scorer, features: Mapping[str, np.ndarray], plain: np.ndarray, more: np.ndarray
    ) -> np.ndarray:
        """The scores of items by one task, float32 (items,), averaged over as many views as in training.

        Of a head on bags, the features of the cells instead, float16 (items, views, channels): it scores the
        patient when all cells are there.
        """
        head = scorer.heads[self.outer_fold]
        values = _joined(features, scorer.member.images, head.features)
        if scorer.member.level == "patient":
            rows = [plain + np.minimum(view, more) for view in range(scorer.average + 1)]
            return np.asarray(values[np.stack(rows, axis=1)])
        return mean_over_views(lambda rows: score(head, values, rows), plain, more, scorer.average)

    def verdict(self, patient: str, record: _Record) -> Verdict:
        """The verdict on a patient whose smears are all in the record."""
        reference, summary = self.bundle.reference, self.combination.summary
        logits = np.array([self._summary(scorer, record, summary) for scorer in self.bundle.members])
        seen = record.features.count > 0
        found = Verdict(
            patient=patient,
            smears=record.smears,
            cells=len(record.items["cell"]),
            logits=logits,
            probability=float(self.combination.probability(logits[None])[0]),
            distance=reference.typical.distance(record.features.describe()) if seen else float("nan"),
            stain=reference.stain.distance(record.stain.mean()) if seen else float("nan"),
            warnings={},
            baselines=dict(self._baselines(record)),
            pictures=([], []),
            evidence=None,
        )
        found.warnings.update(self._warnings(found, record))
        evidence = self._evidence(record, logits) if self.evidence else None
        if evidence is None:
            return found
        return replace(found, pictures=_pictures(evidence, record.pictures), evidence=evidence)

    def _evidence(self, record: _Record, logits: np.ndarray) -> Evidence | None:
        """The evidence of the cells; None: no member reads cells, or there are none."""
        of_cells = {
            scorer.task: self._items(scorer, record)
            for scorer in self.bundle.members
            if scorer.member.images == "cell" and record.scores.get(scorer.task)
        }
        if not of_cells:
            return None
        return evidence_of(record.items["cell"], of_cells, self.combination, logits)

    def _items(self, scorer: Scorer, record: _Record) -> Items:
        """What one member computed of each item of a patient."""
        scores = np.array(record.scores[scorer.task])
        if scorer.member.level == "patient":
            head = scorer.heads[self.outer_fold]
            return attended([gates_and_logits(head, scores[:, view]) for view in range(scores.shape[1])])
        weights = np.array(record.scores[self.bundle.weigh_by.task]) if self._is_weighted(scorer) else None
        return scored(scores, weights, "mean" if scorer.member.one_each else self.combination.summary)

    def _baselines(self, record: _Record) -> Iterator[tuple[str, float]]:
        """The probability by each plain baseline."""
        scorers = {scorer.task: scorer for scorer in [self.bundle.weigh_by, *self.bundle.members]}
        for name, share in self.baselines.shares.items():
            logits = [self._summary(scorers[member], record, share.summary) for member in share.members]
            yield name, float(share.probability(np.array([logits]))[0])
        if pooled := self.baselines.pooled:
            mean = record.pooled.mean() if record.pooled.count else np.full_like(pooled.mean, np.nan)
            yield POOLED, float(pooled.probability(mean[None])[0])

    def _summary(self, scorer: Scorer, record: _Record, summary: str) -> float:
        """A summary of the scores of one member, as a logit; NaN without items."""
        if not record.scores.get(scorer.task):
            return float("nan")
        scores = np.array(record.scores[scorer.task])
        if scorer.member.level == "patient":
            bag = scores[np.argsort(np.array(record.items["cell"]), kind="stable")]
            head = scorer.heads[self.outer_fold]
            each = [np.float32(attend(head, bag[:, view])[0]) for view in range(bag.shape[1])]
            scores = np.mean(each, keepdims=True)
        if scorer.member.one_each:
            logit: Any = same_logits(float(np.mean(scores)))[summary]
        else:
            weights = record.scores[self.bundle.weigh_by.task] if self._is_weighted(scorer) else None
            logit = summary_logit(summary, scores, None if weights is None else np.array(weights))
        return as_written(float(logit))  # as the combination was fitted and judged

    def _warnings(self, verdict: Verdict, record: _Record) -> Iterator[tuple[str, str]]:
        model, reference = self.bundle.model, self.bundle.reference
        pairs = zip(self.bundle.members, verdict.logits, strict=True)
        without = [scorer for scorer, logit in pairs if np.isnan(logit)]
        count = len(record.items[model.reference_level])
        named = {level: [each.task for each in without if each.member.images == level] for level in LEVELS}
        if without:
            lines = (
                f"no {level}s: there are no scores of {', '.join(named[level])}"
                for level in LEVELS
                if named[level]
            )
            yield "items", "; ".join(lines)
        elif count < model.min_items:
            common = f"99 % of the training patients had at least {np.ceil(model.min_items):.0f}"
            yield "items", f"few {model.reference_level}s: {count}, {common}"
        if verdict.stain > 1:
            how = how_stained(reference.stain, record.stain.mean())
            what = f"unfamiliar stain or camera ({how})" if how else "unfamiliar stain or camera"
            yield "stain", f"{what}: {verdict.stain:.1f} times the limit"
        if verdict.distance > 1:
            yield "distance", f"unlike the training patients: {verdict.distance:.1f} times the limit"


def check_input(bundle: Bundle, smears: pd.DataFrame, cells: pd.DataFrame, folder: Path) -> None:
    """Raise UserError if members need cells or smears, and the data set of a folder has none."""
    of_smears, of_cells = (
        [scorer.task for scorer in bundle.members if scorer.member.images == level]
        for level in ("smear", "cell")
    )
    if of_smears and smears.empty:
        raise UserError(
            f"{folder} has pictures of single cells and no smears, but the members {', '.join(of_smears)} "
            "need smears: train an ensemble without them (`aplsmear profile crops`), or give the smears"
        )
    if of_cells and cells.empty:
        what = "no cell has a usable box in" if (folder / CELLS_FILE).exists() else "there is no"
        raise UserError(
            f"{folder}: {what} {CELLS_FILE}, but the members {', '.join(of_cells)} need cells: "
            f"`aplsmear cells {folder}` finds the cells of the smears and writes this file"
        )


def judge_patients(
    models: Models,
    root: Path,
    smears: pd.DataFrame,
    cells: pd.DataFrame,
    engine: Engine = HERE,
    files: Mapping[str, str] | None = None,
) -> Iterator[Verdict]:
    """The verdict on every patient, sorted by name, each as soon as all smears of the patient are processed.

    `smears` and `cells` are of `aplsmear.data.dataset.read_data_set`; the paths in the column `image` start
    from the folder `root`; `files` as in `aplsmear.images.views.parts_of`. The engine changes no result.
    """
    return (one for (one,) in judge_together([models], root, smears, cells, engine, files))


def judge_together(
    several: Sequence[Models],
    root: Path,
    smears: pd.DataFrame,
    cells: pd.DataFrame,
    engine: Engine = HERE,
    files: Mapping[str, str] | None = None,
) -> Iterator[list[Verdict]]:
    """The verdicts of several ensembles of one training run on every patient, in one pass over the smears.

    Each is the verdict of `judge_patients`, to which the other arguments belong, too.
    """
    model = several[0].bundle.model
    views = max(models.views for models in several)
    settings = model.augment.model_copy(update={"views": views, "extra_views": {}})
    parts = list(parts_of(root, smears, cells, settings, files, by_patient=True))
    requests = _together(request for models in several for request in models.requests)
    levels = {request.level for request in requests}
    made = views_of_parts(parts, settings, model.seed, engine, levels)
    averaged: dict[Level, int] = {
        level: max(models.averaged(level) for models in several) for level in LEVELS
    }
    of_patients = (
        piece
        for part, each in zip(parts, made, strict=True)
        for piece in _by_patient(
            part, {level: [view for view in each[level] if view.view <= averaged[level]] for level in LEVELS}
        )
    )
    chunks, again = tee(_chunks(of_patients))
    forward = partial(features_of_views, requests=requests)
    together = (
        {level: [view for _, _, views in chunk for view in views[level]] for level in LEVELS}
        for chunk in again
    )
    records: dict[str, list[_Record]] = defaultdict(lambda: [_Record() for _ in several])
    for chunk, features in zip(chunks, engine.map(forward, together, processes=False), strict=True):
        for place, models in enumerate(several):
            for patient, count, _ in chunk:
                records[patient][place].smears += count
            models.add_scores([(records[patient][place], needed) for patient, _, needed in chunk], features)
        last = chunk[-1][0]  # the next chunk may have more smears of this patient
        for patient in [each for each in records if each != last]:
            yield _verdicts(several, patient, records.pop(patient))
    for patient, each in records.items():
        yield _verdicts(several, patient, each)


def _joined(
    features: Mapping[str, np.ndarray], level: Level, name: str, rows: Sequence[int] | slice = slice(None)
) -> np.ndarray:
    """Some rows of features by their name in params.yaml: ``backbone/layer``, or of several backbones."""
    parts = [features[f"{level}/{part}"][rows] for part in of_backbones(name)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _together(requests: Iterable[FeatureRequest]) -> list[FeatureRequest]:
    """One request for each backbone and level, for the layers of all."""
    found: dict[tuple[str, Level], FeatureRequest] = {}
    for each in requests:
        known = found.setdefault((each.backbone, each.level), each)
        layers = tuple(sorted({*known.layers, *each.layers}))
        found[each.backbone, each.level] = known._replace(layers=layers)
    return list(found.values())


def _verdicts(several: Sequence[Models], patient: str, records: Sequence[_Record]) -> list[Verdict]:
    """The verdict of each ensemble on a patient."""
    return [models.verdict(patient, record) for models, record in zip(several, records, strict=True)]


def keep_pictures(verdicts: Iterable[Any], count: int) -> list[Any]:
    """Verdicts or answers, with pictures only of the `count` highest probabilities: this limits memory."""
    kept: list[Any] = []
    pictured: list[tuple[float, int]] = []
    for place, each in enumerate(verdicts):
        kept.append(each)
        heapq.heappush(pictured, (each.probability, -place))
        if len(pictured) > count:
            lowest = -heapq.heappop(pictured)[1]
            kept[lowest] = replace(kept[lowest], pictures=([], []))
    return kept


def verdict_table(verdicts: Sequence[Verdict], combination: Combination, curve: CellCurve) -> pd.DataFrame:
    """The table that `predict` writes.

    ``patient, probability, low, high, verdict, sensitive, alarm, more_cells, cells, smears, distance, stain,
    warning``, rows as in `verdicts`. The combination is that of the models, or an adapted one. ``low, high``:
    the 95 % interval of the probability over combinations refitted on resampled training patients; NaN for a
    held-out fold. ``more_cells`` is of `CellCurve.advice` at the balanced point.
    """
    logits = np.array([each.logits for each in verdicts])
    probability, (low, high) = combination.probability(logits), combination.interval(logits)
    columns = {"patient": [each.patient for each in verdicts], "probability": probability}
    columns |= {"low": low, "high": high} | combination.calls(probability)
    balanced = combination.thresholds["balanced"]
    columns["more_cells"] = [
        curve.advice(float(chance), balanced, each.cells)
        for each, chance in zip(verdicts, probability, strict=True)
    ]
    for column in ("cells", "smears", "distance", "stain"):
        columns[column] = [getattr(each, column) for each in verdicts]
    return pd.DataFrame(columns | {"warning": ["; ".join(each.warnings.values()) for each in verdicts]})


def _pictures(evidence: Evidence, jpeg: Mapping[str, bytes]) -> Pictures:
    """The cells with the most evidence for the positive diagnosis, and with the most against it."""
    most, least = (
        [
            Picture(
                evidence.items[n],
                encode_jpeg(fitting(decode_jpeg(jpeg[evidence.items[n]]), _SIDE), quality=85),
                float(evidence.evidence[n]),
                [(name, float(values[n])) for name, values in evidence.columns.items()],
            )
            for n in side
        ]
        for side in most_evidence(evidence.evidence, SHOWN)
    )
    return most, least


def _by_patient(part: Part, views: Views) -> Iterator[_Piece]:
    """The views of a part, divided by patient."""
    if part.smear:
        yield part.smear.patient, 1, views
        return
    for patient, cells in groupby(part.cells, key=lambda cell: cell.patient):
        names = {cell.name for cell in cells}
        yield patient, 0, {"smear": [], "cell": [view for view in views["cell"] if view.item in names]}


def _chunks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Consecutive pieces, collected until they have `CHUNK` views."""
    chunk: list[_Piece] = []
    count = 0
    for piece in pieces:
        chunk.append(piece)
        count += sum(map(len, piece[2].values()))
        if count >= CHUNK:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk
