"""The softmax of vision transformers is right, and has the same bits for every batch."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from aplsmear.features.portable import softmax


def softmax_graph(length: int) -> bytes:
    nodes, constants = softmax("x", "y", length)
    info = helper.make_tensor_value_info
    sides = ["n", length, length]
    graph = helper.make_graph(
        nodes,
        "softmax",
        [info("x", TensorProto.FLOAT, sides)],
        [info("y", TensorProto.FLOAT, sides)],
        constants,
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def scores(count: int, length: int) -> np.ndarray:
    return np.random.default_rng(2).normal(0, 30, (count, length, length)).astype(np.float32)


@pytest.mark.parametrize("length", [1, 17, 50, 257])
def test_the_portable_softmax_is_a_softmax_and_the_same_for_each_image_of_a_batch(length: int) -> None:
    session = onnxruntime.InferenceSession(softmax_graph(length), providers=["CPUExecutionProvider"])
    x = scores(3, length)
    (found,) = session.run(None, {"x": x})
    raised = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(found, raised / raised.sum(axis=-1, keepdims=True), rtol=1e-5, atol=1e-12)
    for row in range(3):
        np.testing.assert_array_equal(session.run(None, {"x": x[row : row + 1]})[0], found[row : row + 1])
