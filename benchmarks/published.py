"""Features of a published vision transformer with random weights, by PyTorch. benchmarks/parity.py runs this.

Usage: /path/of/another/environment/bin/python benchmarks/published.py FOLDER CASE

It writes into FOLDER: the weights (weights.pth or weights.safetensors) and features.npz. CASE is JSON, see
benchmarks/parity.py. It needs torch, transformers, timm and safetensors, and nothing of this project.
"""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMM = {  # the variant of facebookresearch -> the entry of timm
    384: "small",
    768: "base",
    1024: "large",
    1280: "huge_plus",
    1536: "giant",
}


def main(folder: Path, case: dict) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(2)
    with torch.no_grad():
        network = {"transformers": of_transformers, "timm": of_timm, "dinobloom": of_timm}[case["source"]](
            case
        )
        given = folder / "given.safetensors"  # else random ones
        if given.exists():
            network.load_state_dict({renamed(key): value for key, value in load_file(given).items()})
        for name, value in () if given.exists() else network.named_parameters():
            noise = torch.randn(value.shape) * (0.02 if value.ndim > 1 else 0.1)
            value.copy_(noise + (1 if is_scale(name, value) else 0))
        network.eval()
        write(folder, case, network)
        images = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2) / 255
        prepared = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
        tokens = tokens_of(network, prepared, case)
    first = 1 + case["registers"]
    np.savez(folder / "features.npz", **{"class": tokens[:, 0], "patches": tokens[:, first:].mean(dim=1)})


def renamed(name: str) -> str:
    """The name in transformers 5 of a weight of DINOv2 that a published file names as transformers 4 did."""
    for part in ("query", "key", "value"):
        name = name.replace(f"attention.attention.{part}", f"attention.{part[0]}_proj")
    return name.replace("attention.output.dense", "attention.o_proj")


def is_scale(name: str, value: torch.Tensor) -> bool:
    """Whether a parameter is a factor: around 1, not 0."""
    factor = ("gamma", "lambda1", "norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight")
    return value.ndim == 1 and (name.endswith(factor) or "gamma_" in name)


def of_transformers(case: dict) -> torch.nn.Module:
    shape = {
        "hidden_size": case["width"],
        "num_hidden_layers": case["depth"],
        "num_attention_heads": case["heads"],
        "patch_size": case["patch"],
        "image_size": case["patch"] * (case["grid"] or 14),
        "layer_norm_eps": case["epsilon"],
    }
    if not case["grid"]:
        config = transformers.DINOv3ViTConfig(
            **shape,
            intermediate_size=case["hidden"],
            use_gated_mlp=case["gated"],
            hidden_act="silu" if case["gated"] else "gelu",
            num_register_tokens=case["registers"],
        )
        return transformers.DINOv3ViTModel(config)
    shape |= {
        "mlp_ratio": 4 if case["gated"] else case["hidden"] // case["width"],
        "use_swiglu_ffn": case["gated"],
    }
    if case["registers"]:
        config = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=case["registers"])
        return transformers.Dinov2WithRegistersModel(config)
    return transformers.Dinov2Model(transformers.Dinov2Config(**shape))


def of_timm(case: dict) -> torch.nn.Module:
    size = "small_plus" if case["width"] == 384 and case["gated"] else TIMM[case["width"]]
    family = "dinov2" if case["grid"] else "dinov3"
    registers = "reg4_" if case["grid"] and case["registers"] else ""
    name = f"vit_{size}_patch{case['patch']}_{registers}{family}"
    side = case["patch"] * case["grid"] if case["grid"] else case["size"]
    return timm.create_model(name, pretrained=False, num_classes=0, img_size=side, depth=case["depth"])


def write(folder: Path, case: dict, network: torch.nn.Module) -> None:
    """The weights, in the layout of their source."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    if case["source"] == "dinobloom":  # a checkpoint of a training, with the heads of the training
        words = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"} if case["gated"] else {}
        teacher = {"dino_head.last_layer.weight_v": torch.zeros(3, 4)}
        for name, value in state.items():
            renamed = name
            for old, new in words.items():
                renamed = renamed.replace(old, new)
            teacher[f"backbone.{renamed}"] = value
        torch.save({"teacher": teacher, "iteration": 3}, folder / "weights.pth")
    elif case["source"] == "timm":
        torch.save(network.state_dict(), folder / "weights.pth")
    else:
        save_file(state, folder / "weights.safetensors")


def tokens_of(network: torch.nn.Module, images: torch.Tensor, case: dict) -> torch.Tensor:
    """The normalised tokens. Positions of DINOv2 are resized by the formula of facebookresearch/dinov2."""
    side = case["size"] // case["patch"]
    if case["grid"] and side != case["grid"]:
        resize(network, case, side)
    if case["source"] == "transformers":
        return network(images).last_hidden_state
    return network.forward_features(images)


def resize(network: torch.nn.Module, case: dict, side: int) -> None:
    """Resize stored positions as `interpolate_pos_encoding` of facebookresearch/dinov2 does."""
    old = case["grid"]
    how = {"scale_factor": ((side + 0.1) / old,) * 2}
    if case["registers"]:
        how = {"size": (side, side), "antialias": True}
    embeddings = network.embeddings if case["source"] == "transformers" else network
    name = "position_embeddings" if case["source"] == "transformers" else "pos_embed"
    stored = getattr(embeddings, name)
    prefix = stored.shape[1] - old**2
    maps = stored[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(maps, mode="bicubic", **how)
    resized = resized.permute(0, 2, 3, 1).reshape(1, side**2, -1)
    setattr(embeddings, name, torch.nn.Parameter(torch.cat([stored[:, :prefix], resized], dim=1)))
    if case["source"] != "transformers":
        network.patch_embed.img_size = (case["size"], case["size"])
        network.patch_embed.grid_size = (side, side)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
