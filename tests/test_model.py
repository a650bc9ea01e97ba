"""The network's shape, parameter count and layout."""

import numpy as np
import paddle
import pytest
from paddle import nn

from model import CIC


@pytest.fixture(scope="module")
def network():
    paddle.seed(0)
    network = CIC()
    network.eval()
    return network


def test_network_has_the_published_number_of_parameters(network):
    assert sum(int(np.prod(p.shape)) for p in network.parameters()) == 32_240_377


def test_network_for_regression_differs_in_its_head():
    network = CIC("conv8_ab")
    assert sum(int(np.prod(p.shape)) for p in network.parameters()) == 32_240_377 - 311 * (256 + 1)
    assert [name for name, _ in network.named_parameters()][-2:] == ["conv8_ab.weight", "conv8_ab.bias"]
    with paddle.no_grad():
        assert network(paddle.zeros([2, 1, 16, 24])).shape == [2, 2, 4, 6]


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 40, 72)])
def test_output_has_a_quarter_of_the_input_size(network, size):
    n, h, w = size
    with paddle.no_grad():
        assert network(paddle.zeros([n, 1, h, w])).shape == [n, 313, h // 4, w // 4]


# Channels, convolutions, stride of the last one, and dilation
STAGES = [(64, 2, 2, 1), (128, 2, 2, 1), (256, 3, 2, 1), (512, 3, 1, 1), (512, 3, 1, 2), (512, 3, 1, 2), (512, 3, 1, 1)]


def test_layers_follow_the_table_of_the_paper(network):
    for i, (channels, count, stride, dilation) in enumerate(STAGES, 1):
        *layers, norm = getattr(network, f"conv{i}")
        found = [(layer.weight.shape[0], layer._stride[0], layer._dilation[0]) for layer in layers[::2]]
        assert found == [(channels, 1, dilation)] * (count - 1) + [(channels, stride, dilation)]
        assert all(isinstance(layer, nn.ReLU) for layer in layers[1::2]) and isinstance(norm, nn.BatchNorm2D)
    assert network.conv8[0].weight.shape == [512, 256, 4, 4] and network.conv8_313.weight.shape == [313, 256, 1, 1]
