"""Weights of published vision transformers: read without running code, checked, and right."""

import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import parity
import pytest
import tiny_checkpoints
from ruamel.yaml import YAML
from tiny_checkpoints import HEADS, SHAPES, write_safetensors
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.compute.runtime import start_tensorflow
from aplsmear.features.backbones import cut_network
from aplsmear.params import Backbone
from aplsmear.sources.checkpoints import CheckpointError, read_checkpoint
from aplsmear.sources.published_weights import read_published

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

# First features of the second image, by transformers 5.24 and benchmarks/published.py: class token; patches.
PUBLISHED = {
    "DINOv2": ([-0.58981, -0.69272, 0.05544, 0.49892], [-0.03091, -0.48256, 0.24918, 0.48472]),
    "DINOv2 with registers": (
        [0.26487, -0.43872, -0.11897, -0.34663],
        [0.19357, 0.08086, -0.02928, -0.94075],
    ),
    "DINOv3": ([-0.39613, -0.03478, 0.36141, 0.18682], [-0.29886, -0.02828, 0.09623, 0.25358]),
    "DINOv3 Plus": ([-0.65081, 0.36548, 0.63676, -0.2272], [-0.47697, -0.00011, -0.26141, -0.20435]),
}


def convert(path: Path, folder: Path) -> tuple[str, Path]:
    """Run the command: what it prints, and the file that it writes."""
    done = CliRunner().invoke(
        app, ["weights", "convert", str(path), "--to", str(folder), "--heads", str(HEADS)]
    )
    assert done.exit_code == 0, done.output
    return done.output, next(folder.iterdir())


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_converted_weights_give_the_features_of_the_published_implementation(name, tmp_path):
    start_tensorflow()
    checkpoint = tmp_path / "Tiny-1.safetensors"
    write_safetensors(checkpoint, tiny_checkpoints.weights(name))
    printed, written = convert(checkpoint, tmp_path / "one")
    row = YAML(typ="safe").load(printed[printed.index("backbones:") :])["backbones"]["tiny_1"]
    size = tiny_checkpoints.SIDE * SHAPES[name]["patch"]
    row |= {"input_size": {"cell": size, "smear": size}, "layer": ["class", "patches"]}
    network, preprocess = cut_network(Backbone(**row), "cell", 1)
    found = network(preprocess(tiny_checkpoints.images(name).astype(np.float32)), training=False)
    for layer, expected in zip(("class", "patches"), PUBLISHED[name], strict=True):
        features = np.asarray(found[layer]).mean(axis=(1, 2))[1, :4]
        np.testing.assert_allclose(features, expected, atol=2e-5)
    if name == "DINOv3":
        assert convert(checkpoint, tmp_path / "two")[1].read_bytes() == written.read_bytes()


# --- checkpoints of PyTorch --------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Writes arrays as PyTorch writes tensors."""

    def __init__(self, file: io.BytesIO, torch: types.ModuleType) -> None:
        super().__init__(file, protocol=2)
        self.torch, self.stored = torch, []

    def persistent_id(self, given: object) -> object:
        if not isinstance(given, _Stored):
            return None
        self.stored.append(given.values)
        kind = {"float32": "FloatStorage", "float16": "HalfStorage", "uint16": "BFloat16Storage"}
        storage = getattr(self.torch, kind[str(given.values.dtype)])
        return "storage", storage, str(len(self.stored) - 1), "cpu", given.values.size

    def reducer_override(self, given: object) -> object:
        if not isinstance(given, np.ndarray):
            return NotImplemented
        strides = tuple(step // given.itemsize for step in given.strides)
        arguments = (_Stored(given), 0, given.shape, strides, False, OrderedDict())
        return sys.modules["torch._utils"]._rebuild_tensor_v2, arguments


class _Stored:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values


@pytest.fixture
def torch(monkeypatch):
    """Modules with the names that a checkpoint of PyTorch has in it."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "HalfStorage", "BFloat16Storage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2() -> None: ...

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


def save(path: Path, found: object, torch: types.ModuleType, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a file as `torch.save` does."""
    file = io.BytesIO()
    pickler = _Pickler(file, torch)
    pickler.dump(found)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        for number, values in enumerate(pickler.stored):
            archive.writestr(f"archive/data/{number}", values.tobytes())


def test_a_checkpoint_of_a_training_gives_the_teacher_without_its_heads(tmp_path, torch):
    """The layout of DinoBloom; half precision becomes float32."""
    tensors = {f"backbone.{key}": value for key, value in tiny_checkpoints.weights("DINOv2").items()}
    tensors["backbone.layernorm.bias"] = np.array([0.5, -2] * 16, np.float16)
    tensors["backbone.layernorm.weight"] = np.array([0x3FC0, 0xC000] * 16, np.uint16)  # bfloat16: 1.5, -2
    tensors["dino_head.last_layer.weight"] = np.zeros((3, 4), np.float32)
    save(tmp_path / "a.pth", {"teacher": OrderedDict(tensors), "iteration": 3}, torch)
    found = read_published(tmp_path / "a.pth", HEADS)
    assert found.application == "DINOv2S"
    assert found.variant.grid == 5
    np.testing.assert_array_equal(found.tensors["norm.bias"].read(), [0.5, -2] * 16)
    np.testing.assert_array_equal(found.tensors["norm.weight"].read(), [1.5, -2] * 16)
    np.testing.assert_array_equal(
        found.tensors["blocks.1.mlp.fc1.weight"].read(), tensors["backbone.encoder.layer.1.mlp.fc1.weight"]
    )


def test_a_pickle_that_calls_anything_else_is_refused_and_not_run(tmp_path, torch):
    class Harm:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "harm"),)

    save(tmp_path / "a.pth", {"weight": np.zeros(3, np.float32), "harm": Harm()}, torch)
    with pytest.raises(CheckpointError, match=r"calls posix.mkdir, .*nothing was run. If you trust"):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "harm").exists()


def test_a_file_that_declares_more_than_it_has_is_refused_before_memory_is_used(tmp_path, torch):
    save(tmp_path / "whole.pth", {"a": np.zeros(2, np.float32)}, torch)
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[:-40])
    save(tmp_path / "packed.pth", {"a": np.zeros(9999, np.float32)}, torch, zipfile.ZIP_DEFLATED)
    write_safetensors(tmp_path / "short.safetensors", {"a": np.zeros(9, np.float32)})
    content = (tmp_path / "short.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[:-4])
    (tmp_path / "long.safetensors").write_bytes(content.replace(b'"shape": [9]', b'"shape": [9000000000000]'))
    (tmp_path / "header.safetensors").write_bytes(b"\xff" * 8)
    (tmp_path / "old.pt").write_bytes(b"\x80\x02\x8a")
    said = {
        "short.pth": "before 1.6",
        "old.pt": "before 1.6",
        "packed.pth": "compressed",
        "short.safetensors": "outside the file",
        "long.safetensors": "incomplete or no checkpoint",
        "header.safetensors": "header is longer",
        "nowhere.pth": "no file",
    }
    for name, words in said.items():
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(kind, tmp_path, torch):
    tensors = {"a": np.zeros((3, 4), np.float32), "b": np.ones(5, np.float16)}
    path = tmp_path / f"a.{kind}"
    if kind == "pth":
        save(path, {"teacher": OrderedDict(tensors), "more": [1, 2.5, None, True]}, torch)
    else:
        write_safetensors(path, tensors)
    content, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for number in range(300):
        damaged = bytearray(content)
        for place in random.integers(len(damaged), size=random.integers(1, 6)):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged if number % 5 else damaged[: random.integers(len(damaged))])
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_names_and_shapes_that_do_not_fit_are_listed(tmp_path):
    plain = tiny_checkpoints.weights("DINOv2")

    def refusal(tensors: dict[str, np.ndarray]) -> str:
        write_safetensors(tmp_path / "a.safetensors", tensors)
        with pytest.raises(CheckpointError) as error:
            read_published(tmp_path / "a.safetensors", HEADS)
        return str(error.value)

    more = plain | {"decoder.weight": np.zeros(3, np.float32)}
    assert "has weights that DINOv2S has not: decoder.weight" in refusal(more)
    fewer = {key: value for key, value in plain.items() if key != "layernorm.bias"}
    assert "lacks: norm.bias" in refusal(fewer)
    other = plain | {"layernorm.bias": np.zeros(33, np.float32)}
    assert "norm.bias (33,), not (32,)" in refusal(other)
    assert "no weights of DINOv2 or DINOv3" in refusal({"conv1.weight": np.zeros((8, 3, 7, 7), np.float32)})


PYTHON = os.environ.get("APLSMEAR_PARITY_PYTHON", "")


@pytest.mark.skipif(not PYTHON, reason="APLSMEAR_PARITY_PYTHON names no Python with torch (CONTRIBUTING.md)")
@pytest.mark.parametrize("name", [name for name in sorted(parity.cases(2)) if "DINOv2G" not in name])
def test_two_blocks_of_each_variant_give_the_features_of_the_published_implementation(name, tmp_path):
    start_tensorflow()
    found = parity.difference(parity.cases(2)[name], PYTHON, tmp_path)
    assert max(found.values()) < parity.LIMIT
