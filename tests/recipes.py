"""A plain recipe of a head, and what tests of heads have in common."""

from typing import Any

import numpy as np
import pytest

from aplsmear.evaluation.splits import tuning_sets
from aplsmear.heads.head import Head, Job, Recipe
from aplsmear.heads.stack import Table

FOLDS = 4
BASE = Recipe(
    features="net/layer",
    views=0,
    depth=1,
    width=6,
    activation="relu",
    dropout=0.0,
    learning_rate=0.02,
    schedule="constant",
    weight_decay=0.01,
    balance=0.0,
    smoothing=0.0,
    mixup=0.0,
    batch=16,
    epochs=4,
)


def jobs_of(*recipes: Recipe, epochs: int | None = None) -> list[Job]:
    """One head for each recipe and pair of folds; recipes are numbered as trials."""
    return [
        Job(number, recipe, pair, epochs)
        for number, recipe in enumerate(recipes)
        for pair in tuning_sets(FOLDS)
    ]


def weights_of(head: Head) -> tuple[np.ndarray, ...]:
    return head.kernels + head.biases + head.attention


def same(first: Head, second: Head, tolerance: float = 0) -> bool:
    """Whether two heads have the same weights, up to a relative and absolute tolerance."""
    return all(
        np.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(weights_of(first), weights_of(second), strict=True)
    )


def keep_no_features_in_memory(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Features are read from disk again in each epoch, `block` bytes at a time."""
    real = Table.__init__

    def too_large(self: Table, *arguments: Any) -> None:
        real(self, *arguments)
        self._memory, self._block = None, block

    monkeypatch.setattr(Table, "__init__", too_large)
