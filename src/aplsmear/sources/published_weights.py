"""Weights of DINOv2 and DINOv3 under their published names -> the Keras networks of `aplsmear.features.dino`.

Names of facebookresearch (dinov2, dinov3), timm and transformers are read, and checkpoints of a training with
the prefixes ``backbone.`` or ``module.`` (DinoBloom).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aplsmear.dino_variants import CLASS, PATCHES, VARIANTS, Variant, variant_of
from aplsmear.files import sha256, whole
from aplsmear.progress import progress
from aplsmear.sources.checkpoints import CheckpointError, Tensor, read_checkpoint
from aplsmear.words import named

_SHOWN = 10  # names in a message
_HEAD = 64  # channels of a head in every published variant
_WORDS = {  # regular expression -> its name with facebookresearch (dinov2)
    r"^(module|backbone|model|teacher|dinov2|dinov2_with_registers)\.": "",
    r"^embeddings\.": "",
    r"^(encoder\.)?layer\.(\d+)": r"blocks.\2",
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",  # training in chunks of blocks
    r"^patch_embeddings\.(projection\.)?": "patch_embed.proj.",
    r"^position_embeddings$": "pos_embed",
    r"^(storage_tokens|reg_token)$": "register_tokens",
    r"^layernorm\.": "norm.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.attention\.o_proj\.": ".attn.proj.",
    r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.": r".attn.\2.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"\.gamma_(\d)$": r".ls\1.gamma",
    r"\.mlp\.(fc1_g|gate_proj|w1)\.": ".mlp.gate.",
    r"\.mlp\.(fc1_x|w2)\.": ".mlp.up.",
    r"\.mlp\.(weights_in|w12|up_proj)\.": ".mlp.fc1.",
    r"\.mlp\.(weights_out|w3|down_proj)\.": ".mlp.fc2.",
}
# Of training only, or computed from the shape of the network.
_UNUSED = re.compile(r"^(mask_token|rope.*|(dino|ibot)_head\..*|head\..*|.*\.bias_mask|pooler\..*)$")
_BLOCK = (
    *("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"),
    *("ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"),
    *("mlp.fc2.bias", "ls2.gamma"),
)


@dataclass(frozen=True)
class Converted:
    """Weights of a published network."""

    application: str  # nearest entry of `VARIANTS`
    variant: Variant  # the shape of the network
    tensors: dict[str, Tensor]  # by name with facebookresearch (dinov2)


def read_published(path: Path, heads: int = 0) -> Converted:
    """Read a checkpoint, find its variant, and check all names and shapes before a number is read.

    Args:
        path: .safetensors, .pth or .pt.
        heads: of the attention; 0: channels / 64, as in every published network.

    Raises:
        CheckpointError: of `read_checkpoint`, or with all names that are unknown or missing, or wrong shapes.
    """
    tensors = _merged(_renamed(read_checkpoint(path)))
    try:
        application, variant = _variant_of(tensors, heads)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{str(path)!r} has no weights of DINOv2 or DINOv3: {error} is missing or wrong"
        ) from error
    expected = _shapes(variant)
    if missing := named(sorted(expected.keys() - tensors.keys()), _SHOWN):
        raise CheckpointError(f"{str(path)!r} lacks: {missing}")
    if unknown := named(sorted(tensors.keys() - expected.keys()), _SHOWN):
        raise CheckpointError(f"{str(path)!r} has weights that {application} has not: {unknown}")
    wrong = [
        f"{name} {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{str(path)!r} has other shapes than {application}: {named(wrong, _SHOWN)}")
    return Converted(application, variant, tensors)


def write_weights(converted: Converted, path: Path) -> str:
    """Write the weights as a file that Keras loads (``.weights.h5``); returns its SHA-256.

    The same weights give the same bytes.
    """
    import keras

    from aplsmear.features.dino import build

    keras.utils.clear_session()  # the numbers in names of layers are part of the file
    variant = converted.variant
    network = build(variant, variant.patch * (variant.grid or 1))
    tensors = list(_keras_weights(converted))
    for name, read in progress(tensors, "tensors", len(tensors)):
        layer, _, weight = name.partition("/")
        (own,) = (each for each in network.get_layer(layer).weights if each.path.partition("/")[2] == weight)
        own.assign(read().reshape(own.shape))
    with whole(path) as part:
        scratch = part.with_name(part.name + ".weights.h5")  # Keras asks for this ending
        try:
            network.save_weights(scratch)
            scratch.replace(part)
        finally:
            scratch.unlink(missing_ok=True)
    return sha256(path)


def row_of(converted: Converted, name: str, weights: Path, digest: str, size: int = 224) -> dict[str, Any]:
    """The row of `backbones` in params.yaml for converted weights: {name: settings}."""
    usual = asdict(VARIANTS[converted.application])
    options = {key: value for key, value in asdict(converted.variant).items() if value != usual[key]}
    return {
        name: {
            "application": converted.application,
            **({"options": options} if options else {}),
            "input_size": {"cell": size, "smear": size},
            "layer": [CLASS, PATCHES, f"{CLASS}+{PATCHES}"],
            "weights": weights.as_posix(),
            "sha256": digest,
            "batch": 32,
        }
    }


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    if any(name.startswith("backbone.") for name in tensors):  # beside the heads of a training
        tensors = {name: each for name, each in tensors.items() if name.startswith("backbone.")}
    for published, tensor in tensors.items():
        name = published
        for pattern, word in _WORDS.items():
            name = re.sub(pattern, word, name)
        if not _UNUSED.match(name):
            found[name] = tensor
    return found


def _merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Products that were published apart as one: query, key, value; gate, units. Missing biases are 0."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(blocks\.\d+\.attn)\.q\.weight", name):
            for kind, shape in (("weight", tensor.shape), ("bias", tensor.shape[:1])):
                parts = [found.pop(f"{match[1]}.{each}.{kind}", _zeros(shape)) for each in "qkv"]
                found[f"{match[1]}.qkv.{kind}"] = _stacked(parts)
        elif name.endswith(".attn.qkv.weight"):
            found.setdefault(name.removesuffix("weight") + "bias", _zeros(tensor.shape[:1]))
        elif match := re.fullmatch(r"(blocks\.\d+\.mlp)\.gate\.(weight|bias)", name):
            # transformers calls the units of SwiGLU as those of a perceptron without a gate.
            units = next(each for each in ("up", "fc1") if f"{match[1]}.{each}.{match[2]}" in found)
            parts = [found.pop(name), found.pop(f"{match[1]}.{units}.{match[2]}")]
            found[f"{match[1]}.fc1.{match[2]}"] = _stacked(parts)
    positions = found.get("pos_embed")
    if positions and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        # timm: the class token has its position already.
        found["pos_embed"] = _stacked([_zeros((1, 1, positions.shape[2])), positions], axis=1)
    return found


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, lambda: np.zeros(shape, np.float32))


def _stacked(parts: list[Tensor], axis: int = 0) -> Tensor:
    first = list(parts[0].shape)
    first[axis] = sum(each.shape[axis] for each in parts)
    return Tensor(tuple(first), lambda: np.concatenate([each.read() for each in parts], axis=axis))


def _variant_of(tensors: Mapping[str, Tensor], heads: int) -> tuple[str, Variant]:
    """The nearest entry of `VARIANTS`, and the variant that the shapes tell.

    Raises:
        KeyError, ValueError: a tensor that tells a shape is missing or has no such shape.
    """
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    blocks = {int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)}
    hidden = tensors["blocks.0.mlp.fc2.weight"].shape[1]
    grid = math.isqrt(tensors["pos_embed"].shape[1] - 1) if "pos_embed" in tensors else 0
    shape = {
        "width": width,
        "depth": max(blocks) + 1,
        "hidden": hidden,
        "gated": tensors["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden,
        "patch": patch,
        "registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
        "grid": grid,
    }
    same = {
        name: sum(getattr(each, key) == value for key, value in shape.items())
        for name, each in VARIANTS.items()
        if bool(each.grid) == bool(grid)
    }
    application = max(same, key=same.__getitem__)
    if not heads and width % _HEAD:
        raise CheckpointError(
            f"{width} channels are no multiple of {_HEAD}: give the number of heads (--heads)"
        )
    return application, variant_of(application, shape | {"heads": heads or width // _HEAD})


def _shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Name with facebookresearch -> shape of every weight of a variant."""
    width, hidden = variant.width, variant.hidden
    units = hidden * (2 if variant.gated else 1)
    inner = {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)}
    inner |= {"attn.proj.weight": (width, width), "mlp.fc1.weight": (units, width), "mlp.fc1.bias": (units,)}
    inner |= {"mlp.fc2.weight": (width, hidden)}
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, variant.patch, variant.patch),
        "patch_embed.proj.bias": (width,),
        "cls_token": (1, 1, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if variant.registers:
        found["register_tokens"] = (1, variant.registers, width)
    if variant.grid:
        found["pos_embed"] = (1, 1 + variant.grid**2, width)
    for block in range(variant.depth):
        found |= {f"blocks.{block}.{name}": inner.get(name, (width,)) for name in _BLOCK}
    return found


def _keras_weights(converted: Converted) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Path of each Keras weight, and how its values are read."""
    tensors = converted.tensors

    def turned(name: str) -> Callable[[], np.ndarray]:
        return lambda: tensors[name].read().T

    yield "patch_embed/kernel", lambda: tensors["patch_embed.proj.weight"].read().transpose(2, 3, 1, 0)
    yield "patch_embed/bias", tensors["patch_embed.proj.bias"].read
    tokens = {"class_token": "cls_token", "registers": "register_tokens", "positions": "pos_embed"}
    for own, name in tokens.items():
        if name in tensors:
            yield f"tokens/{own}", tensors[name].read
    yield "norm/gamma", tensors["norm.weight"].read
    yield "norm/beta", tensors["norm.bias"].read
    products = {"qkv": "attn.qkv", "project": "attn.proj", "widen": "mlp.fc1", "narrow": "mlp.fc2"}
    for block in range(converted.variant.depth):
        own, start = f"block_{block}/", f"blocks.{block}."
        for number in (1, 2):
            yield f"{own}norm_{number}/gamma", tensors[f"{start}norm{number}.weight"].read
            yield f"{own}norm_{number}/beta", tensors[f"{start}norm{number}.bias"].read
            yield f"{own}scale_{number}", tensors[f"{start}ls{number}.gamma"].read
        for layer, name in products.items():
            yield f"{own}{layer}/kernel", turned(f"{start}{name}.weight")
            yield f"{own}{layer}/bias", tensors[f"{start}{name}.bias"].read
