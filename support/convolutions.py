"""Convolutions in chunks, one per core.

Eager mode's convolution first copies the patches of its input on one core, then multiplies matrices on all cores. With
one chunk of the batch per core, all cores always work, and a training step takes about a tenth less time.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from support.cpu import available_cores

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

PART_PIXELS = 2**16  # measured: 16 crops of 64x64 pixels are as fast in one chunk as in two
CONVOLUTIONS = (nn.Conv2D, nn.Conv2DTranspose)


def parts_of_a_batch(images, pixels):
    """Return the best number of chunks for a batch of `images` images of `pixels` pixels each.

    A chunk of fewer than PART_PIXELS takes most of its time to read the weights, which all cores can share.
    """
    return max(1, min(available_cores(), images, images * pixels // PART_PIXELS))


def convolve_in_parts(network, count):
    """Let a network's convolutions process `count` chunks of each batch in parallel, forward and backward.

    This changes convolutions that stand alone or in an `nn.Sequential` of convolutions, a ReLU after each, and a batch
    norm at the end, which gets the whole batch. The state dict stays the same; results agree up to float32 rounding.
    """
    pool = ThreadPoolExecutor(count)  # for all layers and steps: each new thread would start OpenMP threads of its own
    for layer in network.sublayers():
        layers = list(layer.children()) if type(layer) is nn.Sequential else [layer]
        of_known_kinds = all(isinstance(x, (*CONVOLUTIONS, nn.ReLU, nn.BatchNorm2D)) for x in layers)
        if of_known_kinds and isinstance(layers[0], CONVOLUTIONS):
            layer.forward = partial(_run_in_parts, layers, count, pool)


def _run_in_parts(layers, count, pool, x):
    sizes = [len(part) for part in np.array_split(range(len(x)), min(count, len(x)))]  # as equal as possible
    parts = x.split(sizes)
    for i, layer in enumerate(layers):
        if isinstance(layer, CONVOLUTIONS):
            relu = isinstance(layers[i + 1], nn.ReLU) if i + 1 < len(layers) else False
            parts = _Convolution.apply(layer, relu, pool, layer.weight, layer.bias, *parts)
        elif isinstance(layer, nn.BatchNorm2D):
            return layer(paddle.concat(parts))
    return paddle.concat(parts)


class _Convolution(paddle.autograd.PyLayer):
    """A convolution, its bias and, with `relu`, a ReLU, for each chunk of a batch in a thread of its own.

    Each chunk has its own small graph, which begins at copies (of the same memory) of its input and the parameters, so
    that no two threads write to the same gradient in the backward pass.
    """

    @staticmethod
    def forward(ctx, layer, relu, pool, weight, bias, *parts):
        def compute(part):
            with paddle.enable_grad():
                inputs = [_same_memory(x) for x in (weight, bias, part)]
                return inputs, _convolve(layer, relu, *inputs)

        ctx.pool, ctx.graphs = pool, list(pool.map(compute, parts))
        return tuple(output.detach() for _, output in ctx.graphs)

    @staticmethod
    def backward(ctx, *gradients):
        def compute(graph, gradient):
            inputs, output = graph
            output.backward(gradient)
            return [x.grad for x in inputs]

        weights, biases, parts = zip(*ctx.pool.map(compute, ctx.graphs, gradients))
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
    y = y.flatten(2) + bias.unsqueeze(1)  # several times as fast as broadcasting [1, C, 1, 1]
    return (F.relu_(y) if relu else y).reshape(shape)
