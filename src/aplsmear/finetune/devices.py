"""The devices and the precision of TensorFlow networks: all GPUs in half precision, or the CPU in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aplsmear.params import Precision


def machine_strategy() -> Any:
    """TensorFlow's distribution strategy: with several GPUs each computes a part of a batch.

    Returns:
        tf.distribute.MirroredStrategy with several GPUs, otherwise the current strategy.
    """
    import tensorflow as tf

    several = len(tf.config.list_logical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


@contextmanager
def precision_of(half: Precision) -> Iterator[None]:
    """Set the precision of Keras layers that are created in the block.

    Do not clear the Keras session in the block: this would reset the precision.

    Args:
        half: ``on``: computes in float16 and keeps weights in float32, which is twice as fast on a GPU;
            ``off``: float32; ``auto``: on if there is a GPU.
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
