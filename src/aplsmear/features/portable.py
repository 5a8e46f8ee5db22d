"""ONNX operations of vision transformers with the same bits on every processor and for every batch.

Measured with ONNX Runtime 1.32: an AMD EPYC with AVX-512, 1 and 2 threads, against an emulated Haswell and an
emulated EPYC-Milan without it; several images in one call against one by one; 17 and 50 tokens, and a block
of DINOv2 S with 257.

- Same bits: MatMul (with weights, and of two activations), Add, Sub, Mul, Div, Exp, Erf, Sigmoid, Tanh, Sqrt,
  Pow, Reciprocal, Neg, LayerNormalization (also written out with ReduceMean), ReduceMax and ReduceMean over
  the last axis, GlobalAveragePool, Gemm, Split, Slice, Concat, Reshape, Transpose, Conv of patches.
- Other bits with AVX-512 than without: Softmax.
- Other bits for another batch: ReduceSum over the last axis, ReduceMean over the axis of tokens.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def softmax(x: str, output: str, length: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Write a softmax over the last axis without the operation Softmax. The sum is a product with ones.

    Args:
        x: name of the input.
        output: name of the result. Names of other tensors begin with it.
        length: size of the last axis.

    Returns:
        The nodes, in opset 18 or later, and their constants.
    """
    largest, shifted, raised, total = (f"{output}_{name}" for name in ("max", "shifted", "exp", "sum"))
    axis, ones = f"{output}_axis", f"{output}_ones"
    nodes = [
        helper.make_node("ReduceMax", [x, axis], [largest], keepdims=1),
        helper.make_node("Sub", [x, largest], [shifted]),
        helper.make_node("Exp", [shifted], [raised]),
        helper.make_node("MatMul", [raised, ones], [total]),
        helper.make_node("Div", [raised, total], [output]),
    ]
    constants = [
        numpy_helper.from_array(np.array([-1], np.int64), axis),
        numpy_helper.from_array(np.ones((length, 1), np.float32), ones),
    ]
    return nodes, constants
