"""The benchmark of forward passes: which backbones it measures, and the arithmetic that it counts."""

from forward import backbones
from networks import gflop

from aplsmear.compute.runtime import start_tensorflow


def test_every_backbone_of_the_parameters_and_profiles_is_measured():
    names = {"demo/mobilenet", "demo/mobilenet_v2", "deepapl/mobilenet", "kaggle/efficientnet_b0"}
    assert names | {"kaggle/densenet121", "kaggle/mobilenet_v2", "mobilenet-64"} <= set(backbones())


def test_arithmetic_of_a_network_is_two_operations_per_weight_and_pixel():
    layers = start_tensorflow().keras.layers
    network = start_tensorflow().keras.Sequential(
        [
            layers.Input((8, 6, 4)),
            layers.Conv2D(16, 3, strides=2, padding="same"),
            layers.DepthwiseConv2D(5, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(7),
        ]
    )
    pixels = 4 * 3
    operations = 2 * (3 * 3 * 4 * 16 * pixels + 5 * 5 * 16 * pixels + 16 * 7)
    assert gflop(network) == operations / 1e9
