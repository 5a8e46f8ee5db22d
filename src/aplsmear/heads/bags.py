"""Heads on bags: a patient is judged by all its cells at once, weighed by learned attention.

Attention-based multiple-instance learning with gates (Ilse, Tomczak and Welling, Attention-based Deep
Multiple Instance Learning, ICML 2018, arXiv:1802.04712). With the embedding h of each cell (the last hidden
layer),

    attention  a = softmax over the cells of  w . (tanh(V h) * sigmoid(U h))
    logit        = c . (sum of a h) + d  =  sum of a (c . h + d)

so a head on bags is a head on single cells (the parenthesis) and an attention, and what a cell adds to the
patient's logit can be read off. Without a hidden layer the cells weigh the same: a logistic regression on the
mean of their features.

Heads train as a stack (see `aplsmear.heads.stack`). A step sees some of a patient's cells, drawn anew each
time: patients are few, and no head should know one of them by its crowd.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, softmax

from aplsmear.heads.arithmetic import activate
from aplsmear.heads.head import Head, Recipe, parameters


def attend(head: Head, features: np.ndarray) -> tuple[float, np.ndarray]:
    """What a head on bags says of one item, and how much it looked at each of its images.

    Args:
        head: of `train_bags`.
        features: float (images, channels), at least one image; as the backbone gives them.

    Returns:
        The probability of the positive class, and the attention, float64 (images,): positive numbers that sum
        to 1; of a mean of heads, the mean of theirs.
    """
    signal = features.astype(np.float64)
    attention = np.full((len(signal), 1), 1 / len(signal))
    last = len(head.kernels) - 1
    for layer, (kernel, bias) in enumerate(zip(head.kernels, head.biases, strict=True)):
        if layer == last and head.attention:
            gates, offsets, weights = head.attention
            tanh, sigmoid = np.split(signal @ gates.astype(np.float64) + offsets, 2, axis=1)
            attention = softmax((np.tanh(tanh) * expit(sigmoid)) @ weights.astype(np.float64), axis=0)
        signal = signal @ kernel.astype(np.float64) + bias
        signal = signal if layer == last else activate(signal, head.activation)[0]
    return float(expit((attention * signal).sum(axis=0).mean())), attention.mean(axis=1)


def bag_parameters(recipe: Recipe, channels: int) -> int:
    """The number of weights of a head on bags of features of so many channels."""
    attention = (recipe.width + 1) * 2 * recipe.width + recipe.width if recipe.depth else 0
    return parameters(recipe, channels) + attention
