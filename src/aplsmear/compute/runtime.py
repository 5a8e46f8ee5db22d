"""What runs networks: ONNX Runtime for frozen ones, TensorFlow to build and to train them."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

from aplsmear.errors import UserError, brief

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # read when TensorFlow is imported; 0: all messages, 3: only fatal ones


def start_tensorflow(threads: int | None = None, *, gpus: bool = True) -> Any:
    """Import TensorFlow with deterministic kernels, print one line that names its devices; the module.

    Its own messages are not shown, unless its import fails or the environment sets TF_CPP_MIN_LOG_LEVEL: what
    goes wrong later is raised as an exception all the same. Another number of `threads` (None: one per core)
    changes the last bits of a training. A process that only builds networks needs no `gpus`: their memory is
    left to others.
    """
    quiet = os.environ.setdefault(_LOG_LEVEL, "3") == "3"
    # The first messages come before TensorFlow reads its level.
    with _held_back() if quiet else nullcontext():
        tf = _imported()
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
        where += f", though there is an NVIDIA driver (`export {_LOG_LEVEL}=0` shows why)"
    print(f"TensorFlow {tf.__version__} on {where}", file=sys.stderr)
    return tf


def _imported() -> Any:
    """TensorFlow, and Keras with its defaults in place of ~/.keras/keras.json, which all projects share."""
    try:
        import keras
        import tensorflow as tf
    except (AssertionError, AttributeError, ValueError) as error:  # on a file that they cannot use
        raise UserError(
            f"TensorFlow and Keras cannot be imported: {brief(error)}\n"
            "Correct or delete the file keras.json in ~/.keras, or in the folder that KERAS_HOME names."
        ) from None
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy("float32")
    return tf


@cache
def providers() -> list[str]:
    """What ONNX Runtime runs networks on: a GPU that works (package onnxruntime-gpu), else the CPU."""
    import onnxruntime

    if _CUDA in onnxruntime.get_available_providers():  # also where there is no GPU
        onnxruntime.preload_dlls()  # CUDA as TensorFlow brings it
        if _CUDA in _session_on(_CUDA).get_providers():
            return [_CUDA, _CPU]
    return [_CPU]


def _session_on(provider: str) -> Any:
    """A session with an empty network. ONNX Runtime takes the CPU where the provider does not work."""
    import onnxruntime
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "empty", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # only fatal messages
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider, _CPU])


def device() -> str:
    """The first of `providers` in short: CUDA or CPU."""
    return providers()[0].removesuffix("ExecutionProvider")


def device_note() -> str:
    """A line for the user of a GPU, on which features differ; else ''."""
    if device() == "CPU":
        return ""
    return f"Features are computed on a GPU ({device()}): their last digits differ from those of a CPU."


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
