"""Write a network in the form of the authors' Caffe release, byte by byte as protobuf's documentation describes it."""

import numpy as np
import paddle
import paddle.nn.functional as F

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


FACTOR = 999.98


def caffe_network(x):
    """Return layers with random weights, with their statistics on x (L - 50), and the logits."""
    random = np.random.default_rng(0)
    layers = {"data_ab_ss": [np.ones((2, 1, 1, 1))]}  # a layer that only training needs

    def convolve(name, x, out, size, transposed=False, **options):
        shape = (x.shape[1], out, size, size) if transposed else (out, x.shape[1], size, size)
        gain = 4 if transposed else 1
        fan_in = x.shape[1] * size * size / gain
        weight = random.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)
        bias = random.normal(0, 0.1, out).astype(np.float32)
        layers[name] = [weight, bias]
        function = F.conv2d_transpose if transposed else F.conv2d
        return function(x, paddle.to_tensor(weight), paddle.to_tensor(bias), **options)

    x = paddle.to_tensor(x / 30)
    for number, (convs, channels, stride, dilation) in enumerate(STAGES, start=1):
        for i in range(1, convs + 1):
            name = f"conv{number}_{i}" if (number, i) != (1, 1) else "bw_conv1_1"
            options = {"stride": stride if i == convs else 1, "padding": dilation, "dilation": dilation}
            x = F.relu(convolve(name, x, channels, 3, **options))
        mean, variance = x.mean(axis=[0, 2, 3]), x.var(axis=[0, 2, 3], unbiased=False)
        layers[f"conv{number}_{convs}norm"] = [
            *(FACTOR * mean.numpy(), FACTOR * variance.numpy(), np.array([FACTOR], np.float32)),
        ]
        x = (x - mean.reshape([1, -1, 1, 1])) / (variance.reshape([1, -1, 1, 1]) + 1e-5).sqrt()
    x = F.relu(convolve("conv8_1", x, 256, 4, transposed=True, stride=2, padding=1))
    x = F.relu(convolve("conv8_3", F.relu(convolve("conv8_2", x, 256, 3, padding=1)), 256, 3, padding=1))
    logits = convolve("conv8_313", x, 313, 1)
    layers["bw_conv1_1"][0] /= 30  # instead of the input
    layers["class8_ab"] = [np.zeros((2, 313, 1, 1))]  # as released; programs fill it in
    return layers, logits.numpy()


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
