"""TensorFlow, started the same way by every stage that runs a network."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def start_tensorflow(threads: int | None = None) -> Any:
    """Import TensorFlow, with deterministic kernels, and say in one line what it runs on.

    Its start-up chatter is kept back, and shown whole where something is wrong: the import fails, or the
    machine has an NVIDIA driver and TensorFlow sees no GPU.

    Args:
        threads: of its operations; None: as many as there are cores. Training gives other bits with other
            numbers, forward passes do not.

    Returns:
        The module.
    """
    with _kept_back() as chatter:
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if not gpus and shutil.which("nvidia-smi"):
            chatter.show = True
        if threads is not None and tf.config.threading.get_intra_op_parallelism_threads() != threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.experimental.enable_op_determinism()
        tf.constant(0)  # starts the devices
    where = ", ".join(gpu.name for gpu in gpus) if gpus else "CPU"
    print(f"TensorFlow {tf.__version__} on {where}", file=sys.stderr)
    return tf


def device() -> str:
    """What a started TensorFlow runs networks on: the names of its GPUs, or CPU."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    names = [str(tf.config.experimental.get_device_details(gpu).get("device_name")) for gpu in gpus]
    return ", ".join(names) or "CPU"


class _Chatter:
    show = False


@contextmanager
def _kept_back() -> Iterator[_Chatter]:
    """Keep what is written to file descriptor 2 (also by C++ code), and show it only if asked or failed."""
    chatter = _Chatter()
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield chatter
        except BaseException:
            chatter.show = True
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            if chatter.show:
                kept.seek(0)
                os.write(2, kept.read())
