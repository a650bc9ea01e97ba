"""Write a network in the form of the authors' Caffe release, byte by byte as protobuf's documentation describes it."""

import numpy as np
import paddle
from paddle import nn

from utils import TEMPERATURE, load_ab_bins

STAGES = ((2, 64, 2, 1), (2, 128, 2, 1), (3, 256, 2, 1), (3, 512, 1, 1), (3, 512, 1, 2), (3, 512, 1, 2), (3, 512, 1, 1))


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


def flat_network(x, extra_relu=False, affine=False):
    """Return this network as a list of layers, with random weights and its batch norm statistics on x (L - 50).

    The earlier Paddle port has this form, with another ReLU before conv6.
    """
    paddle.seed(0)
    layers, width = [], 1
    for number, (convs, channels, stride, dilation) in enumerate(STAGES, start=1):
        layers += [nn.ReLU()] * (number == 6 and extra_relu)
        for i in range(convs):
            layers.append(nn.Conv2D(width, channels, 3, stride if i == convs - 1 else 1, dilation, dilation))
            layers.append(nn.ReLU())
            width = channels
        layers.append(nn.BatchNorm2D(channels, momentum=0.0))  # the statistics are those of the last batch
    layers += [nn.Conv2DTranspose(512, 256, 4, 2, 1), nn.ReLU(), nn.Conv2D(256, 256, 3, 1, 1), nn.ReLU()]
    layers += [nn.Conv2D(256, 256, 3, 1, 1), nn.ReLU(), nn.Conv2D(256, 313, 1)]
    for layer in layers:
        if isinstance(layer, (nn.Conv2D, nn.Conv2DTranspose)):
            fan_in = np.prod(layer.weight.shape) / layer.bias.shape[0]
            layer.weight.set_value(paddle.randn(layer.weight.shape) * (2 / fan_in) ** 0.5)
        elif isinstance(layer, nn.BatchNorm2D) and affine:
            layer.weight.set_value(paddle.rand(layer.weight.shape) + 0.5)
            layer.bias.set_value(0.3 * paddle.randn(layer.bias.shape))
    layers[0].weight.set_value(layers[0].weight / 30)  # the input, L - 50, is about that large
    network = nn.Sequential(*layers)
    with paddle.no_grad():
        network(paddle.to_tensor(x))
    network.eval()
    return network


FACTOR = 999.98


def caffe_layers(network):
    """Return {name: arrays} of a `flat_network`, as in the authors' release."""
    names = []
    for number, (convs, *_) in enumerate(STAGES, start=1):
        names += [f"conv{number}_{i}" for i in range(1, convs + 1)] + [f"conv{number}_{convs}norm"]
    names = ["bw_conv1_1", *names[1:], "conv8_1", "conv8_2", "conv8_3", "conv8_313"]
    layers = {"data_ab_ss": [np.ones((2, 1, 1, 1))]}  # a layer that only training needs
    for name, layer in zip(names, [layer for layer in network if not isinstance(layer, nn.ReLU)]):
        if isinstance(layer, nn.BatchNorm2D):
            mean, variance = layer._mean.numpy(), layer._variance.numpy()
            layers[name] = [FACTOR * mean, FACTOR * variance, np.array([FACTOR], np.float32)]
        else:
            layers[name] = [layer.weight.numpy(), layer.bias.numpy()]
    layers["class8_ab"] = [np.zeros((2, 313, 1, 1))]  # as released; programs fill it in
    return layers


def class8_ab():
    """Return the last layer, the bins as a 1x1 convolution, which the release leaves to the programs that use it."""
    return {"class8_ab": [load_ab_bins().numpy().T.reshape(2, 313, 1, 1)]}


def prototxt(height, width):
    """Return the text part of the release, which describes those layers, from L - 50 to ab."""
    shape = "".join(f" dim: {n}" for n in (1, 1, height, width))
    lines = ['name: "colorization"', 'input: "data_l"', f"input_shape {{{shape} }}"]
    top = "data_l"

    def add(kind, name, parameters="", in_place=False):
        nonlocal top
        bottom, top = top, top if in_place else name
        lines.append(f'layer {{ name: "{name}" type: "{kind}" bottom: "{bottom}" top: "{top}" {parameters} }}')

    def convolve(name, channels, size, kind="Convolution", stride=1, pad=0, dilation=1, bias="true"):
        numbers = f"num_output: {channels} kernel_size: {size} stride: {stride} pad: {pad} dilation: {dilation}"
        add(kind, name, f"convolution_param {{ {numbers} bias_term: {bias} }}")

    for number, (convs, channels, stride, dilation) in enumerate(STAGES, start=1):
        for i in range(1, convs + 1):
            name = f"conv{number}_{i}" if (number, i) != (1, 1) else "bw_conv1_1"
            convolve(name, channels, 3, stride=stride if i == convs else 1, pad=dilation, dilation=dilation)
            add("ReLU", f"relu{number}_{i}", in_place=True)
        add("BatchNorm", f"conv{number}_{convs}norm", "batch_norm_param { use_global_stats: true eps: 1e-5 }")
    convolve("conv8_1", 256, 4, kind="Deconvolution", stride=2, pad=1)
    add("ReLU", "relu8_1", in_place=True)
    for i in (2, 3):
        convolve(f"conv8_{i}", 256, 3, pad=1)
        add("ReLU", f"relu8_{i}", in_place=True)
    convolve("conv8_313", 313, 1)
    add("Power", "scaled", f"power_param {{ scale: {1 / TEMPERATURE} }}")
    add("Softmax", "class8_313")
    convolve("class8_ab", 2, 1, bias="false")
    return "\n".join(lines)


def run_by_opencv(caffemodel, height, width):
    """Return a function that predicts with OpenCV: L - 50 [1, 1, height, width] -> ab [1, 2, height/4, width/4]."""
    import cv2

    (caffemodel.parent / "colorization.prototxt").write_text(prototxt(height, width))
    network = cv2.dnn.readNetFromCaffe(str(caffemodel.parent / "colorization.prototxt"), str(caffemodel))

    def run(x):
        network.setInput(np.ascontiguousarray(x, np.float32), "data_l")
        return network.forward("class8_ab").copy()

    return run
