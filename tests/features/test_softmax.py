"""The softmax of vision transformers is right, and has the same bits for every batch."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from aplsmear.features.export import GraphWriter
from aplsmear.features.onnx_graph import PIXELS


def softmax_graph(length: int) -> bytes:
    """Pixels of images with this side, divided by 10, as rows of this length -> their softmax, flattened."""
    graph = GraphWriter()
    x = graph.node("Cast", [PIXELS], to=TensorProto.FLOAT)
    x = graph.node("Mul", [graph.reshaped(x, 0, -1, length), graph.constant(0.1)])
    graph.node("Flatten", [graph.softmax(x, length)], "y")
    return graph.model(length, ["y"]).SerializeToString()


@pytest.mark.parametrize("length", [1, 17, 50, 257])
def test_the_written_softmax_is_a_softmax_and_the_same_for_each_image_of_a_batch(length: int) -> None:
    session = onnxruntime.InferenceSession(softmax_graph(length), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(2).integers(0, 256, (3, length, length, 3)).astype(np.uint8)
    (found,) = session.run(None, {PIXELS: images})
    x = images.reshape(3, -1, length) * np.float64(np.float32(0.1))
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    expected = (raised / raised.sum(axis=-1, keepdims=True)).reshape(3, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
    for row in range(3):
        np.testing.assert_array_equal(session.run(None, {PIXELS: images[row : row + 1]})[0][0], found[row])
