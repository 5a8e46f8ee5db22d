"""Bicubic interpolation of position embeddings as a matrix, after PyTorch's `interpolate`."""

from __future__ import annotations

import numpy as np


def bicubic(old: int, new: int, *, antialias: bool = False, scale: float = 0.0) -> np.ndarray:
    """The matrix that resizes one axis: float64 (new, old); each row sums to 1.

    Args:
        old: number of points.
        new: number of points after.
        antialias: a wider kernel where the axis shrinks (Keys' a = -0.5), else four points (a = -0.75).
        scale: points after per point before, where it is not new / old.

    """
    step = 1 / scale if scale else old / new
    centres = (np.arange(new) + 0.5) * step
    found = np.zeros((new, old))
    if antialias:
        wide = max(step, 1.0)
        points = np.arange(old) + 0.5
        found = _cubic((points[None] - centres[:, None]) / wide, -0.5)
        # PyTorch takes whole points within the kernel: int(centre -+ support + 0.5).
        low = np.floor(centres - 2 * wide + 0.5).clip(min=0)[:, None]
        high = np.floor(centres + 2 * wide + 0.5).clip(max=old)[:, None]
        number = np.arange(old)[None]
        found = np.where((number >= low) & (number < high), found, 0.0)
        return np.asarray(found / found.sum(axis=1, keepdims=True))
    whole = np.floor(centres - 0.5).astype(int)
    for shift in (-1, 0, 1, 2):
        columns = (whole + shift).clip(0, old - 1)  # the edge is repeated
        np.add.at(found, (np.arange(new), columns), _cubic(centres - 0.5 - whole - shift, -0.75))
    return found


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))
