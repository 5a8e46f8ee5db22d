"""What runs networks: ONNX Runtime for frozen ones, TensorFlow to build and to train them."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # read when TensorFlow is imported; 0: all messages, 3: only fatal ones


def start_tensorflow(threads: int | None = None, *, gpus: bool = True) -> Any:
    """Import TensorFlow with deterministic kernels, and print one line that names its devices.

    TensorFlow's own messages are not shown, unless its import fails or the environment sets
    TF_CPP_MIN_LOG_LEVEL: what goes wrong later is raised as an exception all the same.

    Args:
        threads: of TensorFlow's operations; None: as many as there are cores. Another number changes the last
            bits of a training.
        gpus: whether it may use GPUs; a process that only builds networks leaves their memory to others.

    Returns:
        The module.
    """
    quiet = os.environ.setdefault(_LOG_LEVEL, "3") == "3"
    with (
        _held_back() if quiet else nullcontext()
    ):  # the first messages come before TensorFlow reads its level
        import tensorflow as tf

        if not gpus:
            tf.config.set_visible_devices([], "GPU")
        found = tf.config.get_visible_devices("GPU")
        if threads is not None and tf.config.threading.get_intra_op_parallelism_threads() != threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.experimental.enable_op_determinism()
        tf.constant(0)  # starts the devices
    where = ", ".join(gpu.name for gpu in found) or "CPU"
    if gpus and not found and shutil.which("nvidia-smi"):
        where += f", though there is an NVIDIA driver (`export {_LOG_LEVEL}=0`: then TensorFlow says why)"
    print(f"TensorFlow {tf.__version__} on {where}", file=sys.stderr)
    return tf


def providers() -> list[str]:
    """What ONNX Runtime runs networks on: a GPU (with the package onnxruntime-gpu), else the CPU."""
    import onnxruntime

    there = onnxruntime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]


def device() -> str:
    """The first of `providers` in short: CUDA or CPU."""
    return providers()[0].removesuffix("ExecutionProvider")


@contextmanager
def _held_back() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, also by C++ code; show it if the block fails."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(saved, kept.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
