"""New patients judged by a bundle: smears stream through once, patient by patient.

Views are cut, kept as JPEG and turned into float16 features as the pipeline does, so that a patient of the
training cohort gets from the models of his held-out fold what ``ensembles/<name>/predictions.csv`` says.
Memory holds some smears' views and the patient in hand, however many patients there are. Where a cohort's
features are standardised, nobody can be scored before all are seen: they wait in a temporary folder.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from aplsmear.compute.engine import HERE, Engine
from aplsmear.data.schema import CELLS_FILE
from aplsmear.ensembles.bundle import Bundle, Scorer
from aplsmear.ensembles.combination import Combination
from aplsmear.ensembles.familiarity import Moments, how_stained, stain_of
from aplsmear.ensembles.pooling import PLAIN, ends_of, same_logits, summary_logits
from aplsmear.errors import UserError
from aplsmear.features.backbones import FeatureRequest, features_of_views
from aplsmear.heads.bags import attend
from aplsmear.heads.head import mean_over_views, score
from aplsmear.images.view_store import View
from aplsmear.images.views import all_views
from aplsmear.params import LEVELS, Level
from aplsmear.progress import progress
from aplsmear.tables import as_written

CHUNK = 512  # views that are gathered before they go through the networks: one partition


class PredictError(UserError, ValueError):
    """New patients cannot be judged so."""


@dataclass(frozen=True)
class Judged:
    """What an ensemble says of one patient.

    Attributes:
        patient: name.
        smears: how many.
        cells: how many.
        logits: float64 (members,): summaries as logits, NaN where a member has seen nothing of the patient.
        probability: calibrated, of the positive diagnosis.
        distance: from the training patients by features, see `aplsmear.ensembles.familiarity`; NaN without
        items.
        stain: the same by stain.
        warnings: for people.
        pictures: cells, as name and JPEG: those that speak most for the positive diagnosis, and those most
            against it.
    """

    patient: str
    smears: int
    cells: int
    logits: np.ndarray
    probability: float
    distance: float
    stain: float
    warnings: list[str]
    pictures: tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]


@dataclass
class _InHand:
    """What is gathered of a patient until all smears of his have come."""

    smears: int = 0
    items: dict[Level, list[str]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    # By task, a score for each item; of a head on bags, the features of each cell.
    scores: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    features: Moments = field(default_factory=Moments)
    stain: Moments = field(default_factory=Moments)
    pictures: dict[str, bytes] = field(default_factory=dict)


class _Seen(NamedTuple):
    """Some smears that have gone through the networks together."""

    smears: list[tuple[str, dict[Level, list[View]]]]  # patient and needed views of each
    features: dict[str, np.ndarray]  # of all of them, of `aplsmear.features.backbones.features_of_views`


class Judge:
    """The models of one outer fold of a bundle.

    Attributes:
        bundle: it.
        outer_fold: whose models judge.
        combination: of that outer fold.
        weighs: whether its summary weights cells.
        scorers: level -> the members, and the task that weights cells, whose scores are needed.
        passes: forward passes that they need; their networks are built where they are made.
    """

    def __init__(self, bundle: Bundle, outer_fold: int) -> None:
        """See what the models of one outer fold need.

        Args:
            bundle: of `aplsmear.ensembles.bundle.read_bundle`.
            outer_fold: of `Bundle.outer_of`.
        """
        self.bundle, self.outer_fold = bundle, outer_fold
        self.combination = bundle.combinations[outer_fold]
        self.weighs = self.combination.summary not in PLAIN
        scorers = {scorer.task: scorer for scorer in bundle.members}
        if any(self._is_weighed(scorer) for scorer in bundle.members):
            scorers[bundle.weigher.task] = bundle.weigher
        self.scorers: dict[Level, list[Scorer]] = {
            level: [scorer for scorer in scorers.values() if scorer.member.images == level]
            for level in LEVELS
        }
        self.passes = [each for level in LEVELS for each in self._passes(level)]

    @property
    def views(self) -> int:
        """Augmented views that are averaged with the plain one, at most."""
        averaged = [scorer.average for each in self.scorers.values() for scorer in each]
        return min(max(averaged), self.bundle.model.augment.views)

    def _is_weighed(self, scorer: Scorer) -> bool:
        """Whether its items count by what the weigher says of them."""
        return self.weighs and scorer.member.level == self.bundle.weigher.member.level

    def _passes(self, level: Level) -> Iterator[FeatureRequest]:
        names = {scorer.heads[self.outer_fold].features for scorer in self.scorers[level]}
        if self.bundle.reference.level == level:
            names.add(self.bundle.reference.features)
        for backbone in sorted({name.split("/")[0] for name in names}):
            mine = sorted(name for name in names if name.split("/")[0] == backbone)
            layers = tuple(name.partition("/")[2] for name in mine)
            settings = self.bundle.backbone(backbone, level)
            yield FeatureRequest(backbone, settings, level, self.bundle.model.seed, layers)

    def needed(self, views: Mapping[Level, Sequence[View]]) -> dict[Level, list[View]]:
        """Those views of a smear or several that the models look at."""
        found: dict[Level, list[View]] = {}
        for level in LEVELS:
            averaged = max((scorer.average for scorer in self.scorers[level]), default=0)
            used = any(each.level == level for each in self.passes)
            found[level] = [view for view in views[level] if used and view.view <= averaged]
        return found

    def see(
        self, chunk: Sequence[tuple[_InHand, Mapping[Level, list[View]]]], found: Mapping[str, np.ndarray]
    ) -> None:
        """Add the scores of some smears and their cells to what is known of their patients.

        Args:
            chunk: patient and needed views of each smear.
            found: features of all of them, of `aplsmear.features.backbones.features_of_views`.
        """
        for level in LEVELS:
            owners = [(patient, view) for patient, views in chunk for view in views[level]]
            if not owners:
                continue
            views = [view for _, view in owners]
            features = {
                name.partition("/")[2]: values for name, values in found.items() if name.startswith(level)
            }
            plain = np.flatnonzero([view.view == 0 for view in views])
            more = np.diff(np.append(plain, len(views))) - 1
            said = {scorer.task: self._score(scorer, features, plain, more) for scorer in self.scorers[level]}
            known = self.bundle.reference if self.bundle.reference.level == level else None
            for item, row in enumerate(plain):
                patient, view = owners[row]
                patient.items[level].append(view.item)
                if level == "cell":
                    patient.pictures[view.item] = view.image
                for task, scores in said.items():
                    patient.scores[task].append(scores[item])
                if known:
                    patient.features.add(features[known.features][row][None])
                    patient.stain.add(stain_of(view)[None])

    def _score(
        self, scorer: Scorer, features: Mapping[str, np.ndarray], plain: np.ndarray, more: np.ndarray
    ) -> np.ndarray:
        """float32 (items,), over as many views as `aplsmear.heads.search.held_out_scores` takes.

        Of a head on bags, what it needs of each cell to score the patient later: float16 (items, views,
        channels).
        """
        head = scorer.heads[self.outer_fold]
        values = features[head.features]
        if scorer.member.level == "patient":
            rows = [plain + np.minimum(view, more) for view in range(scorer.average + 1)]
            return np.asarray(values[np.stack(rows, axis=1)])
        return mean_over_views(lambda rows: score([head], values, rows)[0], plain, more, scorer.average)

    def conclude(self, patient: str, seen: _InHand) -> Judged:
        """What all smears of a patient say together."""
        members, model = self.bundle.members, self.bundle.model
        said = np.array([self._summary(scorer, seen) for scorer in members])
        reference = self.bundle.reference
        distance = stain = float("nan")
        if seen.features.count:
            distance = reference.typical.distance(seen.features.describe())
            stain = reference.stain.distance(seen.stain.mean())
        judged = Judged(
            patient=patient,
            smears=seen.smears,
            cells=len(seen.items["cell"]),
            logits=said,
            probability=float(self.combination.probability(said[None])[0]),
            distance=distance,
            stain=stain,
            warnings=[],
            pictures=([], []),
        )
        judged.warnings.extend(self._warnings(judged, seen))
        if model.pictured_by and seen.scores.get(model.pictured_by):
            ends = ends_of(seen.items["cell"], np.array(seen.scores[model.pictured_by]))
            for shown, names in zip(
                judged.pictures, ends if model.high_is_positive else ends[::-1], strict=True
            ):
                shown.extend((name, seen.pictures[name]) for name in names)
        return judged

    def _summary(self, scorer: Scorer, seen: _InHand) -> float:
        """What one member says, as a logit; NaN if it has seen nothing."""
        if not seen.scores.get(scorer.task):
            return float("nan")
        scores = np.array(seen.scores[scorer.task])
        if scorer.member.level == "patient":
            bag = scores[np.argsort(np.array(seen.items["cell"]), kind="stable")]
            head = scorer.heads[self.outer_fold]
            each = [np.float32(attend(head, bag[:, view])[0]) for view in range(bag.shape[1])]
            scores = np.mean(each, keepdims=True)
        if scorer.member.one_each:
            said = same_logits(float(np.mean(scores)))
        else:
            weight = seen.scores[self.bundle.weigher.task] if self._is_weighed(scorer) else None
            said = summary_logits(scores, None if weight is None else np.array(weight))
        return as_written(said[self.combination.summary])  # as the combination was fitted and judged

    def _warnings(self, judged: Judged, seen: _InHand) -> Iterator[str]:
        reference = self.bundle.reference
        silent = [
            scorer.task
            for scorer, said in zip(self.bundle.members, judged.logits, strict=True)
            if np.isnan(said)
        ]
        count = len(seen.items[reference.level])
        if silent:
            yield f"no {reference.level}s: {', '.join(silent)} cannot say anything"
        elif count < reference.min_items:
            usual = f"nearly all training patients had {np.ceil(reference.min_items):.0f} or more"
            yield f"few {reference.level}s: {count}, {usual}"
        if judged.stain > 1:
            how = how_stained(reference.stain, seen.stain.mean())
            what = f"unfamiliar stain or camera ({how})" if how else "unfamiliar stain or camera"
            yield f"{what}: {judged.stain:.1f} times the limit"
        if judged.distance > 1:
            yield f"unlike the training patients: {judged.distance:.1f} times the limit"


def check_input(bundle: Bundle, cells: pd.DataFrame, folder: Path) -> None:
    """See that there is what the members ask for.

    Raises:
        PredictError: they need cells and there are none.
    """
    of_cells = [scorer.task for scorer in bundle.members if scorer.member.images == "cell"]
    if of_cells and cells.empty:
        what = "no cell has a usable box in" if (folder / CELLS_FILE).exists() else "there is no"
        raise PredictError(
            f"{folder}: {what} {CELLS_FILE}, and the members {', '.join(of_cells)} judge cells: "
            f"`aplsmear cells {folder}` finds the cells of the smears and writes it"
        )


def judge_patients(
    judge: Judge, root: Path, smears: pd.DataFrame, cells: pd.DataFrame, engine: Engine = HERE
) -> Iterator[Judged]:
    """Every patient's verdict, patients sorted by name.

    Args:
        judge: the models.
        root: the folder that the `image` column of `smears` starts from.
        smears: of `aplsmear.data.dataset.read_data_set`.
        cells: likewise.
        engine: cuts the views of smears, and passes them through the networks; changes no result.
    """
    yield from _concluded(judge, _forwarded(judge, root, smears, cells, engine))


def _forwarded(
    judge: Judge, root: Path, smears: pd.DataFrame, cells: pd.DataFrame, engine: Engine
) -> Iterator[_Seen]:
    """All smears through the networks, patients sorted by name; see `judge_patients`."""
    model = judge.bundle.model
    smears = smears.sort_values("patient", kind="stable")
    settings = model.augment.model_copy(update={"views": judge.views, "extra_views": {}})
    views = map(judge.needed, all_views(root, smears, cells, settings, model.seed, engine))
    of_smears = zip(smears["patient"], progress(views, "smears", len(smears)), strict=True)
    chunks, again = tee(_chunks(of_smears))
    features = engine.map(
        partial(features_of_views, passes=judge.passes), map(_together, again), processes=False
    )
    yield from map(_Seen, chunks, features)


def _concluded(judge: Judge, seen: Iterable[_Seen]) -> Iterator[Judged]:
    """The verdict on each patient, as soon as all smears of his are seen."""
    waiting: dict[str, _InHand] = {}
    for chunk, found in seen:
        for patient, _ in chunk:
            waiting.setdefault(patient, _InHand()).smears += 1
        judge.see([(waiting[patient], of_smear) for patient, of_smear in chunk], found)
        last = chunk[-1][0]  # more smears of his may follow
        for patient in [each for each in waiting if each != last]:
            yield judge.conclude(patient, waiting.pop(patient))
    for patient, left in waiting.items():
        yield judge.conclude(patient, left)


def keep_pictures(judged: Iterable[Judged], count: int) -> list[Judged]:
    """All of them, the pictures only of the `count` with the highest probabilities: memory stays flat."""
    kept: list[Judged] = []
    pictured: list[tuple[float, int]] = []
    for place, each in enumerate(judged):
        kept.append(each)
        heapq.heappush(pictured, (each.probability, -place))
        if len(pictured) > count:
            lowest = -heapq.heappop(pictured)[1]
            kept[lowest] = replace(kept[lowest], pictures=([], []))
    return kept


def verdict_table(judged: Sequence[Judged], combination: Combination) -> pd.DataFrame:
    """The table that `predict` writes.

    Args:
        judged: of `judge_patients`.
        combination: whose probability and operating points count: that of the judge, or an adapted one.

    Returns:
        ``patient, probability, verdict, sensitive, cells, smears, distance, stain, warning``, rows as in
        `judged`.
    """
    probability = combination.probability(np.array([each.logits for each in judged]))
    table = pd.DataFrame({"patient": [each.patient for each in judged], "probability": probability})
    for column, point in (("verdict", "balanced"), ("sensitive", "sensitive")):
        table[column] = (probability >= combination.thresholds[point]).astype(np.int64)
    for column in ("cells", "smears", "distance", "stain"):
        table[column] = [getattr(each, column) for each in judged]
    return table.assign(warning=["; ".join(each.warnings) for each in judged])


def _together(chunk: Sequence[tuple[str, Mapping[Level, list[View]]]]) -> dict[Level, list[View]]:
    """The views of all smears of a chunk."""
    return {level: [view for _, views in chunk for view in views[level]] for level in LEVELS}


def _chunks(
    smears: Iterable[tuple[str, dict[Level, list[View]]]],
) -> Iterator[list[tuple[str, dict[Level, list[View]]]]]:
    """Consecutive smears, together until they have `CHUNK` views."""
    chunk: list[tuple[str, dict[Level, list[View]]]] = []
    count = 0
    for patient, views in smears:
        chunk.append((patient, views))
        count += sum(map(len, views.values()))
        if count >= CHUNK:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk
