"""Convolutions in chunks compute what plain ones do."""

from support.convolutions import convolve_in_parts

import paddle
import pytest
from paddle import nn

from model import conv_stage


class Network(nn.Layer):
    """Has all kinds of layers that are changed, and a batch norm and a ReLU of their own, which are not."""

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(conv_stage(1, 8, 2, stride=2), conv_stage(8, 16, 3, dilation=2))
        self.up = nn.Sequential(nn.Conv2DTranspose(16, 8, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2D(8, 8, 3))
        self.relu, self.norm, self.head = nn.ReLU(), nn.BatchNorm2D(8), nn.Conv2D(8, 4, 1)

    def forward(self, x):
        return self.head(self.norm(self.relu(self.up(self.stages(x)))))


def outcome(parts, images):
    """Return logits, gradients and batch norm statistics after a forward and a backward pass."""
    paddle.seed(0)
    network = Network()
    if parts:
        convolve_in_parts(network, parts)
    logits = network(25 * paddle.randn([images, 1, 32, 48]))
    ((logits - paddle.randn(logits.shape)) ** 2).mean().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if not p.stop_gradient}
    return {"logits": logits, **gradients, **network.state_dict()}


@pytest.mark.parametrize("parts, images", [(1, 2), (2, 5), (3, 2)])
def test_convolutions_in_chunks_train_like_plain_layers(parts, images):
    plain, in_parts = outcome(0, images), outcome(parts, images)
    assert plain.keys() == in_parts.keys() and len(plain) == 1 + 22 + 28  # logits, gradients, state dict
    for name, expected in plain.items():
        scale = float(expected.abs().max())
        difference = float((in_parts[name] - expected).abs().max())
        assert difference <= 2e-4 * scale, f"{name}: {difference} of {scale}"
