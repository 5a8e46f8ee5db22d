"""Which parts of an image a score depends on: occlusion sensitivity and Grad-CAM, and pictures of both.

The maps are illustrations, not proof: they show what a score depends on, not why. (The libraries tf-explain
and tf-keras-vis do not support Keras 3. Each method takes a few lines.)

References:
    Zeiler & Fergus, ECCV 2014 (occlusion). Selvaraju et al., ICCV 2017 (Grad-CAM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from aplsmear.evaluation.operating_points import operating_points
from aplsmear.files import whole
from aplsmear.finetune.finetuning import Trained, with_weights
from aplsmear.finetune.training import Trainer
from aplsmear.heads.head import Recipe
from aplsmear.images.reading import decode, fitting
from aplsmear.images.view_store import plain_views

Map = npt.NDArray[np.float32]
BATCH = 64  # occluded images of one forward pass
OUTCOMES = {  # name -> label, called positive
    "true_positive": (1, True),
    "false_positive": (0, True),
    "false_negative": (1, False),
    "true_negative": (0, False),
}


def examples(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """The clearest held-out hits and errors: up to `count` rows of each ``outcome``.

    The threshold of a fold is the balanced operating point of the other folds.
    """
    threshold = {}
    for fold in predictions["fold"].unique():
        others = predictions[predictions["fold"] != fold]
        if others["label"].nunique() < 2:  # with `finetune.folds: 1` there are no others
            others = predictions
        threshold[fold] = operating_points(others["label"], others["probability"])["balanced"]
    called = predictions["probability"] >= predictions["fold"].map(threshold)
    chosen = []
    for outcome, (label, positive) in OUTCOMES.items():
        found = predictions[(predictions["label"] == label) & (called == positive)]
        order = found.sort_values(["probability", "item"], ascending=[not positive, True])
        chosen.append(order.head(count).assign(outcome=outcome))
    return pd.concat(chosen, ignore_index=True)


def write_explanations(
    trainers: Mapping[Recipe, Trainer],
    trained: Sequence[Trained],
    chosen: pd.DataFrame,
    views: Path,
    folder: Path,
    task: str,
) -> None:
    """Draw what the score of each chosen item depends on, by the outer model of its fold.

    Writes ``<outcome>_<number>.png`` into a folder, which is emptied first. All pictures have the same
    scales, so they can be compared. `views` is the file with the views of the level.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = plain_views(views, set(chosen["item"]))
    outer = {each.outer_fold: each for each in trained if each.outer_fold is not None}
    number = chosen.groupby("outcome").cumcount() + 1
    drawn = []
    for row, place in zip(chosen.to_dict("records"), number, strict=True):
        trainer = with_weights(trainers, outer[int(row["fold"])])
        size = trainer.network.whole.input.shape[1]
        image = fitting(decode(pictures[row["item"]]), size)
        outcome, name = row["outcome"].replace("_", " "), f"{row['outcome']}_{place}.png"
        title = (
            f"{task}, {outcome}: {row['item']}, held-out probability {row['probability']:.3f}\n"
            f"patient {row['patient']}, fold {row['fold']}"
        )
        drawn.append((folder / name, image, explain(trainer, image), title))
    kinds = zip(*(maps for _, _, maps, _ in drawn), strict=True)
    scales = tuple(max(1e-6, *(float(np.abs(found).max()) for found in kind)) for kind in kinds)
    for path, image, maps, title in drawn:
        draw(path, image, *maps, title, scales)


def explain(trainer: Trainer, image: np.ndarray) -> tuple[Map, Map]:
    """Maps of `occlusion` (overlapping patches of a sixth of the side) and of `grad_cam`.

    The image is uint8 (size, size, 3).
    """
    backbone, patch = trainer.network.backbone, max(image.shape[0] // 6, 2)

    def maps(images: Any) -> Any:
        return backbone.blocks(backbone.trunk(images, training=False), training=False)

    occluded = occlusion(trainer.score_images, image, patch, patch // 2)
    return occluded, grad_cam(maps, trainer.network.judge, image)


def occlusion(score: Callable[[np.ndarray], np.ndarray], image: np.ndarray, patch: int, stride: int) -> Map:
    """How much the score falls where a patch in the image's mean colour hides a part of the image.

    Args:
        score: uint8 (batch, height, width, 3) -> (batch,).
        image: uint8 (height, width, 3).
        patch: side in px.
        stride: px between patches; the last ones touch the lower and the right edge.

    Returns:
        float32 (height, width): the score without a patch minus that with it, the mean over the patches that
        hide the pixel. Above 0: the pixel raises the score.
    """
    height, width = image.shape[:2]
    colour = np.round(image.reshape(-1, 3).mean(axis=0)).astype(np.uint8)
    tops, lefts = ([*range(0, side - patch, stride), max(side - patch, 0)] for side in (height, width))
    places = [(top, left) for top in tops for left in lefts]
    base = float(score(image[None])[0])
    lost, hidden = np.zeros((2, height, width))
    for start in range(0, len(places), BATCH):
        part = places[start : start + BATCH]
        images = np.repeat(image[None], BATCH, axis=0)  # always of one size: one graph
        for number, (top, left) in enumerate(part):
            images[number, top : top + patch, left : left + patch] = colour
        for (top, left), value in zip(part, score(images), strict=False):
            lost[top : top + patch, left : left + patch] += base - float(value)
            hidden[top : top + patch, left : left + patch] += 1
    return (lost / hidden).astype(np.float32)


def grad_cam(maps: Any, judge: Any, image: np.ndarray) -> Map:
    """Where the deepest feature map raises the logit: its channels, weighted by the logit's mean gradient.

    Args:
        maps: uint8 tensor (1, height, width, 3) -> the feature map (1, h, w, channels), or a list of tensors
            that starts with it.
        judge: takes what `maps` returns; returns the logit (1, 1).
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


def draw(
    path: Path, image: np.ndarray, occluded: Map, cam: Map, title: str, scales: tuple[float, ...]
) -> None:
    """Write a PNG of an image, uint8 (height, width, 3), and its maps; equal input gives equal bytes.

    `scales`: the largest value on the scale of each map; that of occlusion goes as far below 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a name may contain $
    left.imshow(image)
    left.set_title("held-out image", fontsize=9)
    for axes, found, name, colours, low, high in (
        (middle, occluded, "occlusion: score lost", "coolwarm", -scales[0], scales[0]),
        (right, cam, "Grad-CAM", "inferno", 0.0, scales[1]),
    ):
        axes.imshow(image)
        shown = axes.imshow(found, cmap=colours, vmin=low, vmax=high, alpha=0.55)
        axes.set_title(name, fontsize=9)
        figure.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    for axes in (left, middle, right):
        axes.set_axis_off()
    with whole(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})
