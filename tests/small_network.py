"""A small network for tests."""

import paddle

from model import HEADS, conv_stage


class SmallNetwork(paddle.nn.Layer):
    """Has the inputs, outputs and heads of CIC and 1/500 of its parameters."""

    def __init__(self, head="conv8_313"):
        super().__init__()
        self.down = paddle.nn.Sequential(*(conv_stage(i, o, 1, stride=2) for i, o in ((1, 16), (16, 32), (32, 32))))
        self.up = paddle.nn.Conv2DTranspose(32, 32, 4, stride=2, padding=1)
        self.head = head
        self.add_sublayer(head, paddle.nn.Conv2D(32, HEADS[head], 1))

    def forward(self, lightness):
        return getattr(self, self.head)(self.up(self.down(lightness)))
