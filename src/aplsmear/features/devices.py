"""What a network runs on, and how precisely: all GPUs of the machine, in half precision, if there are any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aplsmear.params import Precision


def machine_strategy() -> Any:
    """All GPUs that TensorFlow sees, each with its share of a batch; with one or none, no strategy at all."""
    import tensorflow as tf

    several = len(tf.config.list_logical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


@contextmanager
def precision_of(half: Precision) -> Iterator[None]:
    """Layers that are made in the block compute so; Keras must not be cleared in it, which would undo this.

    Args:
        half: `on`: half precision where a network is large (a GPU is twice as fast so), weights in float32;
            `off`: float32; `auto`: on, if there is a GPU.
    """
    import keras
    import tensorflow as tf

    before = keras.config.dtype_policy()
    wanted = half == "on" or (half == "auto" and tf.config.list_logical_devices("GPU"))
    keras.config.set_dtype_policy("mixed_float16" if wanted else "float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
