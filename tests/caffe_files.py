"""Write a network in the form of the authors' Caffe release, byte by byte as protobuf's documentation describes it."""

import numpy as np
import paddle
from paddle import nn

from model import CIC
from utils import TEMPERATURE, load_ab_bins


def varint(number):
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number, payload):
    """Return a length-delimited field: a message, a string or a packed array."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def write_caffe(path, layers):
    """Write {name: arrays}."""
    net = field(1, b"a network") + field(3, b"data_l")
    for name, arrays in layers.items():
        shapes = [field(7, field(1, b"".join(map(varint, array.shape)))) for array in arrays]
        blobs = [field(7, shape + field(5, array.astype("<f4").tobytes())) for shape, array in zip(shapes, arrays)]
        net += field(100, field(1, name.encode()) + field(2, b"Convolution") + b"".join(blobs))
    path.write_bytes(net)
    return path


@paddle.no_grad()
def flat_network(lightness, extra_relu=False, affine=False):
    """Return this network as a list of layers, with random weights and its batch norm statistics on these images.

    The earlier Paddle port has this form, with another ReLU before conv6.
    """
    paddle.seed(0)
    network, layers = CIC(), []
    for number in range(1, 9):
        layers += [nn.ReLU()] * (number == 6 and extra_relu)
        layers += getattr(network, f"conv{number}")
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2D):
            layer._momentum = 0.0  # the statistics are those of the last batch
            if affine:
                layer.weight.set_value(paddle.rand(layer.weight.shape) + 0.5)
                layer.bias.set_value(0.3 * paddle.randn(layer.bias.shape))
    flat = nn.Sequential(*layers, network.conv8_313)
    flat(paddle.to_tensor(lightness - 50))
    flat.eval()
    return flat


FACTOR = 999.98


def caffe_layers(network):
    """Return {name: arrays} of a `flat_network`, as in the authors' release."""
    layers = {"data_ab_ss": [np.ones((2, 1, 1, 1))]}  # a layer that only training needs
    for name, layer in _named(network):
        if isinstance(layer, nn.BatchNorm2D):
            mean, variance = layer._mean.numpy(), layer._variance.numpy()
            layers[name] = [FACTOR * mean, FACTOR * variance, np.array([FACTOR], np.float32)]
        elif not isinstance(layer, nn.ReLU):
            layers[name] = [layer.weight.numpy(), layer.bias.numpy()]
    layers["class8_ab"] = [load_ab_bins().numpy().T.reshape(2, 313, 1, 1)]  # which programs fill in
    return layers


def _named(network):
    """Return the layers of a `flat_network` with their names in the authors' release."""
    names = []
    for number, convs in enumerate((2, 2, 3, 3, 3, 3, 3), start=1):
        names += [f"conv{number}_{i}" for i in range(1, convs + 1)] + [f"conv{number}_{convs}norm"]
    names = iter(["bw_conv1_1", *names[1:], "conv8_1", "conv8_2", "conv8_3", "conv8_313"])
    return [(f"relu{i}" if isinstance(layer, nn.ReLU) else next(names), layer) for i, layer in enumerate(network)]


def prototxt(network, height, width):
    """Return the text part of the release, which describes those layers, from L - 50 to ab."""
    layers = []
    for name, layer in _named(network):
        if isinstance(layer, nn.ReLU):
            layers.append((name, "ReLU", ""))
        elif isinstance(layer, nn.BatchNorm2D):
            layers.append((name, "BatchNorm", "batch_norm_param { use_global_stats: true eps: 1e-5 }"))
        else:
            kind = "Convolution" if isinstance(layer, nn.Conv2D) else "Deconvolution"
            sizes = f"num_output: {layer._out_channels} kernel_size: {layer._kernel_size[0]} stride: {layer._stride[0]}"
            padding = f"pad: {layer._padding} dilation: {layer._dilation[0]}"
            layers.append((name, kind, f"convolution_param {{ {sizes} {padding} }}"))
    layers.append(("scaled", "Power", f"power_param {{ scale: {1 / TEMPERATURE} }}"))
    layers.append(("class8_313", "Softmax", ""))
    layers.append(("class8_ab", "Convolution", "convolution_param { num_output: 2 kernel_size: 1 bias_term: false }"))
    lines = ['input: "data_l"', f"input_shape {{ dim: 1 dim: 1 dim: {height} dim: {width} }}"]
    for (bottom, *_), (top, kind, parameters) in zip([("data_l",), *layers], layers):
        lines.append(f'layer {{ name: "{top}" type: "{kind}" bottom: "{bottom}" top: "{top}" {parameters} }}')
    return "\n".join(lines)


def run_by_opencv(caffemodel, network, height, width):
    """Return a function that predicts with OpenCV: L - 50 [1, 1, height, width] -> ab [1, 2, height/4, width/4].

    `network` is the `flat_network` whose weights are in the file.
    """
    import cv2

    text = np.frombuffer(prototxt(network, height, width).encode(), np.uint8)
    opencv = cv2.dnn.readNetFromCaffe(text, np.fromfile(caffemodel, np.uint8))

    def run(x):
        opencv.setInput(np.ascontiguousarray(x, np.float32), "data_l")
        return opencv.forward("class8_ab").copy()

    return run
