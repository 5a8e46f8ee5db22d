"""Is the promise of the alarm kept by cross-fitted models?

Usage: python benchmarks/promise.py [--draws 2000] [--processes 2]

Learn then Test assumes a fixed model. In an ensemble, the probabilities that set the threshold come from
models of the inner folds, and new patients get those of the model that was fitted to all patients. Each draw
is a whole training on new patients: the members are ridge regressions on normal features, with one score for
a patient and fold as in the pipeline; combination, calibration and alarm are those of the package. All of
them are linear, so the miss rate of the final model is exact. The promise is kept if it is at most
`Alarm.miss_rate`; that must happen in a share of `Promise.confidence` of the draws.
Results: benchmarks/results/promise.json.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pandas as pd
from record import ROOT, commit, machine
from scipy.special import logit
from scipy.stats import norm

from aplsmear.ensembles.combination import Candidate, combined
from aplsmear.evaluation.operating_points import wilson_interval
from aplsmear.files import write_json
from aplsmear.params import Promise
from aplsmear.progress import progress

RESULTS = ROOT / "benchmarks" / "results" / "promise.json"
# Patients with the positive and with the negative diagnosis, and folds.
COHORTS = [(22, 60, 5), (60, 60, 5), (10, 30, 5)]
MEMBERS, CHANNELS = 3, 20
STRENGTH = 0.35  # shift of each feature in patients with the positive diagnosis, in standard deviations
RIDGE = 20.0
CANDIDATES = [Candidate(0, "logistic", "mean", 1.0, 0)]
PROMISE = Promise()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--processes", type=int, help="Default: one for each core.")
    asked = parser.parse_args()
    draws, rows = asked.draws, []
    with ProcessPoolExecutor(asked.processes) as pool:
        for positive, negative, folds in COHORTS:
            runs = pool.map(partial(draw, positive, negative, folds), range(draws), chunksize=20)
            missed, promised = np.array(list(progress(runs, "draws", draws))).T
            kept = wilson_interval(int((missed <= promised).sum()), draws)
            rows.append(
                {"positive": positive, "negative": negative, "folds": folds, "promised": promised[0]}
                | {"missed": missed.mean(), "kept": kept.value, "low": kept.low, "high": kept.high}
            )
            print(rows[-1], flush=True)
    record = {"confidence": PROMISE.confidence, "draws": draws, "machine": machine(), "commit": commit()}
    write_json(RESULTS, {"rows": rows, **record}, digits=4)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


def draw(positive: int, negative: int, folds: int, seed: int) -> tuple[float, float]:
    """The miss rate of one training among new patients, and the one that its alarm promised."""
    random = np.random.default_rng(seed)
    label = np.repeat([1, 0], [positive, negative])
    fold = np.concatenate([random.permutation(np.arange(n) % folds) for n in (positive, negative)])
    features = random.normal(size=(MEMBERS, len(label), CHANNELS)) + STRENGTH * label[:, None]
    inner = np.zeros((len(label), MEMBERS))
    for held_out in range(folds):
        there = fold == held_out
        weights, intercept = fitted(features[:, ~there], label[~there])
        inner[there] = (features[:, there] @ weights[..., None])[..., 0].T + intercept
    names = tuple(f"m{member}" for member in range(MEMBERS))
    _, combination = combined(CANDIDATES, {"mean": inner}, label, fold, names, seed, PROMISE)
    weights, intercept = fitted(features, label)
    # The logit of new patients with the positive diagnosis is normal: the final model is linear.
    mean = combination.logit((STRENGTH * weights.sum(axis=1) + intercept)[None])[0]
    slopes = combination.slope * combination.fitted.weights / combination.fitted.scale
    spread = np.sqrt((slopes**2 * (weights**2).sum(axis=1)).sum())
    missed = norm.cdf((logit(combination.alarm.threshold) - mean) / spread)
    return float(missed), combination.alarm.miss_rate


def fitted(features: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regressions of the diagnosis: weights (members, channels) and intercepts (members,).

    Features are float64 (members, patients, channels).
    """
    centre = features.mean(axis=1, keepdims=True)
    centred, target = features - centre, label - label.mean()
    square = centred.transpose(0, 2, 1) @ centred + RIDGE * np.eye(CHANNELS)
    weights = np.linalg.solve(square, (centred.transpose(0, 2, 1) @ target)[..., None])[..., 0]
    return weights, label.mean() - (centre[:, 0] * weights).sum(axis=1)


if __name__ == "__main__":
    main()
