"""Converted weights give the output of the networks that they were made for, which are built here in their layouts.

The authors' files are not available here. Random weights replace them, with the batch norm statistics that they have on
images, and with the releases' scales of input and output, temperature and file formats.
"""

import hashlib
import importlib.util
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.checkpoints import load_checkpoint, load_weights, save_checkpoint, save_safetensors
from support.cli import UserError

import numpy as np
import paddle
import pytest
import skimage.color
import skimage.data
import skimage.transform
from caffe_files import STAGES, caffe_network, class8_ab, field, run_by_opencv, varint, write_caffe
from paddle import nn

import pretrained
from colorizer import Colorizer
from model import CIC
from pretrained import EXTRA_RELU, PortCIC, load_network
from resources import convert_weights
from utils import annealed_mean, load_ab_bins

SIDE = 64
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")


@pytest.fixture(scope="module")
def lightness():
    """Return the lightness of four images, computed by scikit-image: float32 [4, 1, SIDE, SIDE] in [0, 100]."""
    names = ("astronaut", "coffee", "chelsea", "rocket")
    photos = [
        skimage.transform.resize(getattr(skimage.data, name)(), (SIDE, SIDE), anti_aliasing=True) for name in names
    ]
    return np.stack([skimage.color.rgb2lab(photo)[None, :, :, 0] for photo in photos]).astype(np.float32)


@pytest.fixture
def convert(tmp_path):
    """Run the script on a file. Return the logits of the network that it wrote."""

    def run(source, lightness, *options):
        path = tmp_path / "epoch_converted_model.pdparams"
        convert_weights.main(convert_weights.parse_args([str(source), str(path), *options]))
        return logits_of(load_network(path), lightness - 50)

    return run


def read_and_run(source, lightness):
    """Return the logits of the network in a file, without converting it."""
    return logits_of(pretrained.read_network(source)[0], lightness - 50)


@paddle.no_grad()
def logits_of(network, x):
    network.eval()
    return network(paddle.to_tensor(x)).numpy()


def ab_map(logits):
    return annealed_mean(paddle.to_tensor(logits), load_ab_bins()).numpy()


def expected_ab(logits, temperature):
    """Compute the mean over the bins in float64, in one line of NumPy."""
    likelihood = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    return np.einsum("nqhw,qc->nchw", likelihood / likelihood.sum(axis=1, keepdims=True), load_ab_bins().numpy())


def assert_agree(ours, theirs):
    """Compare logits to 1e-4 of their largest; they must also differ between positions, or little would be shown."""
    assert theirs.std() > 0.5 and theirs.std(axis=(2, 3)).mean() > 0.2
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


# -------------------------------------------------------------------------------------------------
# The authors' PyTorch release


def official_module():
    """Build a network with the layout of the authors' eccv16 and random weights."""
    import torch

    class Colorizer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            width = 1
            for number, (convs, channels, stride, dilation) in enumerate(STAGES, start=1):
                layers = []
                for i in range(convs):
                    step = stride if i == convs - 1 else 1
                    layers += [torch.nn.Conv2d(width, channels, 3, step, dilation, dilation), torch.nn.ReLU()]
                    width = channels
                self.add_module(f"model{number}", torch.nn.Sequential(*layers, torch.nn.BatchNorm2d(channels)))
            layers = [torch.nn.ConvTranspose2d(512, 256, 4, 2, 1), torch.nn.ReLU()]
            layers += [torch.nn.Conv2d(256, 256, 3, 1, 1), torch.nn.ReLU()]
            layers += [torch.nn.Conv2d(256, 256, 3, 1, 1), torch.nn.ReLU()]
            self.model8 = torch.nn.Sequential(*layers, torch.nn.Conv2d(256, 313, 1))
            self.model_out = torch.nn.Conv2d(313, 2, 1, bias=False)

        def forward(self, lightness):
            x = (lightness - 50) / 100
            for number in range(1, 9):
                x = getattr(self, f"model{number}")(x)
            return x, self.model_out(torch.softmax(x, dim=1)) * 110

    torch.manual_seed(0)
    network = Colorizer()
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the statistics are the average of the passes below
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.3)
    network.model8[6].weight.data *= 4  # logits as decided as a trained network's
    network.model_out.weight.data = torch.tensor(load_ab_bins().numpy().T.reshape(2, 313, 1, 1) / 110).contiguous()
    return network


@pytest.fixture(scope="module")
def official(lightness, tmp_path_factory):
    """Return the release as a file, its logits and its ab map."""
    torch = pytest.importorskip("torch")
    network, x = official_module(), torch.tensor(lightness)
    with torch.no_grad():
        network.train()(x)
        logits, ab = network.eval()(x)
    path = tmp_path_factory.mktemp("official") / "colorization_release.pth"
    torch.save(network.state_dict(), path)
    return path, logits.numpy(), ab.numpy()


@needs_torch
@pytest.mark.parametrize(("options", "scale"), [((), 0.38), (("--head_temperature", "1"), 1)])
def test_official_release_gives_the_colors_of_the_authors(official, lightness, convert, options, scale):
    """The authors use no temperature, so the head is scaled by 0.38 unless the option says otherwise."""
    path, logits, ab = official
    ours = convert(path, lightness, *options)
    assert_agree(ours, scale * logits)
    np.testing.assert_allclose(ab_map(ours), ab if scale == 0.38 else expected_ab(logits, 0.38), atol=0.05)
    assert ab.std() > 5  # they are colors


def replace(name, function):
    return lambda state: state.update({name: function(state[name])})


CHANGES = {  # to the release's state dict, and the message
    "order of bins": (replace("model_out.weight", lambda w: w.flip(1)), "model_out does not contain pts_in_hull.npy's"),
    "number of bins": (replace("model_out.weight", lambda w: w[:, :300]), "does not contain pts_in_hull.npy's bins"),
    "missing": (lambda state: state.pop("model3.6.running_var"), "missing or unknown: model3.6.running_var$"),
    "unknown": (lambda state: state.update({"x.weight": state["model1.0.bias"]}), "missing or unknown: x.weight$"),
    "shape": (replace("model2.0.weight", lambda w: w[:, :1]), r"conv2.0.weight is float \[128, 1, "),
    "NaN": (replace("model4.0.weight", lambda w: w * float("nan")), "not finite.*conv4.0.weight"),
    "integers": (replace("model5.0.bias", lambda w: w.long()), "not an array of floats: model5.0.bias"),
    "text": (replace("model5.0.bias", lambda w: "text"), "not an array of floats: model5.0.bias"),
}


@needs_torch
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_official_release_is_refused(official, tmp_path, error_message, kind):
    import torch

    change, message = CHANGES[kind]
    state = torch.load(official[0], weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    assert re.search(message, error_message(pretrained.read_network, tmp_path / "changed.pth"))


# -------------------------------------------------------------------------------------------------
# The earlier Paddle port


class PortNetwork(nn.Layer):
    def __init__(self, layers):
        super().__init__()
        self.features = nn.Sequential(*layers)

    def forward(self, lightness):
        return self.features(lightness)


def port_network(extra_relu=True):
    """Build one flat Sequential, with the port's ReLU between the batch norm of conv5 and conv6."""
    paddle.seed(0)
    layers, width = [], 1
    for number, (convs, channels, stride, dilation) in enumerate(STAGES, start=1):
        if number == 6 and extra_relu:
            layers.append(nn.ReLU())
        for i in range(convs):
            layers.append(nn.Conv2D(width, channels, 3, stride if i == convs - 1 else 1, dilation, dilation))
            layers.append(nn.ReLU())
            width = channels
        layers.append(nn.BatchNorm2D(channels, momentum=0.0))
    layers += [nn.Conv2DTranspose(512, 256, 4, 2, 1), nn.ReLU(), nn.Conv2D(256, 256, 3, 1, 1), nn.ReLU()]
    layers += [nn.Conv2D(256, 256, 3, 1, 1), nn.ReLU(), nn.Conv2D(256, 313, 1)]
    network = PortNetwork(layers)
    for layer in layers:
        if isinstance(layer, (nn.Conv2D, nn.Conv2DTranspose)):
            fan_in = np.prod(layer.weight.shape) / layer.bias.shape[0]
            layer.weight.set_value(paddle.randn(layer.weight.shape) * (2 / fan_in) ** 0.5)
        elif isinstance(layer, nn.BatchNorm2D):
            layer.weight.set_value(paddle.rand(layer.weight.shape) + 0.5)
            layer.bias.set_value(0.3 * paddle.randn(layer.bias.shape))
    layers[0].weight.set_value(layers[0].weight / 30)  # the input, L - 50, is about that large
    return network


@pytest.fixture(scope="module")
def port(lightness, tmp_path_factory):
    """Return the port's checkpoint, its logits and its state."""
    network, x = port_network(), lightness - 50
    with paddle.no_grad():
        network(paddle.to_tensor(x))  # in training mode, with a momentum of 0: the statistics are the images'
    state = network.state_dict()
    path = tmp_path_factory.mktemp("port") / "epoch_19_model.pdparams"
    paddle.save(state, str(path))
    return path, logits_of(network, x), state


def test_port_keeps_its_colors(port, lightness, convert):
    path, logits, _ = port
    ours = convert(path, lightness)
    assert_agree(ours, logits)
    np.testing.assert_allclose(ab_map(ours), expected_ab(logits, 0.38), atol=0.05)


def test_port_saved_from_data_parallel_is_read(port, lightness, tmp_path):
    path, logits, state = port
    paddle.save({f"_layers.{name}": tensor for name, tensor in state.items()}, str(tmp_path / "parallel.pdparams"))
    assert_agree(read_and_run(tmp_path / "parallel.pdparams", lightness), logits)


def test_checkpoint_is_not_loaded_into_the_other_variant(tmp_path):
    """The colors would change silently."""
    networks, path = [CIC(), PortCIC()], tmp_path / "epoch_0_model.pdparams"
    for network, other in (networks, reversed(networks)):
        save_checkpoint(network.state_dict(), path)
        with pytest.raises(UserError, match=f"another network's checkpoint: missing or unknown: {EXTRA_RELU}"):
            load_weights(other, path)
        assert type(load_network(path)) is type(network)


# -------------------------------------------------------------------------------------------------
# The authors' Caffe release


@pytest.fixture(scope="module")
def caffe(lightness):
    return caffe_network(lightness - 50)


def test_caffe_release_gives_the_colors_of_the_authors(caffe, lightness, convert, tmp_path):
    layers, logits = caffe
    ours = convert(write_caffe(tmp_path / "release.caffemodel", layers), lightness)
    assert_agree(ours, logits)
    np.testing.assert_allclose(ab_map(ours), expected_ab(logits, 0.38), atol=0.05)


@pytest.mark.skipif(not importlib.util.find_spec("cv2"), reason="OpenCV is not installed")
def test_caffe_release_gives_the_colors_of_opencv(caffe, lightness, tmp_path):
    """OpenCV has its own reader of Caffe's files."""
    path = write_caffe(tmp_path / "release.caffemodel", {**caffe[0], **class8_ab()})
    theirs = np.concatenate([run_by_opencv(path, SIDE, SIDE)(x[None] - 50) for x in lightness])
    np.testing.assert_allclose(ab_map(read_and_run(path, lightness)), theirs, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv6_2": []}, "missing or unknown: conv6_2.0, conv6_2.1"),
        ({"conv3_3norm": [np.ones(256), np.ones(256), np.zeros(1)]}, "a negative variance: conv3.6._mean"),
        ({"conv5_1": [np.ones((512, 512, 5, 5)), np.ones(512)]}, "conv5.0.weight is float [512, 512, 5, 5] instead of"),
    ],
    ids=["missing", "untrained", "shape"],
)
def test_other_caffe_network_is_refused(caffe, tmp_path, error_message, change, message):
    path = write_caffe(tmp_path / "other.caffemodel", {**caffe[0], **change})
    assert message in error_message(pretrained.read_network, path)


# -------------------------------------------------------------------------------------------------
# Other files


def test_files_in_other_formats_are_refused_in_one_line(tmp_path, error_message):
    def blob(shape, data):
        sizes = field(7, field(1, b"".join(map(varint, shape))))
        return field(100, field(1, b"conv1_2") + field(7, sizes + field(5, data)))

    for content in (
        b"",
        b"<!DOCTYPE html><html><body>Not found",
        b'name: "net"\nlayer {\n  name: "conv1"\n}',
        b"\xff\xd8\xff\xe0 a JPEG",
        blob([2], bytes(8))[:-2],
        blob([2], bytes(7)),
        blob([2], bytes(12)),
        blob([2**40, 2**40], b""),
        blob([2**64 - 2, 2**64 - 1], bytes(8)),  # -2 and -1
        b"PK\x03\x04 cut short",
        b"\x80\x04cut short",
    ):
        (tmp_path / "file").write_bytes(content)
        message = error_message(pretrained.read_network, tmp_path / "file")
        assert message.startswith(f"{tmp_path / 'file'}: not a readable checkpoint: ")


def test_checkpoint_of_an_unknown_network_is_refused_with_its_parameters(tmp_path, error_message):
    paddle.save(nn.Linear(2, 2).state_dict(), str(tmp_path / "linear.pdparams"))
    message = error_message(pretrained.read_network, tmp_path / "linear.pdparams")
    assert "not a known network; it contains weight, bias" in message


# -------------------------------------------------------------------------------------------------
# The script


def test_conversion_to_safetensors_and_back_keeps_every_number(port, tmp_path, capsys):
    def convert(source, destination):
        convert_weights.main(convert_weights.parse_args([str(source), str(destination)]))
        return capsys.readouterr().out.splitlines()

    report, use = convert(port[0], tmp_path)
    assert report.endswith("epoch_port_19_model.pdparams: 32,240,377 values of the earlier Paddle port")
    assert use == f"python test.py --load_model {tmp_path}/epoch_port_19_model.pdparams --image_dir DIR"
    ours = tmp_path / "epoch_port_19_model.pdparams"
    convert(ours, tmp_path)
    published = tmp_path / "epoch_port_19_model.safetensors"
    convert(published, tmp_path / "again.pdparams")
    first, second, third = (load_checkpoint(p) for p in (ours, published, tmp_path / "again.pdparams"))
    assert first.keys() == second.keys() == third.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(np.array_equal(first[name], third[name]) for name in first)
    assert isinstance(load_network(published), PortCIC)


def test_conversion_keeps_size_epoch_and_step(cic_checkpoint, tmp_path):
    info = {"load_size": 96, "epoch": 3, "step": 1200}
    arrays = {name: np.array(value) for name, value in info.items()}
    source, published = tmp_path / "epoch_3_model.pdparams", tmp_path / "epoch_3_model.safetensors"
    save_checkpoint({**load_checkpoint(cic_checkpoint), **arrays}, source)
    for path, converted in ((source, published), (published, tmp_path / "again.pdparams")):
        assert pretrained.checkpoint_info(path) == info
        convert_weights.main(convert_weights.parse_args([str(path), str(converted)]))
    assert pretrained.checkpoint_info(tmp_path / "again.pdparams") == info
    load_network(tmp_path / "again.pdparams")


@pytest.mark.parametrize(
    "source, kind, written",
    [
        ("colorization_release_v2-9b330a0b.pth", pretrained.PYTORCH, "epoch_official_model.pdparams"),
        ("colorization_release_v2.caffemodel", pretrained.CAFFE, "epoch_caffe_model.pdparams"),
        ("colorization_release_v2_norebal.caffemodel", pretrained.CAFFE, "epoch_norebal_model.pdparams"),
        ("epoch_19_model.pdparams", pretrained.PORT, "epoch_port_19_model.pdparams"),
        ("epoch_19_model.pdparams", pretrained.OURS, "epoch_19_model.safetensors"),
        ("epoch_19_model.safetensors", pretrained.OURS, "epoch_19_model.pdparams"),
    ],
)
def test_converted_file_gets_its_name_in_a_folder_from_the_source(source, kind, written):
    assert convert_weights.destination_path(source, "model", kind).name == written


def test_source_is_not_overwritten(port, error_message):
    args = convert_weights.parse_args([str(port[0]), str(port[0])])
    assert "this is the source" in error_message(convert_weights.main, args)


# -------------------------------------------------------------------------------------------------
# --load_model official


@pytest.fixture
def serve(offline, tmp_path, monkeypatch):
    """Put a file behind the official address, on this machine; its name ends with digits of the hash, or others."""
    (folder := tmp_path / "served").mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def put(content, digits=None):
            name = f"release-{digits or hashlib.sha256(content).hexdigest()[:8]}.pth"
            (folder / name).write_bytes(content)
            monkeypatch.setattr(pretrained, "OFFICIAL_URL", f"http://127.0.0.1:{server.server_port}/{name}")
            return folder / name, offline / name

        yield put
        server.shutdown()


@needs_torch
def test_official_weights_are_downloaded_once_and_kept(official, lightness, serve, tmp_path):
    files = serve(official[0].read_bytes())
    path = pretrained.find_weights(tmp_path / "model", "official")
    assert path == tmp_path / "model" / "epoch_official_model.pdparams"
    assert_agree(logits_of(load_network(path), lightness - 50), 0.38 * official[1])
    for file in files:
        file.unlink()
    assert pretrained.find_weights(tmp_path / "model", "official") == path


def test_download_with_a_wrong_hash_is_refused_and_removed(serve, tmp_path, error_message):
    _, cached = serve(b"PK not what it says", digits="9b330a0b")
    message = error_message(pretrained.download, pretrained.OFFICIAL_URL, tmp_path)
    assert re.search("removed, as its SHA-256 is [0-9a-f]{8}…, not 9b330a0b…", message)
    assert not cached.exists()


def test_failed_download_prints_one_line_with_the_offline_way(offline, tmp_path, error_message):
    url = "http://127.0.0.1:9/release-9b330a0b.pth"
    message = error_message(pretrained.download, url, tmp_path / "model")
    assert message.startswith(f"{url}: download failed (")
    assert f"python resources/convert_weights.py release-9b330a0b.pth {tmp_path / 'model'}" in message


def test_weights_are_found_by_name_file_name_or_path(tmp_path, error_message):
    message = error_message(pretrained.find_weights, tmp_path, "19")
    assert "epoch_19_model.pdparams: no such checkpoint; available: none" in message
    (path := tmp_path / "epoch_3_model.safetensors").touch()
    assert error_message(pretrained.find_weights, tmp_path, "19").endswith("available: --load_model 3")
    for name in ("3", "epoch_3_model.safetensors", str(path)):
        assert pretrained.find_weights(tmp_path, name) == path


# -------------------------------------------------------------------------------------------------
# The bundled weights


def test_folder_without_checkpoints_defaults_to_the_bundled_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, "./model"):
        assert pretrained.find_weights(folder) == pretrained.SMALL
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{Path(folder)} contains no checkpoint: using the bundled weights, small")
        assert "trained on all of ImageNet: --load_model official" in line
    with pytest.raises(UserError, match="nowhere: no such folder$"):
        pretrained.find_weights(tmp_path / "nowhere")
    (tmp_path / "epoch_3_model.pdparams").touch()
    assert pretrained.find_weights(tmp_path) == tmp_path / "epoch_3_model.pdparams"
    assert pretrained.find_weights(tmp_path, "small") == pretrained.SMALL


@pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1", "the first half"])
def test_damaged_or_missing_bundled_weights_are_one_line_that_names_the_file(tmp_path, monkeypatch, content):
    path = tmp_path / "epoch_small_model.safetensors"
    if content:
        half = pretrained.SMALL.read_bytes()[: pretrained.SMALL.stat().st_size // 2]
        path.write_bytes(content if isinstance(content, bytes) else half)
    monkeypatch.setattr(pretrained, "SMALL", path)
    with pytest.raises(UserError, match=rf"^{path}: .+$"):
        Colorizer("small")


def test_bundled_weights_are_the_complete_network_in_33_megabytes():
    network = pretrained.load_network(pretrained.find_weights("nowhere", "small"))
    assert sum(tensor.size for tensor in network.state_dict().values()) == 32_240_377
    assert pretrained.SMALL.stat().st_size < 33_000_000


def test_reading_weights_draws_no_random_numbers():
    paddle.seed(0)
    expected = paddle.randn([3]).numpy()
    paddle.seed(0)
    pretrained.load_network(pretrained.SMALL)
    assert np.array_equal(paddle.randn([3]).numpy(), expected)
    assert (nn.Linear(2, 2).weight.numpy() != 0).all()  # layers that are made later are random as ever


@pytest.mark.parametrize("suffix", [".safetensors", ".pdparams"])
def test_entries_other_than_weights_must_be_numbers_within_limits(tmp_path, suffix):
    path = tmp_path / f"epoch_1_model{suffix}"

    def write(info):
        if suffix == ".pdparams":
            save_checkpoint({name: np.array(value) for name, value in info.items()}, path)
        else:
            save_safetensors({}, path, {name: str(value) for name, value in info.items()})

    write({})
    assert pretrained.checkpoint_info(path) == {}
    for info in ({"load_size": 128}, {"load_size": 4096, "temperature": 0.5, "epoch": 0, "step": 3}):
        write(info)
        assert pretrained.checkpoint_info(path) == info
    for name, wrong in (
        *(("load_size", size) for size in (0, -1, 4097, 10**9, 96.5, float("nan"))),
        *(("temperature", t) for t in (0.0, -1.0, 1e7, float("nan"), float("inf"))),
        *(("step", -1), ("epoch", 1.5)),
    ):
        write({name: wrong})
        with pytest.raises(UserError, match=rf"^{path}: {name} .*{wrong}") as error:
            pretrained.checkpoint_info(path)
        assert "\n" not in str(error.value)
