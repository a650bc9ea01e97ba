"""The colorization network of the paper (Zhang, Isola, Efros, ECCV 2016; Fig. 2 and Table 4).

A VGG-style stack of 3x3 convolutions that keeps a stride of 8 at its deepest (dilation takes the
place of further downsampling) and predicts, at a quarter of the input's resolution, a distribution
over the 313 bins of the ab plane.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import paddle
import paddle.nn.functional as F
from paddle import nn

NUM_BINS = 313
EXTRA_RELU = "extra_relu_ahead_of_conv6"  # the entry that marks a state dict of that variant

# -------------------------------------------------------------------------------------------------
# The network


def conv_stage(in_channels, channels, convs, stride=1, dilation=1):
    """`convs` 3x3 convolutions, a ReLU after each, batch norm at the end.

    The last convolution carries the stride. With `dilation` d the padding is d, so only the stride
    changes the size.
    """
    layers = []
    for i in range(convs):
        last = i == convs - 1
        layers.append(
            nn.Conv2D(
                in_channels if i == 0 else channels,
                channels,
                kernel_size=3,
                stride=stride if last else 1,
                padding=dilation,
                dilation=dilation,
            )
        )
        layers.append(nn.ReLU())
    layers.append(nn.BatchNorm2D(channels))
    return nn.Sequential(*layers)


class CIC(nn.Layer):
    """Lightness to logits over the ab bins; 32,240,377 parameters.

    Works for any batch size and any height and width that are multiples of 8.

    `extra_relu` makes it the network of an earlier Paddle port, for weights that were trained there: one more ReLU,
    directly ahead of conv6. The parameters are the same, so its state dict has an entry more that tells it apart.

    `parts`, for training on a CPU: how many parts of a batch are worked at side by side, a core for each; 0: Paddle's
    layers as they are. The results are the same but for float32's rounding.
    """

    parts = 0

    def __init__(self, extra_relu=False):
        super().__init__()
        self.extra_relu = extra_relu
        if extra_relu:
            self.register_buffer(EXTRA_RELU, paddle.ones([1]))
        self.conv1 = conv_stage(1, 64, convs=2, stride=2)
        self.conv2 = conv_stage(64, 128, convs=2, stride=2)
        self.conv3 = conv_stage(128, 256, convs=3, stride=2)
        self.conv4 = conv_stage(256, 512, convs=3)
        self.conv5 = conv_stage(512, 512, convs=3, dilation=2)
        self.conv6 = conv_stage(512, 512, convs=3, dilation=2)
        self.conv7 = conv_stage(512, 512, convs=3)
        self.conv8 = nn.Sequential(
            nn.Conv2DTranspose(512, 256, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2D(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2D(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
        )
        self.conv8_313 = nn.Conv2D(256, NUM_BINS, kernel_size=1)

    def forward(self, lightness):
        """[N, 1, H, W] of L - 50, L in [0, 100] -> logits [N, 313, H/4, W/4]."""
        run = self.run_in_parts if self.parts else lambda layers, x: layers(x)
        x = run(self.conv1, lightness)  #                                       [N, 64, H/2, W/2]
        x = run(self.conv2, x)  #                                               [N, 128, H/4, W/4]
        x = run(self.conv3, x)  #                                               [N, 256, H/8, W/8]
        x = run(self.conv4, x)  #                                               [N, 512, H/8, W/8]
        x = run(self.conv5, x)
        x = run(self.conv6, F.relu(x) if self.extra_relu else x)
        x = run(self.conv7, x)
        x = run(self.conv8, x)  #                                               [N, 256, H/4, W/4]
        return run(self.conv8_313, x)  #                                        [N, 313, H/4, W/4]

    def run_in_parts(self, layers, x):
        """The layers' output for x [N, C, H, W], with the batch in parts up to batch norm, which needs the whole."""
        layers = layers.sublayers() or [layers]
        parts = x.split(part_sizes(len(x), self.parts))
        for layer, after in zip(layers, [*layers[1:], None]):
            if isinstance(layer, (nn.Conv2D, nn.Conv2DTranspose)):
                relu = isinstance(after, nn.ReLU)
                parts = _Convolution.apply(layer, relu, layer.weight, layer.bias, *parts)
            elif isinstance(layer, nn.BatchNorm2D):
                return layer(paddle.concat(parts))
        return paddle.concat(parts)


# -------------------------------------------------------------------------------------------------
# Training on a CPU
#
# Eager mode's convolution first copies the patches that it sees, on one core, and multiplies matrices on all of them
# afterwards. With a part of the batch for each core all of them work all the time: a step takes a tenth less.


def part_sizes(images, parts):
    """Sizes of at most `parts` parts, as equal as can be."""
    parts = min(parts, images)
    return [images // parts + (i < images % parts) for i in range(parts)]


@cache
def threads(count):
    return ThreadPoolExecutor(count)


class _Convolution(paddle.autograd.PyLayer):
    """A convolution, its bias and, with `relu`, a ReLU of each of the parts of a batch, in threads, forth and back.

    Each part has a little graph of its own behind it, from copies (of the same memory) of input and parameters to
    output: the threads walk back through these and so share no gradient that two could write to.
    """

    @staticmethod
    def forward(ctx, layer, relu, weight, bias, *parts):
        def compute(part):
            with paddle.enable_grad():
                inputs = [_same_memory(x) for x in (weight, bias, part)]
                return inputs, _convolve(layer, relu, *inputs)

        ctx.graphs = list(threads(len(parts)).map(compute, parts))
        return tuple(output.detach() for _, output in ctx.graphs)

    @staticmethod
    def backward(ctx, *gradients):
        def compute(graph, gradient):
            inputs, output = graph
            output.backward(gradient)
            return [x.grad for x in inputs]

        weights, biases, parts = zip(*threads(len(gradients)).map(compute, ctx.graphs, gradients))
        del ctx.graphs
        return sum(weights[1:], weights[0]), sum(biases[1:], biases[0]), *parts


def _same_memory(tensor):
    copy = tensor.detach()
    copy.stop_gradient = tensor.stop_gradient
    return copy


def _convolve(layer, relu, weight, bias, x):
    convolve = F.conv2d_transpose if isinstance(layer, nn.Conv2DTranspose) else F.conv2d
    y = convolve(x, weight, None, stride=layer._stride, padding=layer._padding, dilation=layer._dilation)
    shape = y.shape
    y = y.flatten(2) + bias.unsqueeze(1)  # broadcast as [1, C, 1, 1] it takes several times as long
    return (F.relu_(y) if relu else y).reshape(shape)
