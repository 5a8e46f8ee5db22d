"""The arithmetic of heads: logits, gradients and steps of AdamW, in float32.

Heads of one recipe stand side by side on the first axis, one a lane. No operation mixes lanes, so the bits of
a head do not depend on the heads beside it. All operations give the same bits on every x86-64 processor with
AVX2 and FMA, as `aplsmear.cpu` pins them: products by OpenBLAS, NumPy's own exp, log and tanh of float32, and
what IEEE 754 defines (+, -, *, /, square root). So GELU is the form with tanh (Hendrycks and Gimpel 2016,
arXiv:1606.08415).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-7  # of Adam
_CHUNK = 2**15  # weights that Adam changes at a time: all arrays it needs stay in the cache of a core
_SMALLEST = 1e-30  # moments that are smaller become 0: processors are slow below about 1e-38
_GELU = np.float32(math.sqrt(2 / math.pi)), np.float32(math.sqrt(2 / math.pi) * 0.044715)


class Bags(NamedTuple):
    """Which rows are images of which item; one lane only."""

    start: np.ndarray  # int64 (items,): the first row of each
    size: np.ndarray  # int64 (items,): number of rows, at least one

    @classmethod
    def of(cls, size: np.ndarray) -> Bags:
        """Items of so many rows, one after another."""
        return cls(np.cumsum(size) - size, size)


class Tape(NamedTuple):
    """What `Network.backward` needs of a forward pass."""

    inputs: list[np.ndarray]  # of each product, float32 (lanes, rows, units)
    slopes: list[np.ndarray]  # of each activation, dropout included, in the same shape
    logits: np.ndarray  # of the rows, float32 (lanes, rows)
    shares: np.ndarray  # of the rows in the logit of their item, float32 (lanes, rows)
    gates: np.ndarray  # of the attention: tanh and sigmoid side by side, float32 (lanes, rows, 2 units)
    bags: Bags | None


class Network:
    """The weights of some heads and the moments of Adam.

    Each array of weights has the shape (lanes, rows, columns); all are views of one flat array.
    """

    def __init__(
        self, lanes: int, sizes: Sequence[tuple[int, int]], attention: bool, activation: str
    ) -> None:
        """So many networks of zeros, with kernels of these rows and columns.

        With `attention`, rows are weighed by attention on the last hidden layer.
        """
        self.depth, self.activation = len(sizes) - 1, activation
        shapes = [shape for rows, columns in sizes for shape in ((rows, columns), (1, columns))]
        width = sizes[-1][0]
        shapes += [(width, 2 * width), (1, 2 * width), (width, 1)] if attention else []
        self.attention = attention
        self._ends = np.cumsum([0, *(rows * columns for rows, columns in shapes)])
        self._shapes = shapes
        self._flat = [np.zeros((lanes, int(self._ends[-1])), np.float32) for _ in range(4)]
        self.steps = 0
        self._set_views()

    def _set_views(self) -> None:
        parts = list(zip(self._shapes, self._ends, self._ends[1:], strict=False))
        self.weights, self._gradients = (
            [flat[:, start:end].reshape(-1, *shape) for shape, start, end in parts] for flat in self._flat[:2]
        )

    def keep(self, lanes: np.ndarray) -> None:
        """Drop all lanes but these (bool or int64)."""
        self._flat = [flat[lanes] for flat in self._flat]
        self._set_views()

    def forward(
        self,
        x: np.ndarray,
        bags: Bags | None = None,
        mix: Callable[[np.ndarray], np.ndarray] | None = None,
        dropout: Callable[[tuple[int, ...]], np.ndarray] | None = None,
        lanes: slice = slice(None),
    ) -> tuple[np.ndarray, Tape]:
        """The logits of items, float32 (lanes, items), and the tape.

        Args:
            x: float32 (lanes, rows, channels), standardised.
            bags: the rows of each item; None: a row is an item.
            mix: applied behind the first product, which is linear: as if applied to `x`.
            dropout: factors for an array of the given shape; None: no dropout.
            lanes: of which `x` is.
        """
        weights = [weight[lanes] for weight in self.weights]
        signal = _affine(x, *weights[:2])
        signal = mix(signal) if mix else signal
        inputs, slopes = [x], []
        for layer in range(1, self.depth + 1):
            signal, slope = activate(signal, self.activation)
            if dropout:
                factor = dropout(signal.shape)
                signal *= factor
                slope *= factor
            inputs.append(signal)
            slopes.append(slope)
            signal = _affine(signal, *weights[2 * layer : 2 * layer + 2])
        logits, shares, gates = signal[..., 0], np.ones(1, np.float32), np.zeros(0, np.float32)
        if bags is None:
            return logits, Tape(inputs, slopes, logits, shares, gates, None)
        if self.attention:
            kernel, bias, vector = weights[-3:]
            gates = _affine(inputs[-1], kernel, bias)
            tanh, sigma = _halves(gates)
            sigma *= 0.5  # sigmoid(x) = (tanh(x / 2) + 1) / 2
            np.tanh(gates, out=gates)
            sigma *= 0.5
            sigma += 0.5
            score = ((tanh * sigma) @ vector)[..., 0]
            above = np.repeat(np.maximum.reduceat(score, bags.start, axis=1), bags.size, axis=1)
            shares = np.exp(np.maximum(score - above, np.float32(-60)))
        else:
            shares = np.ones_like(logits)
        shares /= np.repeat(np.add.reduceat(shares, bags.start, axis=1), bags.size, axis=1)
        pooled = np.add.reduceat(shares * logits, bags.start, axis=1)
        return pooled, Tape(inputs, slopes, logits, shares, gates, bags)

    def backward(
        self, back: np.ndarray, tape: Tape, mix: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """The gradient of a loss by all weights, from its gradient by the logits: float32 (lanes, items).

        One array for each of `weights`, valid until the next call. `mix` is its own adjoint.
        """
        into_hidden = None
        if tape.bags is not None:
            each = np.repeat(back, tape.bags.size, axis=1)
            if self.attention:
                into_hidden = self._attention_gradients(each, tape, tape.bags)
            back = each * tape.shares
        back = back[..., None]
        for layer in range(self.depth, 0, -1):
            self._product_gradients(layer, back, tape)
            back = back @ np.swapaxes(self.weights[2 * layer], 1, 2)
            if layer == self.depth and into_hidden is not None:
                back += into_hidden
            back *= tape.slopes[layer - 1]
        self._product_gradients(0, mix(back) if mix else back, tape)
        return self._gradients

    def _product_gradients(self, layer: int, back: np.ndarray, tape: Tape) -> None:
        inputs, kernel, bias = tape.inputs[layer], *self._gradients[2 * layer : 2 * layer + 2]
        np.matmul(np.swapaxes(inputs, 1, 2), back, out=kernel)
        np.matmul(np.ones((1, back.shape[1]), np.float32), back, out=bias)

    def _attention_gradients(self, each: np.ndarray, tape: Tape, bags: Bags) -> np.ndarray:
        """Set the gradients of the attention; return that by the last hidden layer, through the attention.

        `each` is the gradient by the logit of the row's item, float32 (1, rows).
        """
        shares = tape.shares
        by_share = each * tape.logits
        mean = np.add.reduceat(shares * by_share, bags.start, axis=1)
        by_score = (shares * (by_share - np.repeat(mean, bags.size, axis=1)))[..., None]
        kernel, bias, vector = self._gradients[-3:]
        tanh, sigma = _halves(tape.gates)
        gated = tanh * sigma
        np.matmul(np.swapaxes(gated, 1, 2), by_score, out=vector)
        back = np.empty_like(tape.gates)
        by_tanh, by_sigma = _halves(back)
        # tanh' = 1 - tanh^2, sigmoid' = sigmoid (1 - sigmoid)
        np.multiply(sigma, 1 - tanh * tanh, out=by_tanh)
        np.multiply(gated, 1 - sigma, out=by_sigma)
        outwards = by_score * np.swapaxes(self.weights[-1], 1, 2)
        by_tanh *= outwards
        by_sigma *= outwards
        np.matmul(np.swapaxes(tape.inputs[-1], 1, 2), back, out=kernel)
        np.matmul(np.ones((1, back.shape[1]), np.float32), back, out=bias)
        return np.asarray(back @ np.swapaxes(self.weights[-3], 1, 2))

    def step(self, rate: float, decay: float) -> None:
        """One step of AdamW (Loshchilov and Hutter 2019) by the gradients of the last `backward`.

        Kernels decay, biases do not.
        """
        self.steps += 1
        for kernel in self.weights[::2]:
            np.multiply(kernel, np.float32(1 - rate * decay), out=kernel)
        weights, gradients, first, second = (flat.reshape(-1) for flat in self._flat)
        # Moments are kept without their factors (1 - beta), which saves two operations on all weights.
        scale = math.sqrt((1 - BETA2) / (1 - BETA2**self.steps))
        rate, epsilon = rate * (1 - BETA1) / (1 - BETA1**self.steps) / scale, EPSILON / scale
        scratch = np.empty(min(_CHUNK, len(weights)), np.float32)
        for start in range(0, len(weights), _CHUNK):
            w, g, m, v = (each[start : start + _CHUNK] for each in (weights, gradients, first, second))
            t = scratch[: len(w)]
            m *= BETA1
            m += g
            v *= BETA2
            np.multiply(g, g, out=t)
            v += t
            np.sqrt(v, out=t)
            t += epsilon
            np.divide(m, t, out=t)
            t *= rate
            w -= t
            if self.steps % 64 == 0:
                m[np.abs(m) < _SMALLEST] = 0
                v[v < _SMALLEST] = 0


def activate(signal: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """A signal after an activation, and the slope there, float32."""
    if activation == "relu":
        slope = (signal > 0).astype(np.float32)
        return signal * slope, slope
    if activation == "tanh":
        value = np.tanh(signal)
        return value, 1 - value * value
    square = signal * signal
    tanh = np.tanh(signal * (_GELU[0] + _GELU[1] * square))
    half = np.float32(0.5) * (1 + tanh)
    slope = half + np.float32(0.5) * signal * (1 - tanh * tanh) * (_GELU[0] + 3 * _GELU[1] * square)
    return signal * half, slope


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """The logistic function, float32."""
    small = np.exp(-np.abs(logit))
    return np.asarray(np.where(logit >= 0, np.float32(1), small) / (1 + small))


def cross_entropy(logit: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The loss of logits for labels 0 and 1, float32."""
    return np.asarray(np.maximum(logit, 0) - logit * label + np.log(1 + np.exp(-np.abs(logit))))


def _affine(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    signal = np.asarray(np.matmul(x, kernel))
    signal += bias
    return signal


def _halves(gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of the units for tanh and of those for the sigmoid."""
    units = gates.shape[-1] // 2
    return gates[..., :units], gates[..., units:]
