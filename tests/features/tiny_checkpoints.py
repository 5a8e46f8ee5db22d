"""Tiny vision transformers with weights of a seeded generator, in the names of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

SHAPES: dict[str, dict[str, object]] = {
    "DINOv2": {"registers": 0, "gated": False, "grid": 5, "patch": 14, "epsilon": 1e-6, "hidden": 128},
    "DINOv2 with registers": {
        "registers": 4, "gated": True, "grid": 5, "patch": 14, "epsilon": 1e-6, "hidden": 88,
    },
    "DINOv3": {"registers": 4, "gated": False, "grid": 0, "patch": 16, "epsilon": 1e-5, "hidden": 48},
    "DINOv3 Plus": {"registers": 4, "gated": True, "grid": 0, "patch": 16, "epsilon": 1e-5, "hidden": 48},
}  # fmt: skip
WIDTH, DEPTH, HEADS, SIDE = 32, 2, 2, 3  # SIDE: patches along a side of the image


def case(name: str) -> dict[str, object]:
    """As benchmarks/published.py takes it."""
    shape = SHAPES[name] | {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "source": "transformers"}
    return shape | {"size": SIDE * int(str(shape["patch"]))}


def images(name: str) -> np.ndarray:
    """Two images: uint8 (2, size, size, 3)."""
    size = int(str(case(name)["size"]))
    return np.random.Generator(np.random.Philox(4)).integers(0, 256, (2, size, size, 3)).astype(np.uint8)


def weights(name: str) -> dict[str, np.ndarray]:
    """The state dictionary of a tiny network: float32, by name."""
    shape = SHAPES[name]
    hidden, patch, third = int(str(shape["hidden"])), int(str(shape["patch"])), not shape["grid"]
    sizes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, 1, WIDTH) if third else (1, WIDTH),
    }
    projection = "embeddings.patch_embeddings" + ("" if third else ".projection")
    sizes |= {f"{projection}.weight": (WIDTH, 3, patch, patch), f"{projection}.bias": (WIDTH,)}
    if shape["registers"]:
        sizes["embeddings.register_tokens"] = (1, 4, WIDTH)
    if not third:
        sizes["embeddings.position_embeddings"] = (1, 26, WIDTH)
    for block in range(DEPTH):
        start = f"{'model.layer' if third else 'encoder.layer'}.{block}."
        products: dict[str, tuple[int, int]] = {}
        for part in ("query", "key", "value"):
            word = f"attention.{part[0]}_proj" if third else f"attention.attention.{part}"
            products[word] = (WIDTH, WIDTH)
        products["attention.o_proj" if third else "attention.output.dense"] = (WIDTH, WIDTH)
        if third or shape["gated"]:
            products |= {f"mlp.{kind}_proj": (hidden, WIDTH) for kind in ("up", *["gate"][: shape["gated"]])}
            products["mlp.down_proj"] = (WIDTH, hidden)
        else:
            products |= {"mlp.fc1": (hidden, WIDTH), "mlp.fc2": (WIDTH, hidden)}
        for word, sides in products.items():
            sizes[f"{start}{word}.weight"] = sides
            if word != "attention.k_proj":
                sizes[f"{start}{word}.bias"] = sides[:1]
        for number in (1, 2):
            sizes |= {f"{start}norm{number}.weight": (WIDTH,), f"{start}norm{number}.bias": (WIDTH,)}
            sizes[f"{start}layer_scale{number}.lambda1"] = (WIDTH,)
    sizes |= {f"{'norm' if third else 'layernorm'}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    random = np.random.Generator(np.random.Philox(7))
    return {each: random.normal(0, 0.3, sizes[each]).astype(np.float32) for each in sorted(sizes)}


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file."""
    header, start = {}, 0
    for name, values in tensors.items():
        end = start + values.nbytes
        dtype = {"float32": "F32", "float16": "F16", "uint16": "BF16"}[str(values.dtype)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, end]}
        start = end
    written = json.dumps(header).encode()
    path.write_bytes(
        len(written).to_bytes(8, "little") + written + b"".join(each.tobytes() for each in tensors.values())
    )
