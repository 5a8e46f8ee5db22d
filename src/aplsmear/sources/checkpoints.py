"""Tensors of PyTorch checkpoints (.pth, .pt) and safetensors files, without PyTorch and without running code.

A .pth file is a zip with a pickle and raw numbers. A pickle can run any program. So it is not unpickled:
its instructions are read, and those that build dictionaries, lists and tensors are carried out here. Any
other instruction, and any other class or function that the pickle names, is refused.

A safetensors file is a JSON header and raw numbers. It is read here, because the package `safetensors` has no
NumPy dtype for bfloat16, in which DINOv3 may come.
"""

from __future__ import annotations

import json
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aplsmear.errors import UserError, brief

_HEADER = 2**26  # largest number of bytes of a header or pickle: names and shapes only
_DEEP = 6  # largest number of dictionaries inside one another
_PLACES = ("teacher", "state_dict", "model", "module")  # names of the network in a training checkpoint
_DAMAGE = (  # what a file that is damaged, or made to do harm, makes the readers raise
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_BFLOAT16 = "bfloat16"  # unknown to NumPy: the upper half of a float32
_STORAGES = {
    "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": _BFLOAT16, "DoubleStorage": "<f8",
    "LongStorage": "<i8", "IntStorage": "<i4", "BoolStorage": "|b1",
}  # fmt: skip
_SAFE = {
    "F32": "<f4", "F16": "<f2", "BF16": _BFLOAT16, "F64": "<f8", "I64": "<i8", "I32": "<i4", "BOOL": "|b1",
}  # fmt: skip


class CheckpointError(UserError, ValueError):
    """A file is no checkpoint that can be read safely; the message says why and what to do."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint; `read` reads its numbers, as float32 of this shape."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a network, by name. All sizes are checked against the file before memory is used.

    Of a checkpoint of a training (``{"teacher": {...}}``) the network is taken.

    Raises:
        CheckpointError: no such file, another format, an incomplete file, or a pickle that does more than
            build tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix in (".pth", ".pt", ".bin"):
            return _network_of(_read_zip(path), path)
    except _DAMAGE as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{str(path)!r} is incomplete or no checkpoint ({brief(error)}): download it again"
        ) from error
    raise CheckpointError(f"{str(path)!r} is no .safetensors, .pth or .pt file")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER, size - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    found = {}
    for name, row in header.items():
        if name == "__metadata__":
            continue
        start, end = row["data_offsets"]
        shape, dtype = tuple(row["shape"]), _SAFE[row["dtype"]]
        if not 0 <= start <= end <= size - 8 - length or end - start != _bytes(shape, dtype):
            raise ValueError(f"{name} lies outside the file, or has another size than its shape")
        found[name] = Tensor(shape, _reader(path, 8 + length + start, shape, dtype))
    return found


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"a shape is {shape}")
    return math.prod(shape) * (2 if dtype == _BFLOAT16 else np.dtype(dtype).itemsize)


def _reader(path: Path, start: int, shape: tuple[int, ...], dtype: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        raw = np.dtype("<u2" if dtype == _BFLOAT16 else dtype)
        values = np.fromfile(path, raw, math.prod(shape), offset=start).reshape(shape)
        if dtype == _BFLOAT16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    return read


# --- pickles of PyTorch -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """A class or function that a pickle names; it is never imported."""

    name: str


@dataclass(frozen=True)
class _Storage:
    path: Path
    start: int
    count: int
    dtype: str


def _read_zip(path: Path) -> Any:
    """What the pickle of a .pth file describes: dictionaries, lists, numbers, `Tensor`."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{str(path)!r} is incomplete, or was saved by PyTorch before 1.6: download it again, or load it "
            "with a newer PyTorch and save it"
        )
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (each for each in archive.infolist() if each.filename.endswith("data.pkl"))
        if max(pickled.file_size, pickled.compress_size) > _HEADER:
            raise ValueError("its pickle is too large")
        root = pickled.filename.removesuffix("data.pkl")
        entries = {each.filename.removeprefix(root): each for each in archive.infolist()}
        content = archive.read(pickled)
        size = path.stat().st_size

        def storage(described: Any) -> _Storage:
            kind, dtype, key, _, count = described
            entry, stored = entries[f"data/{key}"], _STORAGES[dtype.name.rsplit(".", 1)[-1]]
            if kind != "storage" or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("numbers are compressed, which PyTorch does not do")
            with path.open("rb") as file:  # the local header before the numbers: 30 bytes, name, extra field
                file.seek(entry.header_offset + 26)
                start = entry.header_offset + 30 + sum(np.frombuffer(file.read(4), "<u2").tolist())
            if _bytes((count,), stored) != entry.file_size or start + entry.file_size > size:
                raise ValueError(f"storage {key} has another size than declared")
            return _Storage(path, start, count, stored)

        return _built(content, storage)


def _rebuilt(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    """A tensor in its storage, as `torch._utils._rebuild_tensor_v2`; only contiguous ones are written."""
    shape, strides = tuple(shape), tuple(strides)
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    wrong = [s for side, s, e in zip(shape, strides, expected, strict=True) if side != 1 and s != e]
    if wrong:
        raise ValueError("a tensor is no block of its storage")
    if type(offset) is not int or offset < 0 or _bytes(shape, "|b1") + offset > storage.count:
        raise ValueError(f"a tensor of shape {shape} is larger than its storage")
    start = storage.start + _bytes((offset,), storage.dtype)
    return Tensor(shape, _reader(storage.path, start, shape, storage.dtype))


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}
_NAMES = _CALLS.keys() | {f"torch.{name}" for name in _STORAGES}
_VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
)
_MARK = object()
_SAVE = (
    "nothing was run. If you trust the file, load it with PyTorch elsewhere and save its state_dict alone "
    "(torch.save or safetensors)"
)


def _built(content: bytes, storage: Callable[[Any], _Storage]) -> Any:
    """What a pickle describes: its instructions that build data are carried out, any other is refused."""
    stack: list[Any] = []
    memory: dict[int, Any] = {}
    push = stack.append

    def call() -> None:
        arguments, function = stack.pop(), stack.pop()
        push(_CALLS[function.name](*arguments))

    def update(items: list[Any]) -> None:
        stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def keep(number: int | None) -> None:
        memory[len(memory) if number is None else number] = stack[-1]

    do: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
        **dict.fromkeys(_VALUES, push),
        **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), keep),
        **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda number: push(memory[number])),
        "NONE": lambda _: push(None),
        "NEWTRUE": lambda _: push(True),
        "NEWFALSE": lambda _: push(False),
        "EMPTY_DICT": lambda _: push({}),
        "EMPTY_LIST": lambda _: push([]),
        "EMPTY_TUPLE": lambda _: push(()),
        "MARK": lambda _: push(_MARK),
        "TUPLE1": lambda _: push((stack.pop(),)),
        "TUPLE2": lambda _: push((stack.pop(-2), stack.pop())),
        "TUPLE3": lambda _: push((stack.pop(-3), stack.pop(-2), stack.pop())),
        "TUPLE": lambda _: push(tuple(_after_mark(stack))),
        "GLOBAL": lambda words: push(_global(words.replace(" ", "."))),
        "STACK_GLOBAL": lambda _: push(_global(f"{stack.pop(-2)}.{stack.pop()}")),
        "BINPERSID": lambda _: push(storage(stack.pop())),
        "REDUCE": lambda _: call(),
        "BUILD": lambda _: stack.pop(),  # the attribute `_metadata` of a state dictionary
        "SETITEM": lambda _: update([stack.pop(-2), stack.pop()]),
        "SETITEMS": lambda _: update(_after_mark(stack)),
        "APPEND": lambda _: stack[-2].append(stack.pop()),
        "APPENDS": lambda _: stack[-1].extend(_after_mark(stack)),
    }
    for code, argument, _ in pickletools.genops(content):
        if code.name not in do:
            raise CheckpointError(
                f"the file's pickle has the instruction {code.name}, which no weights need: {_SAVE}"
            )
        do[code.name](argument)
    return stack.pop()


def _after_mark(stack: list[Any]) -> list[Any]:
    """Take the values above the last mark from the stack."""
    place = len(stack) - 1 - stack[::-1].index(_MARK)
    found = stack[place + 1 :]
    del stack[place:]
    return found


def _global(name: str) -> _Global:
    """One of the few classes and functions that weights need; none of them is imported."""
    if name not in _NAMES:
        raise CheckpointError(f"the file's pickle calls {name}, which no weights need: {_SAVE}")
    return _Global(name)


def _network_of(found: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in a checkpoint."""
    for _ in range(_DEEP):
        if not isinstance(found, Mapping):
            break
        tensors = {str(name): each for name, each in found.items() if isinstance(each, Tensor)}
        if tensors:
            return tensors
        places = [name for name in _PLACES if isinstance(found.get(name), Mapping)]
        if not places:
            names = ", ".join(map(str, list(found)[:8]))
            raise CheckpointError(f"{str(path)!r} has no state_dict; it has: {names or 'nothing'}")
        found = found[places[0]]
    raise CheckpointError(f"{str(path)!r} has no dictionary of tensors")
