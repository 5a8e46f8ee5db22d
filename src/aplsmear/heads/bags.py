"""Heads on bags: a patient is scored by all cells together, weighed by learned attention.

Attention-based multiple-instance learning with gates (Ilse, Tomczak and Welling, Attention-based Deep
Multiple Instance Learning, ICML 2018, arXiv:1802.04712). With the embedding h of each cell (the last hidden
layer),

    attention  a = softmax over the cells of  w . (tanh(V h) * sigmoid(U h))
    logit        = c . (sum of a h) + d  =  sum of a (c . h + d)

so a head on bags is a head on single cells (in parentheses) with an attention, and the share of each cell in
the patient's logit is known. Without a hidden layer all cells weigh the same: a logistic regression on the
mean of their features.

`aplsmear.heads.stack` trains such heads. A step sees some cells of each patient, drawn anew each time. This
prevents a head from memorising a patient's set of cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, softmax

from aplsmear.heads.arithmetic import activate
from aplsmear.heads.head import Head


def attend(head: Head, features: np.ndarray) -> tuple[float, np.ndarray]:
    """The probability of the positive class of one item, and the attention on each of its images.

    `features` are float (images, channels), of one image at least, not standardised. The attention is float64
    (images,): numbers of at least 0 that sum to 1; for a mean of heads, the mean of their attentions.
    """
    gates, logits = gates_and_logits(head, features)
    attention = softmax(gates, axis=0)
    return float(expit((attention * logits).sum(axis=0).mean())), attention.mean(axis=1)


def attention_and_logits(seen: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The attention on each image of an item, which adds up to 1 over the images, and its logit alone.

    `seen` is of `gates_and_logits`, once for each view. Both are float64 (views, images, heads).
    """
    attention = [np.broadcast_to(softmax(gates, axis=0), logits.shape) for gates, logits in seen]
    return np.stack(attention), np.stack([logits for _, logits in seen])


def gates_and_logits(head: Head, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a head on bags computes of each image alone, before the images of an item are compared.

    `features` are float (images, channels), not standardised. Returned are the arguments of the softmax and
    the logits, float64 (images, heads) of a mean of heads. Any images, also repeated ones, make an item: its
    logit is the mean over the heads of the sum over the images of softmax times logit.
    """
    signal = features.astype(np.float64)
    gates = np.zeros((len(signal), 1))
    last = len(head.kernels) - 1
    for layer, (kernel, bias) in enumerate(zip(head.kernels, head.biases, strict=True)):
        if layer == last and head.attention:
            gated, offsets, weights = head.attention
            tanh, sigmoid = np.split(signal @ gated.astype(np.float64) + offsets, 2, axis=1)
            gates = (np.tanh(tanh) * expit(sigmoid)) @ weights.astype(np.float64)
        signal = signal @ kernel.astype(np.float64) + bias
        signal = signal if layer == last else activate(signal, head.activation)[0]
    return gates, signal
