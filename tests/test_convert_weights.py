"""Weights from elsewhere give here what they give there: against networks that are built here in their layouts.

The authors' files are not available here, so random weights stand in, with the batch-norm statistics that they have on
images, and the releases' conventions: their scales of input and output, their temperature, their formats.
"""

import hashlib
import importlib.util
import threading
from functools import partial
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
from resources import convert_weights, make_small
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
    """Runs the script on a file and returns the logits of the network that it wrote."""

    def run(source, lightness, *options):
        path = tmp_path / "epoch_converted_model.pdparams"
        convert_weights.main(convert_weights.parse_args([str(source), str(path), *options]))
        return logits_of(load_network(path), lightness - 50)

    return run


def read_and_run(source, lightness):
    """Like `convert`, without the file between."""
    return logits_of(pretrained.read_network(source)[0], lightness - 50)


@paddle.no_grad()
def logits_of(network, x):
    network.eval()
    return network(paddle.to_tensor(x)).numpy()


def ab_map(logits):
    return annealed_mean(paddle.to_tensor(logits), load_ab_bins()).numpy()


def expected_ab(logits, temperature):
    """The mean over the bins in float64, in one line of NumPy."""
    likelihood = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    return np.einsum("nqhw,qc->nchw", likelihood / likelihood.sum(axis=1, keepdims=True), load_ab_bins().numpy())


def assert_agree(ours, theirs):
    """Logits to 1e-4 of their largest; they must also differ from place to place, or little would be shown."""
    assert theirs.std() > 0.5 and theirs.std(axis=(2, 3)).mean() > 0.2
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


# -------------------------------------------------------------------------------------------------
# The authors' PyTorch release


def official_module():
    """A network of the layout of the authors' eccv16, with random weights."""
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
    """The release as a file, its logits and its ab map."""
    torch = pytest.importorskip("torch")
    network, x = official_module(), torch.tensor(lightness)
    with torch.no_grad():
        network.train()(x)
        logits, ab = network.eval()(x)
    path = tmp_path_factory.mktemp("official") / "colorization_release.pth"
    torch.save(network.state_dict(), path)
    return path, logits.numpy(), ab.numpy()


@needs_torch
def test_official_release_gives_the_authors_colors_by_default(official, lightness, convert):
    path, logits, ab = official
    ours = convert(path, lightness)
    assert_agree(ours, 0.38 * logits)
    np.testing.assert_allclose(ab_map(ours), ab, atol=0.05)
    assert ab.std() > 5  # they are colors


@needs_torch
def test_official_release_whose_head_carries_no_temperature(official, lightness, convert):
    path, logits, _ = official
    ours = convert(path, lightness, "--head_temperature", "1")
    assert_agree(ours, logits)
    np.testing.assert_allclose(ab_map(ours), expected_ab(logits, 0.38), atol=0.05)


@needs_torch
def test_official_release_in_the_format_of_before_pytorch_1_6(official, lightness, tmp_path):
    import torch

    path, logits, _ = official
    state = torch.load(path, weights_only=True)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_agree(read_and_run(tmp_path / "old.pth", lightness), 0.38 * logits)


@needs_torch
def test_official_release_as_safetensors(official, lightness, tmp_path):
    import torch
    from safetensors.torch import save_file

    path, logits, _ = official
    save_file(torch.load(path, weights_only=True), tmp_path / "official.safetensors")
    assert_agree(read_and_run(tmp_path / "official.safetensors", lightness), 0.38 * logits)


@pytest.fixture
def edited(official, tmp_path):
    """The release after a change to its state dict."""
    import torch

    def edit(change):
        state = torch.load(official[0], weights_only=True)
        change(state)
        torch.save(state, tmp_path / "edited.pth")
        return tmp_path / "edited.pth"

    return edit


@needs_torch
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.update({"model_out.weight": s["model_out.weight"].flip(1)}),
            "its model_out does not contain pts_in_hull.npy's bins",
        ),
        (
            lambda s: s.update({"model_out.weight": s["model_out.weight"][:, :300]}),
            "its model_out does not contain pts_in_hull.npy's bins",
        ),
        (lambda s: s.pop("model3.6.running_var"), r"missing or unknown: model3.6.running_var$"),
        (lambda s: s.update({"model9.0.weight": s["model1.0.bias"]}), r"missing or unknown: model9.0.weight$"),
        (
            lambda s: s.update({"model2.0.weight": s["model2.0.weight"][:, :1]}),
            r"conv2.0.weight is float \[128, 1, ",
        ),
        (lambda s: s["model4.0.weight"].fill_(float("nan")), r"not finite.*conv4.0.weight"),
        (lambda s: s.update({"model5.0.bias": s["model5.0.bias"].long()}), r"not an array of floats: model5.0.bias"),
        (lambda s: s.update({"model5.0.bias": "text"}), r"not an array of floats: model5.0.bias"),
    ],
    ids=["order of bins", "number of bins", "missing", "unexpected", "misshapen", "NaN", "integers", "text"],
)
def test_official_release_that_was_changed_is_refused(edited, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        pretrained.read_network(edited(change))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------
# The earlier Paddle port


class PortNetwork(nn.Layer):
    def __init__(self, layers):
        super().__init__()
        self.features = nn.Sequential(*layers)

    def forward(self, lightness):
        return self.features(lightness)


def port_network(extra_relu=True):
    """One flat Sequential; the port had a ReLU between the batch norm of conv5 and conv6."""
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
    """The port's checkpoint, its logits, and those that it would give without its extra ReLU."""
    network, x = port_network(), lightness - 50
    with paddle.no_grad():
        network(paddle.to_tensor(x))  # in training mode, with a momentum of 0: the statistics are the images'
    state = network.state_dict()
    path = tmp_path_factory.mktemp("port") / "epoch_19_model.pdparams"
    paddle.save(state, str(path))
    return path, logits_of(network, x), state


def test_port_gives_its_own_colors(port, lightness, convert):
    path, logits, _ = port
    ours = convert(path, lightness)
    assert_agree(ours, logits)
    np.testing.assert_allclose(ab_map(ours), expected_ab(logits, 0.38), atol=0.05)


def test_port_without_its_extra_relu_would_give_other_colors(port, lightness):
    network, _ = pretrained.read_network(port[0])
    without = CIC()
    without.set_state_dict({name: x for name, x in network.state_dict().items() if name != EXTRA_RELU})
    changed = ab_map(logits_of(without, lightness - 50)) - ab_map(port[1])
    assert np.abs(changed).mean() > 1


def test_port_saved_from_data_parallel(port, lightness, tmp_path):
    path, logits, state = port
    paddle.save({f"_layers.{name}": tensor for name, tensor in state.items()}, str(tmp_path / "parallel.pdparams"))
    assert_agree(read_and_run(tmp_path / "parallel.pdparams", lightness), logits)


def test_a_checkpoint_does_not_load_into_the_other_variant(tmp_path):
    """Both ways; a silent change of colors is what must not happen."""
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


def test_caffe_release_gives_the_authors_colors(caffe, lightness, convert, tmp_path):
    layers, logits = caffe
    ours = convert(write_caffe(tmp_path / "release.caffemodel", layers), lightness)
    assert_agree(ours, logits)
    np.testing.assert_allclose(ab_map(ours), expected_ab(logits, 0.38), atol=0.05)


@pytest.mark.skipif(not importlib.util.find_spec("cv2"), reason="OpenCV is not installed")
def test_caffe_release_gives_the_colors_that_opencv_gives(caffe, lightness, tmp_path):
    """OpenCV has its own reader of Caffe's files."""
    path = write_caffe(tmp_path / "release.caffemodel", {**caffe[0], **class8_ab()})
    theirs = np.concatenate([run_by_opencv(path, SIDE, SIDE)(x[None] - 50) for x in lightness])
    np.testing.assert_allclose(ab_map(read_and_run(path, lightness)), theirs, atol=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv6_2": []}, r"missing or unknown: conv6_2.0, conv6_2.1$"),
        ({"conv3_3norm": [np.ones(256), np.ones(256), np.zeros(1)]}, r"not finite.*conv3.6._mean"),
        (
            {"conv5_1": [np.ones((512, 512, 5, 5)), np.ones(512)]},
            r"conv5.0.weight is float \[512, 512, 5, 5\] instead of",
        ),
    ],
    ids=["missing", "untrained", "misshapen"],
)
def test_other_caffe_networks_are_refused(caffe, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        pretrained.read_network(write_caffe(tmp_path / "other.caffemodel", {**caffe[0], **change}))


# -------------------------------------------------------------------------------------------------
# Files that are none of these


def test_files_in_other_formats_are_refused_in_one_line(tmp_path):
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
        with pytest.raises(UserError) as error:
            pretrained.read_network(tmp_path / "file")
        assert str(error.value).startswith(f"{tmp_path / 'file'}: not a readable checkpoint: ")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such checkpoint"):
        pretrained.read_network(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a directory"):
        pretrained.read_network(tmp_path)


def test_another_networks_checkpoint_is_refused_by_name(tmp_path):
    paddle.save(nn.Linear(2, 2).state_dict(), str(tmp_path / "linear.pdparams"))
    with pytest.raises(UserError, match=r"not a known network; it contains weight, bias"):
        pretrained.read_network(tmp_path / "linear.pdparams")


# -------------------------------------------------------------------------------------------------
# The script


def test_safetensors_out_and_in_keep_every_number(port, tmp_path, capsys):
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


def test_conversion_keeps_what_a_checkpoint_specifies_besides_its_weights(trained, tmp_path):
    info = {"load_size": 96, "epoch": 3, "step": 1200}
    arrays = {name: np.array(value) for name, value in info.items()}
    source, published = tmp_path / "epoch_3_model.pdparams", tmp_path / "epoch_3_model.safetensors"
    save_checkpoint({**load_checkpoint(trained), **arrays}, source)
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
def test_names_in_a_model_folder(source, kind, written):
    assert convert_weights.destination_path(source, "model", kind).name == written


def test_the_source_is_not_overwritten(port):
    with pytest.raises(UserError, match="this is the source"):
        convert_weights.main(convert_weights.parse_args([str(port[0]), str(port[0])]))


# -------------------------------------------------------------------------------------------------
# --load_model official


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Puts a file behind the official address, on this machine; its name ends with digits of the hash or others."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setattr("paddle.utils.download.WEIGHTS_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def put(content, digits=None):
            name = f"release-{digits or hashlib.sha256(content).hexdigest()[:8]}.pth"
            (folder / name).write_bytes(content)
            monkeypatch.setattr(pretrained, "OFFICIAL_URL", f"http://127.0.0.1:{server.server_port}/{name}")
            return tmp_path / "cache" / name

        yield put
        server.shutdown()


@needs_torch
def test_official_is_downloaded_once_and_kept(official, lightness, serve, tmp_path, monkeypatch):
    serve(official[0].read_bytes())
    path = pretrained.find_weights(tmp_path / "model", "official")
    assert path == tmp_path / "model" / "epoch_official_model.pdparams"
    assert_agree(logits_of(load_network(path), lightness - 50), 0.38 * official[1])
    monkeypatch.setattr(pretrained, "OFFICIAL_URL", "http://127.0.0.1:9/unreachable-00000000.pth")
    assert pretrained.find_weights(tmp_path / "model", "official") == path


def test_a_download_with_another_hash_is_refused_and_removed(serve, tmp_path):
    cached = serve(b"PK not what it says", digits="9b330a0b")
    with pytest.raises(UserError, match=r"removed, as its SHA-256 is [0-9a-f]{8}…, not 9b330a0b…"):
        pretrained.download(pretrained.OFFICIAL_URL, tmp_path)
    assert not cached.exists()


def test_without_a_network_there_is_one_line_with_the_offline_way(tmp_path, monkeypatch):
    monkeypatch.setattr("paddle.utils.download.WEIGHTS_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = "http://127.0.0.1:9/release-9b330a0b.pth"
    with pytest.raises(UserError) as error:
        pretrained.download(url, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{url}: download failed (")
    assert f"python resources/convert_weights.py release-9b330a0b.pth {tmp_path / 'model'}" in str(error.value)


def test_unknown_name_lists_the_available_ones(tmp_path):
    with pytest.raises(UserError, match="epoch_19_model.pdparams: no such checkpoint; available: none"):
        pretrained.find_weights(tmp_path, "19")
    (tmp_path / "epoch_3_model.safetensors").touch()
    with pytest.raises(UserError, match="available: --load_model 3$"):
        pretrained.find_weights(tmp_path, "19")
    assert pretrained.find_weights(tmp_path, "3") == tmp_path / "epoch_3_model.safetensors"
    assert pretrained.find_weights("elsewhere", str(tmp_path / "epoch_3_model.safetensors")).parent == tmp_path


# -------------------------------------------------------------------------------------------------
# The bundled weights


def test_default_is_the_bundled_weights_where_there_is_no_checkpoint(tmp_path, monkeypatch, capsys):
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


def test_small_weights_are_the_papers_network_whole_and_small():
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
def test_entries_besides_the_weights_are_numbers_within_their_limits(tmp_path, suffix):
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


def test_rounding_to_8_bits_is_off_by_half_a_step_of_the_channel_at_most():
    weight = np.random.default_rng(0).normal(size=(4, 6, 3, 3)).astype(np.float32)
    for channels in (0, 1):
        rounded, scale = make_small.round_to_8_bits(weight, channels)
        assert rounded.dtype == np.int8 and scale.size == weight.shape[channels]
        steps = np.abs(weight).max(axis=tuple({0, 1, 2, 3} - {channels}), keepdims=True) / 127
        assert (np.abs(rounded * scale - weight) <= 0.501 * steps).all()
