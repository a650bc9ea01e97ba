"""Networks for tests: a small one, and random ones whose outputs have a realistic scale."""

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


@paddle.no_grad()
def standardize(network, lightness):
    """Scale each convolution so that its outputs have mean 0 and variance 1 on these images, channel by channel.

    One forward pass is enough: each layer is scaled when the images reach it, so the next layer gets scaled inputs.
    """

    def rescale(layer, _, output):
        mean = output.mean(axis=[0, 2, 3])
        centered = output - mean.reshape([1, -1, 1, 1])
        scale = 1 / ((centered**2).mean(axis=[0, 2, 3]) + 1e-8).sqrt()
        transposed = isinstance(layer, paddle.nn.Conv2DTranspose)  # its weight is [in, out, k, k]
        layer.weight.set_value(layer.weight * scale.reshape([1, -1, 1, 1] if transposed else [-1, 1, 1, 1]))
        layer.bias.set_value((layer.bias - mean) * scale)
        return centered * scale.reshape([1, -1, 1, 1])

    convolutions = [x for x in network.sublayers() if isinstance(x, (paddle.nn.Conv2D, paddle.nn.Conv2DTranspose))]
    hooks = [layer.register_forward_post_hook(rescale) for layer in convolutions]
    network(lightness - 50)
    for hook in hooks:
        hook.remove()
