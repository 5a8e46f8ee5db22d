"""Which parts of an image a score comes from: occlusion sensitivity and Grad-CAM, and pictures of both.

Maps are for looking, not for proof: they show what a score depends on, not why. (The libraries for this,
tf-explain and tf-keras-vis, have not followed Keras to version 3; each method is a few lines.)

References:
    Zeiler & Fergus, ECCV 2014 (occlusion). Selvaraju et al., ICCV 2017 (Grad-CAM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from aplsmear.files import whole

Map = npt.NDArray[np.float32]
BATCH = 64  # occluded images of one forward pass


def occlusion(score: Callable[[np.ndarray], np.ndarray], image: np.ndarray, patch: int, stride: int) -> Map:
    """How much of the score is lost where a patch of the image's mean colour hides it.

    Args:
        score: uint8 (batch, height, width, 3) -> (batch,).
        image: uint8 (height, width, 3).
        patch: side in px.
        stride: px between patches; those at the lower and right edge touch it.

    Returns:
        float32 (height, width): at each pixel the mean over the patches that hid it of the score without
        minus the score with the patch. Above 0: the pixel speaks for the positive class.
    """
    height, width = image.shape[:2]
    colour = np.round(image.reshape(-1, 3).mean(axis=0)).astype(np.uint8)
    places = [(top, left) for top in _steps(height, patch, stride) for left in _steps(width, patch, stride)]
    base = float(score(image[None])[0])
    lost, hidden = np.zeros((2, height, width))
    for start in range(0, len(places), BATCH):
        part = places[start : start + BATCH]
        images = np.repeat(image[None], BATCH, axis=0)  # a short last batch goes at full length: one graph
        for number, (top, left) in enumerate(part):
            images[number, top : top + patch, left : left + patch] = colour
        for (top, left), value in zip(part, score(images), strict=False):
            lost[top : top + patch, left : left + patch] += base - float(value)
            hidden[top : top + patch, left : left + patch] += 1
    return (lost / hidden).astype(np.float32)


def grad_cam(maps: Any, judge: Any, image: np.ndarray) -> Map:
    """Where the deepest feature map says "positive": its channels, weighted by the logit's mean gradient.

    Args:
        maps: uint8 tensor (1, height, width, 3) -> the feature map (1, h, w, channels), or a list of tensors
            that starts with it.
        judge: what `maps` gives -> logit (1, 1).
        image: uint8 (height, width, 3).

    Returns:
        float32 (height, width), 0 or more: resized bilinearly from the feature map.
    """
    import tensorflow as tf

    found = maps(tf.constant(image[None]))
    deepest = found[0] if isinstance(found, list | tuple) else found
    with tf.GradientTape() as tape:
        tape.watch(deepest)
        logit = judge(found)
    weights = tf.reduce_mean(tape.gradient(logit, deepest), axis=(1, 2), keepdims=True)
    cam = tf.nn.relu(tf.reduce_sum(deepest * weights, axis=-1))[0].numpy().astype(np.float32)
    height, width = image.shape[:2]
    return np.asarray(cv2.resize(cam, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def mass_on(found: Map, mask: np.ndarray) -> float:
    """Share of a map's positive mass that lies on a mask, over the share that chance puts there.

    Args:
        found: (height, width).
        mask: bool (height, width), not empty.

    Returns:
        Above 1: more than chance. 1 for a map without positive mass.
    """
    positive = np.maximum(found, 0)
    total = float(positive.sum())
    return float(positive[mask].sum()) / total / float(mask.mean()) if total else 1.0


def draw(path: Path, image: np.ndarray, occluded: Map, cam: Map, title: str) -> None:
    """A picture of an image beside its maps, each with its scale; the same bytes for the same input.

    Args:
        path: of the PNG file.
        image: uint8 (height, width, 3).
        occluded: of `occlusion`.
        cam: of `grad_cam`.
        title: what it shows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a $ in a name is one
    left.imshow(image)
    left.set_title("held-out image", fontsize=9)
    reach = max(float(np.abs(occluded).max()), 1e-6)
    for axes, found, name, colours, low in (
        (middle, occluded, "occlusion: score lost", "coolwarm", -reach),
        (right, cam, "Grad-CAM", "inferno", 0.0),
    ):
        high = reach if low else max(float(cam.max()), 1e-6)
        axes.imshow(image)
        shown = axes.imshow(found, cmap=colours, vmin=low, vmax=high, alpha=0.55)
        axes.set_title(name, fontsize=9)
        figure.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    for axes in (left, middle, right):
        axes.set_axis_off()
    with whole(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def _steps(size: int, patch: int, stride: int) -> Iterator[int]:
    """Where patches start along a side."""
    last = max(size - patch, 0)
    yield from range(0, last, stride)
    yield last
