"""The vision transformers DINOv2 and DINOv3 as data: sizes, options, layers. Keras is not imported.

References:
    Oquab et al., DINOv2, TMLR 2024. Darcet et al., ICLR 2024 (registers). Siméoni et al., DINOv3, 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

PATCHES, CLASS = "patches", "class"  # layers: normalised patch tokens as a map; the normalised class token


@dataclass(frozen=True)
class Variant:
    """The shape of a vision transformer. The option of a backbone with the name of a field replaces it."""

    width: int  # channels of a token
    depth: int  # number of transformer blocks
    heads: int  # of the attention in each block
    hidden: int  # units of the perceptron in each block
    gated: bool = False  # the perceptron is SwiGLU (two products, one of which gates the other), else GELU
    patch: int = 14  # side of a patch, in px
    registers: int = 0  # number of register tokens
    grid: int = 37  # patches along a side of the stored position embedding; 0: rotary, nothing is stored
    epsilon: float = 1e-6  # of the layer normalisations

    def problems(self) -> list[str]:
        """What does not fit together; empty: nothing."""
        found = [
            f"{name} must be {least} or more, a whole number"
            for name, value in asdict(self).items()
            if type(value) is not type(getattr(_EXAMPLE, name)) or value < (least := _LEAST.get(name, 0))
        ]
        if not found and (self.width % 16 or self.width % self.heads):
            found.append(f"width ({self.width}) must be a multiple of 16 and of heads ({self.heads})")
        elif not found and not self.grid and (self.width // self.heads) % 4:
            found.append(f"width / heads ({self.width // self.heads}) must be a multiple of 4")
        return found


_LEAST = dict.fromkeys(("width", "depth", "heads", "hidden", "patch"), 1)
_EXAMPLE = Variant(384, 12, 6, 1536)
_V3: dict[str, Any] = {"patch": 16, "registers": 4, "grid": 0, "epsilon": 1e-5}
VARIANTS = {
    "DINOv2S": _EXAMPLE,
    "DINOv2B": Variant(768, 12, 12, 3072),
    "DINOv2L": Variant(1024, 24, 16, 4096),
    "DINOv2G": Variant(1536, 40, 24, 4096, gated=True),
    "DINOv3S": Variant(384, 12, 6, 1536, **_V3),
    "DINOv3SPlus": Variant(384, 12, 6, 1536, gated=True, **_V3),
    "DINOv3B": Variant(768, 12, 12, 3072, **_V3),
    "DINOv3L": Variant(1024, 24, 16, 4096, **_V3),
    "DINOv3HPlus": Variant(1280, 32, 20, 5120, gated=True, **_V3),
}
OPTIONS = [each.name for each in fields(Variant)]


def variant_of(application: str, options: Mapping[str, Any]) -> Variant:
    """The variant of a backbone; `options` are fields of `Variant` that differ, such as ``{"registers": 4}``.

    Raises:
        ValueError: an unknown option, or values that do not fit together.
    """
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise ValueError(f"{application} has no option {', '.join(unknown)}; it has {', '.join(OPTIONS)}")
    variant = replace(VARIANTS[application], **options)
    if problems := variant.problems():
        raise ValueError(f"{application}: {'; '.join(problems)}")
    return variant


def layers_of(variant: Variant) -> list[str]:
    """Layers at which the network can be cut, from the input upwards; each gives a map.

    ``class`` and ``patches`` are normalised. Those of a block before the last one are as the block gives
    them. The mean of a map over the image is the class token, or the mean of the patch tokens.
    """
    inner = [f"block_{block}_{part}" for block in range(variant.depth - 1) for part in (CLASS, PATCHES)]
    return ["patch_embed", *inner, CLASS, PATCHES]
