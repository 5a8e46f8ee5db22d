"""DINOv2 and DINOv3 as Keras networks, after the published implementations.

A transformer block is one layer, so `aplsmear.finetune` trains whole blocks. Class token and patch tokens
are returned as feature maps: their mean over the image is the feature.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from aplsmear.dino_variants import CLASS, PATCHES, Variant

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as both were trained
_ROTARY_BASE = 100.0
_OFFSET = 0.1  # patches; DINOv2 without registers was published with it


def build(variant: Variant, size: int) -> keras.Model:
    """The network of a variant: preprocessed float32 (batch, size, size, 3) -> its layers as maps.

    The layers have the names of `aplsmear.dino_variants.layers_of`.

    Raises ValueError: the size, in px, is no multiple of the side of a patch.
    """
    if size % variant.patch or size < variant.patch:
        raise ValueError(f"input_size {size} must be a multiple of {variant.patch}, the side of a patch")
    side = size // variant.patch
    image = keras.Input((size, size, 3))
    x = layers.Conv2D(variant.width, variant.patch, strides=variant.patch, name="patch_embed")(image)
    x = Tokens(variant.registers, variant.grid, side, name="tokens")(x)
    first, names = 1 + variant.registers, (CLASS, PATCHES)
    parts: list[Any] = []
    for block in range(variant.depth):
        shape = (variant.heads, variant.hidden, variant.gated, variant.epsilon)
        x = Block(*shape, rotary_side=0 if variant.grid else side, name=f"block_{block}")(x)
        prefix = f"block_{block}_"
        if block == variant.depth - 1:
            x, prefix = layers.LayerNormalization(epsilon=variant.epsilon, name="norm")(x), ""
        parts.extend(
            Part(start, sides, name=prefix + name)(x)
            for name, start, sides in zip(names, (0, first), (1, side), strict=True)
        )
    return keras.Model(image, parts)


def preprocess(images: Any) -> Any:
    """Float32 RGB, 0 to 255, as the networks were trained: standardised by ImageNet's mean and deviation."""
    return (images / 255 - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)


@keras.saving.register_keras_serializable("aplsmear")
class Tokens(layers.Layer):
    """A map of patches (batch, side, side, width) -> tokens (batch, class + registers + patches, width).

    Stored positions are resized to `side` as published: bicubic, with antialiasing only where there are
    registers.
    """

    def __init__(self, registers: int, grid: int, side: int, **settings: Any) -> None:
        """Registers: number of their tokens. Grid, side: patches along a side, stored and of this image."""
        super().__init__(**settings)
        self.registers, self.grid, self.side = registers, grid, side

    def build(self, shape: Any) -> None:
        """Make the weights."""
        width, random = shape[-1], keras.initializers.RandomNormal(stddev=0.02)
        self.first = self.add_weight(shape=(1, 1, width), initializer=random, name="class_token")
        if self.registers:
            self.extra = self.add_weight(
                shape=(1, self.registers, width), initializer=random, name="registers"
            )
        if self.grid:
            stored = (1, 1 + self.grid**2, width)
            self.positions = self.add_weight(shape=stored, initializer=random, name="positions")

    def resizing(self) -> np.ndarray:
        """Resized positions from stored ones: float32 (1 + side², 1 + grid²), the class token first."""
        found = np.zeros((1 + self.side**2, 1 + self.grid**2), np.float32)
        found[0, 0] = 1
        if self.side == self.grid:
            one = np.eye(self.side)
        elif self.registers:
            one = bicubic(self.grid, self.side, antialias=True)
        else:
            one = bicubic(self.grid, self.side, scale=(self.side + _OFFSET) / self.grid)
        found[1:, 1:] = np.kron(one, one)
        return found

    def call(self, feature_map: Any) -> Any:
        """See the class."""
        count, width = self.side**2, feature_map.shape[-1]
        patches = ops.reshape(feature_map, (-1, count, width))
        first = self.first
        if self.grid:
            positions = ops.matmul(ops.cast(self.resizing(), self.compute_dtype), self.positions[0])[None]
            first, patches = first + positions[:, :1], patches + positions[:, 1:]
        one = ops.zeros_like(patches[:, :1])
        prefix = [first, self.extra] if self.registers else [first]
        return ops.concatenate([*(one + each for each in prefix), patches], axis=1)

    def get_config(self) -> dict[str, Any]:
        """The arguments of this layer."""
        own = {"registers": self.registers, "grid": self.grid, "side": self.side}
        return dict(super().get_config()) | own


@keras.saving.register_keras_serializable("aplsmear")
class Block(layers.Layer):
    """A transformer block: tokens (batch, tokens, width) -> the same shape.

    x + scale_1 * attention(norm_1(x)), then x + scale_2 * perceptron(norm_2(x)). With a `rotary_side`,
    positions of the last ``rotary_side²`` tokens turn their queries and keys.
    """

    def __init__(
        self, heads: int, hidden: int, gated: bool, epsilon: float, rotary_side: int, **settings: Any
    ) -> None:
        """See `aplsmear.dino_variants.Variant`; `rotary_side`: patches along a side, 0: they do not turn."""
        super().__init__(**settings)
        self.heads, self.hidden, self.gated = heads, hidden, gated
        self.epsilon, self.rotary_side = epsilon, rotary_side

    def build(self, shape: Any) -> None:
        """Make the weights."""
        width, dtype = shape[-1], self.dtype_policy
        self.norm_1 = layers.LayerNormalization(epsilon=self.epsilon, name="norm_1", dtype=dtype)
        self.qkv = layers.Dense(3 * width, name="qkv", dtype=dtype)
        self.project = layers.Dense(width, name="project", dtype=dtype)
        self.norm_2 = layers.LayerNormalization(epsilon=self.epsilon, name="norm_2", dtype=dtype)
        self.widen = layers.Dense(self.hidden * (2 if self.gated else 1), name="widen", dtype=dtype)
        self.narrow = layers.Dense(width, name="narrow", dtype=dtype)
        for each in (self.norm_1, self.qkv, self.project, self.norm_2, self.widen):
            each.build(shape)
        self.narrow.build((*shape[:-1], self.hidden))
        self.scale_1 = self.add_weight(shape=(width,), initializer="ones", name="scale_1")
        self.scale_2 = self.add_weight(shape=(width,), initializer="ones", name="scale_2")

    def call(self, x: Any) -> Any:
        """See the class."""
        x = x + self.scale_1 * self.attention(self.norm_1(x))
        return x + self.scale_2 * self.perceptron(self.norm_2(x))

    def attention(self, x: Any) -> Any:
        """Self-attention of all tokens."""
        count, width = x.shape[1:]
        parts = ops.reshape(self.qkv(x), (-1, count, 3, self.heads, width // self.heads))
        query, key, value = ops.unstack(ops.transpose(parts, (2, 0, 3, 1, 4)), axis=0)
        if self.rotary_side:
            cosine, sine = (ops.cast(each, x.dtype) for each in self.rotation(count, width // self.heads))
            query, key = (each * cosine + _turned(each) * sine for each in (query, key))
        weights = ops.matmul(query * (width // self.heads) ** -0.5, ops.swapaxes(key, -1, -2))
        found = ops.matmul(ops.softmax(weights, axis=-1), value)
        return self.project(ops.reshape(ops.transpose(found, (0, 2, 1, 3)), (-1, count, width)))

    def rotation(self, tokens: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine of the rotary positions of DINOv3: float32 (tokens, channels of a head) each.

        The first quarter of the channels turns by the row of a patch, the second by its column, the others as
        these two. Rows and columns lie between -1 and 1. Class token and registers do not turn.
        """
        side, quarter = self.rotary_side, channels // 4
        places = 2 * (np.arange(side) + 0.5) / side - 1
        rows_columns = np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1).reshape(-1, 2)
        periods = _ROTARY_BASE ** (np.arange(quarter) / quarter)
        angles = np.tile((2 * np.pi * rows_columns[:, :, None] / periods).reshape(side**2, -1), 2)
        angles = np.pad(angles, ((tokens - side**2, 0), (0, 0)))
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def perceptron(self, x: Any) -> Any:
        """GELU, or SwiGLU: the first half of the units, after SiLU, gates the second."""
        x = self.widen(x)
        if self.gated:
            gate, x = ops.split(x, 2, axis=-1)
            return self.narrow(ops.silu(gate) * x)
        return self.narrow(ops.gelu(x, approximate=False))

    def get_config(self) -> dict[str, Any]:
        """The arguments of this layer."""
        names = ("heads", "hidden", "gated", "epsilon", "rotary_side")
        return dict(super().get_config()) | {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable("aplsmear")
class Part(layers.Layer):
    """Some tokens as a map: `side`² tokens from number `start` -> (batch, side, side, width)."""

    def __init__(self, start: int, side: int, **settings: Any) -> None:
        """See the class."""
        super().__init__(**settings)
        self.start, self.side = start, side

    def call(self, tokens: Any) -> Any:
        """See the class."""
        found = tokens[:, self.start : self.start + self.side**2]
        return ops.reshape(found, (-1, self.side, self.side, tokens.shape[-1]))

    def get_config(self) -> dict[str, Any]:
        """The arguments of this layer."""
        return dict(super().get_config()) | {"start": self.start, "side": self.side}


def _turned(x: Any) -> Any:
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([-second, first], axis=-1)


def bicubic(old: int, new: int, *, antialias: bool = False, scale: float = 0.0) -> np.ndarray:
    """PyTorch's `interpolate` as the matrix that resizes one axis: float64 (new, old); each row sums to 1.

    With `antialias` the kernel is wider where the axis shrinks (Keys' a = -0.5); else it has four points
    (a = -0.75). `scale`: points after per point before, where it is not new / old.
    """
    step = 1 / scale if scale else old / new
    centres = (np.arange(new) + 0.5) * step
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
    found = np.zeros((new, old))
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
