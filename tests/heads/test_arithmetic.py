"""The arithmetic of heads: gradients, steps, and the same bits on every processor."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from processors import INSTALL, can_emulate, output_of
from scipy.special import expit

from aplsmear.heads.arithmetic import (
    BETA1,
    BETA2,
    EPSILON,
    Bags,
    Network,
    activate,
    cross_entropy,
    sigmoid,
)
from aplsmear.heads.head import ACTIVATIONS, Job, TrainingItems, layer_sizes, score
from aplsmear.heads.stack import Material, train_heads
from recipes import BASE, weights_of


def network(depth: int, activation: str, attention: bool, lanes: int) -> Network:
    """A network with random weights in float64, so that differences of a loss are exact enough."""
    random = np.random.Generator(np.random.Philox(depth))
    made = Network(lanes, layer_sizes(depth, 4, 5), attention, activation)
    made._flat = [random.normal(size=flat.shape) * 0.7 for flat in made._flat]
    made._set_views()
    return made


@pytest.mark.parametrize("bags", [False, True], ids=["items", "bags"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_gradients_are_the_differences_of_the_loss(depth: int, activation: str, bags: bool) -> None:
    """With dropout and mixup, by central differences in each weight."""
    random = np.random.Generator(np.random.Philox(3))
    lanes, rows = (1, 9) if bags else (3, 6)
    made = network(depth, activation, bags and depth > 0, lanes)
    groups = Bags.of(np.array([4, 1, 3, 1])) if bags else None
    x = random.normal(size=(lanes, rows, 5))
    wanted = random.normal(size=(lanes, 4 if bags else rows))
    masks = [(random.random((lanes, rows, 4)) < 0.7) / 0.7 for _ in range(depth)]

    def mix(signal: np.ndarray) -> np.ndarray:
        return 0.8 * signal + 0.2 * signal[:, ::-1]

    def forward() -> Any:
        left = iter(masks)
        return made.forward(x, groups, None if bags else mix, lambda _: next(left))

    _, tape = forward()
    gradients = made.backward(wanted, tape, None if bags else mix)
    for weight, gradient in zip(made.weights, [each.copy() for each in gradients], strict=True):
        for place in np.ndindex(weight.shape):
            kept, losses = weight[place], []
            for change in (1e-5, -1e-5):
                weight[place] = kept + change
                losses.append((forward()[0] * wanted).sum())
            weight[place] = kept
            assert gradient[place] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_a_step_is_adamw_of_the_paper() -> None:
    """Loshchilov and Hutter 2019, algorithm 2: kernels decay, biases do not."""
    random = np.random.Generator(np.random.Philox(1))
    made = Network(2, layer_sizes(1, 3, 4), False, "relu")
    for flat in made._flat[:1]:
        flat[:] = random.normal(size=flat.shape)
    expected = [weight.astype(np.float64) for weight in made.weights]
    first = [np.zeros_like(weight) for weight in expected]
    second = [np.zeros_like(weight) for weight in expected]
    for step in range(1, 101):
        made._flat[1][:] = random.normal(size=made._flat[1].shape) * 10.0 ** random.integers(-6, 2)
        rate = 0.01 / step
        for place, gradient in enumerate(each.astype(np.float64) for each in made._gradients):
            first[place] = BETA1 * first[place] + (1 - BETA1) * gradient
            second[place] = BETA2 * second[place] + (1 - BETA2) * gradient**2
            corrected = np.sqrt(second[place] / (1 - BETA2**step)) + EPSILON
            expected[place] *= 1 - rate * 0.3 * (place % 2 == 0)
            expected[place] -= rate * first[place] / (1 - BETA1**step) / corrected
        made.step(rate, 0.3)
    for weight, wanted in zip(made.weights, expected, strict=True):
        np.testing.assert_allclose(weight, wanted, rtol=1e-4, atol=1e-5)


def test_dropped_lanes_change_no_other_lane() -> None:
    random = np.random.Generator(np.random.Philox(1))
    both, left = (Network(3, layer_sizes(1, 3, 4), False, "tanh") for _ in range(2))
    both._flat[0][:] = random.normal(size=both._flat[0].shape)
    left._flat[0][:] = both._flat[0]
    kept = np.array([True, False, True])
    x = random.normal(size=(3, 7, 4)).astype(np.float32)
    for step in range(4):
        if step == 2:
            left.keep(kept)
        for made, mine in ((both, x), (left, x if step < 2 else x[kept])):
            logits, tape = made.forward(mine)
            made.backward(logits, tape)
            made.step(0.01, 0.1)
    for one, other in zip(both.weights, left.weights, strict=True):
        assert one[kept].tobytes() == other.tobytes()


def test_activations_and_losses_are_those_of_the_literature() -> None:
    z = np.linspace(-6, 6, 101).astype(np.float32)
    gelu = z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2
    for activation, expected in (("relu", np.maximum(z, 0)), ("tanh", np.tanh(z)), ("gelu", gelu)):
        np.testing.assert_allclose(activate(z, activation)[0], expected, atol=1e-6)
    np.testing.assert_allclose(sigmoid(z), expit(z), rtol=1e-6)
    for label in (0, 1):
        exact = np.logaddexp(0, z.astype(np.float64)) - label * z
        np.testing.assert_allclose(cross_entropy(z, np.full(z.shape, label)), exact, rtol=1e-5, atol=1e-6)
    far = np.array([-1e4, 1e4], np.float32)
    assert sigmoid(far).tolist() == [0, 1]
    assert cross_entropy(far, np.array([0, 1])).tolist() == [0, 0]


def digest() -> str:
    """A hash of heads of each kind and of their scores, with features that BLAS cuts into odd blocks."""
    random = np.random.Generator(np.random.Philox(7))
    label = (np.arange(90) % 3 == 0).astype(np.int8)
    x = (random.normal(size=(90, 83)) + label[:, None] * 0.3).astype(np.float16)
    one = np.ones(90, np.int64)
    items = TrainingItems(np.arange(90), 0 * one, one, label, np.arange(90) % 4)
    bags = TrainingItems(np.arange(90), 0 * one, one[:30], label[:30], np.arange(30) % 4, 3 * one[:30])
    recipes = [
        replace(BASE, depth=depth, activation=activation, width=19, dropout=0.3, mixup=0.2, smoothing=0.1)
        for depth, activation in ((0, "relu"), (1, "gelu"), (2, "tanh"), (2, "relu"))
    ]
    jobs = [Job(number, recipe, frozenset({1})) for number, recipe in enumerate(recipes)]
    single, many = (train_heads(jobs, Material({"net/layer": x}, each, 3, 64, 3)) for each in (items, bags))
    parts = [part.tobytes() for head in single + many for part in weights_of(head)]
    parts += [score(head, x, np.arange(77)).tobytes() for head in single]
    return hashlib.sha256(b"".join(parts)).hexdigest()


ELSEWHERE = "import aplsmear, test_arithmetic; print(test_arithmetic.digest())"


def test_the_same_bits_in_another_process_with_other_settings_of_threads_and_kernels() -> None:
    loud = {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "SkylakeX"}
    loud |= {"NPY_DISABLE_CPU_FEATURES": ""}
    assert output_of(ELSEWHERE, **loud) == digest()


@pytest.mark.pipeline
@pytest.mark.skipif(not can_emulate(), reason=INSTALL)
@pytest.mark.parametrize("processor", ["Haswell", "EPYC", "Skylake-Client"])
def test_the_same_bits_on_other_processors(processor: str) -> None:
    """An Intel and an AMD processor of the first generation with AVX2, and one without AVX-512 since."""
    assert output_of(ELSEWHERE, processor=processor) == digest()
