"""A network for tests of what is around the network."""

import paddle

from model import NUM_BINS, conv_stage


class SmallNetwork(paddle.nn.Layer):
    """Reads and returns what CIC does, with 1/500 of its parameters: for tests of what is around the network."""

    def __init__(self, extra_relu=False):
        super().__init__()
        self.down = paddle.nn.Sequential(*(conv_stage(i, o, 1, stride=2) for i, o in ((1, 16), (16, 32), (32, 32))))
        self.up = paddle.nn.Conv2DTranspose(32, 32, 4, stride=2, padding=1)
        self.head = paddle.nn.Conv2D(32, NUM_BINS, 1)

    def forward(self, lightness):
        return self.head(self.up(self.down(lightness)))
