"""What labels of asked cells gain beside labels of cells drawn by lot.

Usage: python benchmarks/asking.py --workspace DIR [--seeds 5] [--part choose|judge]

DIR is a finished workspace (`dvc repro bottleneck split`) whose cells have types. Labels are hidden, except
those of a few cells to start from. A way of asking (`WAYS`) then names 50 cells at a time, four times; after
each time their labels are revealed, and a logistic regression on the frozen features is trained anew. It is
judged by the cells of the held-out fold, whose patients are never asked about. Each fold is held out once.

Tasks of `CHOOSE` serve to choose a way, tasks of `JUDGE` to judge it: no label of a type is used for both.
The difference in AUROC to the lot has a 95 % interval: seeds, and patients within folds, are resampled at the
same time (bootstrap). Pairs of a positive and a negative cell count if both are of the same fold.
Results go to benchmarks/results/asking.json.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from record import ROOT, commit, machine
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression

from aplsmear.exchange.asking import PER_PATIENT, least_sure
from aplsmear.features.store import read_features
from aplsmear.files import write_json
from aplsmear.progress import progress
from aplsmear.tables import read_table

RESULTS = ROOT / "benchmarks" / "results" / "asking.json"
CHANNELS = 128  # principal components of the pool's features: 85 % of their variance
STRENGTH = 0.003  # C of the logistic regression, chosen on the tasks of CHOOSE
STEP, STEPS = 50, 4
COMMITTEE = 5  # heads, each trained on a bootstrap sample of the labelled cells
RESAMPLES = 2000
CHOOSE = {
    "lymphocyte": ["Lymphocyte"],
    "granulocyte": ["Granulocyte"],
    "monocyte": ["Monocyte"],
    "erythroblast": ["Erythroblast"],
}
JUDGE = {
    "blast": ["Myeloblast"],
    "immature": ["Myeloblast", "Promyelocyte", "Myelocyte", "Promonocyte"],
    "promyelocyte": ["Promyelocyte"],
    "myelocyte": ["Myelocyte", "Metamyelocyte"],
}
UNTYPED = "500 cells, untyped cells in the pool"  # an answer about one of these teaches nothing
STARTS = {"50 cells": 50, "500 cells": 500, "100 cells of 5 patients": 100, UNTYPED: 500}


class Cells(NamedTuple):
    """All cells, in the order of the features."""

    features: np.ndarray  # float32 (folds, cells, CHANNELS): the axes are those of the fold's pool
    kind: np.ndarray  # str (cells,): type; empty if untyped
    patient: np.ndarray  # int64 (cells,)
    fold: np.ndarray  # int64 (cells,)


@dataclass
class Question:
    """What a way of asking may look at. Rows are those of the cells that can be asked about."""

    features: np.ndarray  # float32 (cells, CHANNELS)
    patient: np.ndarray  # int64 (cells,)
    logit: np.ndarray  # float64 (cells,): of the model
    committee: Callable[[], np.ndarray]  # -> float64 (COMMITTEE, cells): probabilities
    labelled: np.ndarray  # float32 (labelled, CHANNELS)
    rng: np.random.Generator


# --- ways of asking -------------------------------------------------------------------------------


def lot(question: Question) -> np.ndarray:
    """Each cell is as likely as the others."""
    return question.rng.permutation(len(question.logit))[:STEP]


def lot_of_patients(question: Question) -> np.ndarray:
    """Patients take turns; a cell of each is drawn."""
    return _spread(question, question.rng.random(len(question.logit)), 1)


def uncertain(question: Question) -> np.ndarray:
    """Cells nearest to the boundary between the classes (Lewis & Gale 1994)."""
    return np.argsort(np.abs(question.logit), kind="stable")[:STEP]


def uncertain_of_patients(question: Question) -> np.ndarray:
    """The same, with few cells of each patient: what `aplsmear ask` does."""
    return least_sure(question.logit, question.patient, STEP)


def disputed(question: Question) -> np.ndarray:
    """Cells about which heads disagree (Seung et al. 1992): mutual information (Houlsby et al. 2011)."""
    return np.argsort(-_disagreement(question), kind="stable")[:STEP]


def disputed_of_patients(question: Question) -> np.ndarray:
    """The same, with few cells of each patient."""
    return _spread(question, -_disagreement(question), PER_PATIENT)


def likely(question: Question) -> np.ndarray:
    """Cells that are most likely positive."""
    return np.argsort(-question.logit, kind="stable")[:STEP]


def likely_of_patients(question: Question) -> np.ndarray:
    """The same, with few cells of each patient."""
    return _spread(question, -question.logit, PER_PATIENT)


def unlike(question: Question) -> np.ndarray:
    """Cells that are far from each other and from labelled ones (Arthur & Vassilvitskii 2007)."""
    distance = _distances(question.features, question.labelled).min(axis=1)
    return _plus_plus(question.features, distance, question.rng)


def badge(question: Question) -> np.ndarray:
    """Cells whose gradients are large and unlike each other (Ash et al. 2020)."""
    size = 1 / (1 + np.exp(np.abs(question.logit)))
    ones = np.ones((len(size), 1), np.float32)
    gradients = np.hstack([question.features, ones]) * size[:, None].astype(np.float32)
    return _plus_plus(gradients, (gradients**2).sum(axis=1), question.rng)


def uncertain_clusters(question: Question) -> np.ndarray:
    """Of the ten times as many most uncertain cells, the one nearest to the centre of each cluster."""
    near = np.argsort(np.abs(question.logit), kind="stable")[: 10 * STEP]
    return np.asarray(near[_centres(question.features[near], STEP, question.rng)])


def typical(question: Question) -> np.ndarray:
    """Cells in the densest place of the largest clusters with the fewest labels (Hacohen et al. 2022)."""
    reduced, labelled = question.features[:, :20], question.labelled[:, :20]
    count = min(len(labelled) + STEP, 3 * STEP)
    means = _k_means(np.vstack([labelled, reduced]), count, question.rng)
    known, cluster = means[: len(labelled)], means[len(labelled) :]
    sizes, covered = (np.bincount(each, minlength=count) for each in (cluster, known))
    chosen = []
    for each in np.lexsort([-sizes, covered])[:STEP]:
        members = np.flatnonzero(cluster == each)
        if len(members):
            near = np.sort(_distances(reduced[members], reduced[members]), axis=1)[:, :21]
            chosen.append(members[np.argmin(near.mean(axis=1))])
    return _joined(np.array(chosen, np.int64), lot(question))


def mixed(question: Question) -> np.ndarray:
    """Half disputed, half by lot; both with few cells of each patient."""
    return _joined(disputed_of_patients(question)[: STEP // 2], lot_of_patients(question))


WAYS: dict[str, Callable[[Question], np.ndarray]] = {
    way.__name__: way
    for way in (
        lot, lot_of_patients, uncertain, uncertain_of_patients, disputed, disputed_of_patients, likely,
        likely_of_patients, unlike, badge, uncertain_clusters, typical, mixed,
    )
}  # fmt: skip
BASELINES = ("lot", "lot_of_patients")


def _joined(first: np.ndarray, second: np.ndarray, count: int = STEP) -> np.ndarray:
    """The first cells, and so many of the others that there are `count`."""
    return np.concatenate([first, second[~np.isin(second, first)]])[:count]


def _spread(question: Question, cost: np.ndarray, most: int) -> np.ndarray:
    """The cells of lowest cost, at most so many of each patient, or a multiple if patients do not suffice."""
    order = np.lexsort([question.rng.random(len(cost)), cost])
    seen: dict[int, int] = {}
    turn = np.empty(len(cost), np.int64)
    for place in order:
        patient = int(question.patient[place])
        seen[patient] = seen.get(patient, 0) + 1
        turn[place] = (seen[patient] - 1) // most
    return np.asarray(order[np.argsort(turn[order], kind="stable")][:STEP])


def _disagreement(question: Question) -> np.ndarray:
    each = question.committee()
    return np.asarray(_entropy(each.mean(axis=0)) - _entropy(each).mean(axis=0))


def _entropy(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return np.asarray(-p * np.log(p) - (1 - p) * np.log(1 - p))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances, (rows of a, rows of b)."""
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)
    return np.asarray(np.maximum(squares - 2 * a @ b.T, 0))


def _plus_plus(points: np.ndarray, distance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw points with a chance proportional to the squared distance from the nearest one drawn before."""
    chosen: list[int] = []
    for _ in range(STEP):
        chosen.append(int(rng.choice(len(points), p=distance / distance.sum(dtype=np.float64))))
        distance = np.minimum(distance, _distances(points, points[chosen[-1:]])[:, 0]).astype(np.float64)
        distance[chosen] = 0
    return np.array(chosen)


def _k_means(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    seed = int(rng.integers(2**31))
    model = MiniBatchKMeans(count, n_init=1, batch_size=2048, max_iter=20, random_state=seed)
    return np.asarray(model.fit_predict(points))


def _centres(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The point nearest to the centre of each cluster."""
    cluster = _k_means(points, count, rng)
    chosen = []
    for each in range(count):
        members = np.flatnonzero(cluster == each)
        if len(members):
            offset = points[members] - points[members].mean(axis=0)
            chosen.append(members[np.argmin((offset**2).sum(axis=1))])
    rest = rng.permutation(len(points))
    return _joined(np.array(chosen), rest)


# --- one run --------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What one way of asking reached on one held-out fold; arrays begin before the first question."""

    concordant: np.ndarray  # float64 (1 + STEPS, patients, patients): pairs in the right order
    pairs: np.ndarray  # float64 (patients, patients): of a positive cell of one, a negative of the other
    positives: np.ndarray  # int64 (1 + STEPS,): labelled cells that are positive


def run(cells: Cells, task: Sequence[str], start: str, fold: int, seed: int, way: str) -> Run:
    """Start, ask STEPS times, and judge after each."""
    label = np.isin(cells.kind, task).astype(np.int64)
    features, typed = cells.features[fold], cells.kind != ""
    held_out = (cells.fold == fold) & typed
    pool = np.flatnonzero((cells.fold != fold) & typed)
    rng = np.random.default_rng([seed, fold, STARTS[start]])
    known = _start(label, cells.patient, pool, start, rng)
    rng = np.random.default_rng([seed, fold, list(STARTS).index(start), list(WAYS).index(way)])
    if start == UNTYPED:
        pool = np.flatnonzero(cells.fold != fold)
    open_ = np.setdiff1d(pool, known)
    concordant, positives = [], []
    for step in range(STEPS + 1):
        model = _fitted(features[known], label[known])
        logit = features[held_out] @ model.coef_[0]
        found, pairs = _concordance(label[held_out], logit, cells.patient[held_out])
        concordant.append(found)
        positives.append(int(label[known].sum()))
        if step == STEPS:
            break

        def committee(known: np.ndarray = known, open_: np.ndarray = open_) -> np.ndarray:
            return _committee(features[known], label[known], features[open_], rng)

        question = Question(
            features[open_], cells.patient[open_], model.decision_function(features[open_]), committee,
            features[known], rng,
        )  # fmt: skip
        asked = WAYS[way](question)
        known = np.concatenate([known, open_[asked][typed[open_[asked]]]])
        open_ = np.delete(open_, asked)
    return Run(np.array(concordant), pairs, np.array(positives))


def _start(
    label: np.ndarray, patient: np.ndarray, pool: np.ndarray, start: str, rng: np.random.Generator
) -> np.ndarray:
    """The cells whose labels are known at first; at least two are positive, so that a head can be trained."""
    if "patients" in start:
        counts = np.bincount(patient[pool], label[pool])
        first = rng.choice(np.flatnonzero(counts >= 2))
        others = rng.permutation(np.setdiff1d(np.unique(patient[pool]), [first]))[:4]
        pool = pool[np.isin(patient[pool], [first, *others])]
    drawn = rng.permutation(pool)
    positive = drawn[label[drawn] == 1][:2]
    return _joined(positive, drawn, STARTS[start])


def _fitted(features: np.ndarray, label: np.ndarray) -> Any:
    model = LogisticRegression(C=STRENGTH, class_weight="balanced", solver="newton-cholesky")
    return model.fit(features.astype(np.float64), label)


def _committee(
    features: np.ndarray, label: np.ndarray, others: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    found = []
    for _ in range(COMMITTEE):
        places = np.concatenate(
            [rng.choice(mine, len(mine)) for mine in (np.flatnonzero(label == c) for c in (0, 1))]
        )
        found.append(_fitted(features[places], label[places]).predict_proba(others)[:, 1])
    return np.array(found)


def _concordance(label: np.ndarray, score: np.ndarray, patient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs in the right order and all pairs, by the patients of the positive and of the negative cell."""
    _, unit = np.unique(patient, return_inverse=True)
    member = np.eye(unit.max() + 1)[unit]
    positive, negative = label == 1, label == 0
    difference = score[positive][:, None] - score[negative]
    right = (difference > 0) + 0.5 * (difference == 0)
    pairs = np.outer(member[positive].sum(axis=0), member[negative].sum(axis=0))
    return member[positive].T @ right @ member[negative], pairs


# --- results --------------------------------------------------------------------------------------


def difference(first: list[list[Run]], second: list[list[Run]], seed: int = 0) -> list[dict[str, float]]:
    """AUROC of the first way minus that of the second, after each step, with interval.

    Args:
        first: runs, by seed and fold.
        second: the same, of another way.
        seed: of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    seeds = len(first)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    top, bottom = np.zeros((STEPS + 1, RESAMPLES)), np.zeros(RESAMPLES)
    value, total = np.zeros(STEPS + 1), 0.0
    for fold in range(len(first[0])):
        pairs = first[0][fold].pairs
        count = len(pairs)
        weight = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
        gain = np.array([a[fold].concordant - b[fold].concordant for a, b in zip(first, second, strict=True)])
        by_seed = np.einsum("rp,stpq,rq->str", weight, gain, weight, optimize=True)
        top += np.einsum("rs,str->tr", drawn, by_seed)
        bottom += np.einsum("rp,pq,rq->r", weight, pairs, weight, optimize=True)
        value += gain.mean(axis=0).sum(axis=(1, 2))
        total += pairs.sum()
    low, high = np.quantile(top / np.maximum(bottom, 1), [0.025, 0.975], axis=1)
    return [{"value": v / total, "low": a, "high": b} for v, a, b in zip(value, low, high, strict=True)]


def auroc(runs: list[list[Run]]) -> list[list[float]]:
    """Of each seed, after each step, over pairs within folds."""
    total = sum(each.pairs.sum() for each in runs[0])
    return [list(sum(each.concordant.sum(axis=(1, 2)) for each in one) / total) for one in runs]


def read_cells(workspace: Path) -> Cells:
    """The cells of a workspace and their features of plain views, of its only backbone."""
    table = read_table(workspace / "dataset" / "cells.csv")
    folds = read_table(workspace / "splits" / "folds.csv").set_index("patient")["fold"].astype(int)
    (backbone,) = [path.name for path in (workspace / "features" / "cell").iterdir()]
    features = next(iter(read_features(workspace / "features" / "cell", [backbone]).values()))
    plain = np.flatnonzero(features.index["view"] == 0)
    if features.index["item"].iloc[plain].tolist() != table["cell"].tolist():
        raise SystemExit(f"{workspace}: the features are those of other cells. Run `dvc repro bottleneck`.")
    x = np.asarray(features.values[plain], np.float32)
    fold = table["patient"].map(folds).to_numpy()
    parts = []
    for each in range(fold.max() + 1):
        pool = x[fold != each]
        deviation = pool.std(axis=0)
        scaled = (x - pool.mean(axis=0)) / (deviation + 0.05 * deviation.mean() + 1e-6)
        _, axes = np.linalg.eigh(scaled[fold != each].T @ scaled[fold != each])
        parts.append(scaled @ axes[:, : -CHANNELS - 1 : -1])
    patient = np.unique(table["patient"].to_numpy(str), return_inverse=True)[1]
    return Cells(np.array(parts), table["cell_type"].to_numpy(str), patient, fold)


def measured(
    cells: Cells, tasks: Sequence[str], starts: Sequence[str], ways: Sequence[str], seeds: int
) -> Any:
    """AUROC of each way by task and start, and its differences to the baselines."""
    places = [(task, start) for task in tasks for start in starts]
    folds = range(int(cells.fold.max()) + 1)
    jobs = [(*place, fold, seed) for place in places for seed in range(seeds) for fold in folds]

    def ask(task: str, start: str, fold: int, seed: int) -> dict[str, Run]:
        return {way: run(cells, (CHOOSE | JUDGE)[task], start, fold, seed, way) for way in ways}

    done = Parallel(n_jobs=2, return_as="generator")(delayed(ask)(*job) for job in jobs)
    runs = dict(zip(jobs, progress(done, "runs", len(jobs)), strict=True))
    found: dict[str, Any] = {}
    for task, start in places:
        by_way = {
            way: [[runs[task, start, fold, seed][way] for fold in folds] for seed in range(seeds)]
            for way in ways
        }
        rows = found.setdefault(task, {}).setdefault(start, {})
        for way, each in by_way.items():
            positives = np.array([[one.positives for one in row] for row in each]).mean(axis=(0, 1))
            rows[way] = {"auroc": auroc(each), "positives": positives.tolist()} | {
                f"minus {name}": difference(each, by_way[name]) for name in BASELINES if name != way
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=["choose", "judge"], required=True)
    parser.add_argument("--tasks", nargs="+", help="default: all of the part")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--to", type=Path, default=RESULTS)
    asked = parser.parse_args()
    tasks = asked.tasks or list(CHOOSE if asked.part == "choose" else JUDGE)
    ways = list(dict.fromkeys([*BASELINES, *asked.ways]))
    found = measured(read_cells(asked.workspace), tasks, asked.starts, ways, asked.seeds)
    whole = json.loads(asked.to.read_text(encoding="utf-8")) if asked.to.is_file() else {}
    part = {"machine": machine(), "commit": commit(), "seeds": asked.seeds, "tasks": as_text(found)}
    write_json(asked.to, whole | {asked.part: part})
    print(json.dumps(part["tasks"], indent=2))


def as_text(found: dict[str, Any]) -> dict[str, Any]:
    """The same with a text for each row of numbers: before the first question and after 50, 100, 150, 200."""

    def row(key: str, value: Any) -> Any:
        if key == "auroc":  # a row for each seed
            return [" ".join(f"{one:.4f}" for one in each) for each in value]
        if key == "positives":
            return " ".join(f"{one:.1f}" for one in value)
        return [f"{each['value']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f})" for each in value[1:]]

    return {
        task: {
            start: {way: {key: row(key, value) for key, value in each.items()} for way, each in ways.items()}
            for start, ways in starts.items()
        }
        for task, starts in found.items()
    }


if __name__ == "__main__":
    main()
