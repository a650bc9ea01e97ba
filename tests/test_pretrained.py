"""Weights of other projects give the output of the networks that they were made for, which are built here.

The authors' files are not available here. Random weights replace them, with the batch norm statistics that they have on
images, and with the releases' scales of input and output, temperature and file formats.
"""

import hashlib
import importlib.util
import os
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.checkpoints import Checkpoint, load_checkpoint, save_checkpoint, save_safetensors
from support.cli import UserError

import numpy as np
import paddle
import pytest
import skimage.color
from caffe_files import STAGES, caffe_layers, class8_ab, flat_network, run_by_opencv, write_caffe
from conftest import bundled_image
from paddle import nn

import pretrained
import test
from colorizer import Colorizer
from model import CIC
from pretrained import find_weights, initialize, load_network, read_weights
from utils import annealed_mean, load_ab_bins

SIDE = 64
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")


@pytest.fixture(scope="module")
def lightness():
    """Return the lightness of two images, computed by scikit-image: float32 [2, 1, SIDE, SIDE] in [0, 100]."""
    photos = [bundled_image(name).resize((SIDE, SIDE)) for name in ("astronaut", "coffee")]
    return np.stack([skimage.color.rgb2lab(photo)[None, :, :, 0] for photo in photos]).astype(np.float32)


@paddle.no_grad()
def run(network, lightness):
    """Return the logits of a network, or of the network in a file."""
    network = load_network(network) if isinstance(network, Path) else network
    network.eval()
    return network(paddle.to_tensor(lightness - 50)).numpy()


def ab_map(logits):
    return annealed_mean(paddle.to_tensor(logits), load_ab_bins()).numpy()


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
@pytest.mark.parametrize("zipped", [True, False], ids=["since 1.6", "before 1.6"])
def test_official_release_gives_the_colors_of_the_authors(official, lightness, tmp_path, zipped):
    """The authors use no temperature, so the head is scaled by 0.38."""
    import torch

    path, logits, ab = official
    torch.save(torch.load(path, weights_only=True), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    ours = run(tmp_path / "a.pth", lightness)
    assert_agree(ours, 0.38 * logits)
    np.testing.assert_allclose(ab_map(ours), ab, atol=0.05)
    assert ab.std() > 5  # they are colors


@pytest.fixture
def refused(monkeypatch, error_message):
    """Return the message with which a state is refused that is not written to a file first."""

    def load(state):
        monkeypatch.setattr(pretrained, "read_checkpoint", lambda _: Checkpoint(state, {}, ""))
        return error_message(load_network, "other")

    return load


CHANGES = {  # to a parameter of the release, and the message
    "order of bins": ("model_out.weight", lambda w: w[:, ::-1], "model_out does not contain pts_in_hull.npy's"),
    "number of bins": ("model_out.weight", lambda w: w[:, :300], "model_out does not contain pts_in_hull.npy's"),
    "no bins": ("model_out.weight", lambda w: "text", "model_out does not contain pts_in_hull.npy's"),
    "no array": ("model1.0.weight", lambda w: "text", "conv1.0.weight is str"),
}


@needs_torch
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_official_release_is_refused(official, refused, kind):
    name, change, message = CHANGES[kind]
    state = load_checkpoint(official[0])
    assert message in refused({**state, name: change(state[name])})


@needs_torch
def test_official_release_without_a_parameter_is_refused(official, refused):
    state = load_checkpoint(official[0])
    del state["model3.6.running_var"]
    assert refused(state).endswith("missing or unknown: conv3.6._variance")
    del state["model_out.weight"]
    assert "model_out does not contain" in refused(state)


# -------------------------------------------------------------------------------------------------
# The earlier Paddle port


@pytest.fixture(scope="module")
def port(lightness, tmp_path_factory):
    """Return the port's checkpoint and its logits."""
    network = flat_network(lightness - 50, extra_relu=True, affine=True)
    path = tmp_path_factory.mktemp("port") / "epoch_19_model.pdparams"
    save_checkpoint({f"features.{name}": tensor for name, tensor in network.state_dict().items()}, path)
    return path, run(network, lightness)


def test_port_keeps_its_colors(port, lightness):
    path, logits = port
    assert_agree(run(path, lightness), logits)


def test_network_saved_from_data_parallel_is_read(small_network, tmp_path):
    state = {f"_layers.{name}": tensor for name, tensor in small_network().state_dict().items()}
    save_checkpoint(state, tmp_path / "parallel.pdparams")
    assert isinstance(load_network(tmp_path / "parallel.pdparams"), small_network)


def test_port_checkpoint_colorizes_in_place(port, tmp_path, monkeypatch, image_folder, capsys):
    """Its default name is also the default here."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / port[0].name).symlink_to(port[0])
    monkeypatch.chdir(tmp_path)
    assert test.main(test.parse_args([str(image_folder / "coffee.png"), "--load_size", "32"])) == 0
    assert "with model/epoch_19_model.pdparams" in capsys.readouterr().out
    assert os.listdir("model") == [port[0].name]


@needs_torch
def test_training_starts_from_any_network_without_the_additional_relu(port, official, lightness, error_message):
    network = CIC()
    initialize(network, official[0])
    assert_agree(run(network, lightness), 0.38 * official[1])
    assert "additional ReLU before conv6" in error_message(initialize, network, port[0])


# -------------------------------------------------------------------------------------------------
# The authors' Caffe release


@pytest.fixture(scope="module")
def caffe(lightness):
    """Return the layers of the release, and its logits."""
    network = flat_network(lightness - 50)
    return caffe_layers(network), run(network, lightness)


def test_caffe_release_gives_the_colors_of_the_authors(caffe, lightness, tmp_path):
    layers, logits = caffe
    assert_agree(run(write_caffe(tmp_path / "release.caffemodel", layers), lightness), logits)


@pytest.mark.skipif(not importlib.util.find_spec("cv2"), reason="OpenCV is not installed")
def test_caffe_release_gives_the_colors_of_opencv(caffe, lightness, tmp_path):
    """OpenCV has its own reader of Caffe's files."""
    path = write_caffe(tmp_path / "release.caffemodel", {**caffe[0], **class8_ab()})
    theirs = np.concatenate([run_by_opencv(path, SIDE, SIDE)(x[None] - 50) for x in lightness])
    np.testing.assert_allclose(ab_map(run(path, lightness)), theirs, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv8_313": []}, "conv8_313.weight is NoneType instead of"),
        ({"conv3_3norm": [np.ones(256), np.ones(256), np.zeros(1)]}, "a negative variance: conv3.6._mean"),
        ({"conv3_3norm": [np.ones(256), np.ones(3), np.ones(1)]}, "conv3.6._variance is float [3] instead of"),
    ],
    ids=["no head", "untrained", "statistics"],
)
def test_other_caffe_network_is_refused(caffe, refused, change, message):
    layers = {**caffe[0], **change}
    assert message in refused({f"{name}.{i}": array for name in layers for i, array in enumerate(layers[name])})


# -------------------------------------------------------------------------------------------------
# Other files


# -------------------------------------------------------------------------------------------------
# The head that predicts ab itself


def test_network_that_predicts_ab_is_recognized_by_its_parameters(ab_checkpoint, small_checkpoint):
    weights = read_weights(ab_checkpoint)
    assert (weights.head, weights.temperature, weights.load_size) == ("conv8_ab", None, 64)
    assert weights.network()(paddle.zeros([1, 1, 16, 24])).shape == [1, 2, 4, 6]
    assert read_weights(small_checkpoint).head == "conv8_313"


def test_head_stays_random_when_training_starts_from_a_network_with_the_other_head(
    ab_checkpoint, small_checkpoint, small_network
):
    for path, other in ((small_checkpoint, "conv8_ab"), (ab_checkpoint, "conv8_313")):
        network = small_network(other)
        before = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
        assert initialize(network, path) == other
        loaded = load_checkpoint(path)
        for name, tensor in network.state_dict().items():
            expected = before[name] if name.startswith(other) else loaded[name]
            assert np.array_equal(tensor.numpy(), expected), name
        assert not np.array_equal(before["up.weight"], loaded["up.weight"])
    assert initialize(small_network(), small_checkpoint) is None


# -------------------------------------------------------------------------------------------------
# --load_model official


@pytest.fixture
def serve(offline, tmp_path, monkeypatch):
    """Put a file behind the official address, on this machine; its name ends with digits of the hash, or others."""
    (folder := tmp_path / "served").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def put(content, digits=None):
            name = f"release-{digits or hashlib.sha256(content).hexdigest()[:8]}.pth"
            (folder / name).write_bytes(content)
            monkeypatch.setattr(pretrained, "OFFICIAL_URL", f"http://127.0.0.1:{server.server_port}/{name}")
            return folder / name, offline / name

        yield put
        server.shutdown()


def test_official_weights_are_downloaded_to_the_cache_once(serve, tmp_path):
    """Nothing is stored in the model folder, so the default weights do not change."""
    served, cached = serve(b"PK the release")
    assert find_weights(tmp_path / "model", "official") == cached and not (tmp_path / "model").exists()
    assert cached.read_bytes() == b"PK the release"
    served.unlink()
    assert find_weights(tmp_path / "model", "official") == cached


def test_download_with_a_wrong_hash_is_refused_and_removed(serve, error_message):
    _, cached = serve(b"PK not what it says", digits="9b330a0b")
    message = error_message(find_weights, "model", "official")
    assert re.search("removed, as its SHA-256 is [0-9a-f]{8}…, not 9b330a0b…; try again, or download it", message)
    assert not cached.exists()


def test_failed_download_prints_one_line_with_the_offline_way(offline, monkeypatch, error_message):
    url = "http://127.0.0.1:9/release-9b330a0b.pth"
    monkeypatch.setattr(pretrained, "OFFICIAL_URL", url)
    message = error_message(find_weights, "model", "official")
    assert message.startswith(f"{url}: download failed (")
    assert message.endswith("; download it on another machine and pass its path: --load_model release-9b330a0b.pth")


# -------------------------------------------------------------------------------------------------
# From a name to a file


def test_weights_are_found_by_name_or_path(tmp_path, error_message):
    for missing in ("19", "x.caffemodel", str(tmp_path / "x")):
        message = f"{missing}: no such checkpoint in {tmp_path}; available: small, official"
        assert error_message(find_weights, tmp_path, missing) == message
    (path := tmp_path / "epoch_3_model.safetensors").touch()
    (tmp_path / "epoch_best_model.pdparams").touch()
    assert error_message(find_weights, tmp_path, "19").endswith("available: 3, best, small, official")
    assert find_weights(tmp_path, "3") == find_weights("nowhere", path) == path


@pytest.mark.parametrize(
    ("existing", "used"),
    [
        (("19", "latest", "20"), "19"),
        (("3", "latest", "best"), "latest"),
        (("1", "2", "10", "best"), "10"),
        (("best", "wide"), "best"),
    ],
)
def test_without_a_name_the_preferred_checkpoint_of_the_folder_is_used(tmp_path, capsys, existing, used):
    for name in existing:
        (tmp_path / f"epoch_{name}_model.pdparams").touch()
    assert find_weights(tmp_path) == tmp_path / f"epoch_{used}_model.pdparams"
    assert (f"no --load_model: using {used}" in capsys.readouterr().err) == (used != "19")


# -------------------------------------------------------------------------------------------------
# The bundled weights


def test_folder_without_checkpoints_defaults_to_the_bundled_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert find_weights("./model") == pretrained.SMALL
    assert not capsys.readouterr().err  # of people who never train
    assert find_weights(tmp_path) == pretrained.SMALL
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{tmp_path} contains no checkpoint: using the bundled weights, small"
    with pytest.raises(UserError, match="nowhere: no such folder$"):
        find_weights(tmp_path / "nowhere")
    assert find_weights(tmp_path, "small") == pretrained.SMALL


def test_damaged_bundled_weights_are_one_line_that_names_the_file(tmp_path, monkeypatch, error_message):
    path = tmp_path / "epoch_small_model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    monkeypatch.setattr(pretrained, "SMALL", path)
    assert error_message(Colorizer, "small").startswith(f"{path}: ")


def test_bundled_weights_are_the_complete_network_in_33_megabytes():
    network = load_network(find_weights("nowhere", "small"))
    assert sum(tensor.size for tensor in network.state_dict().values()) == 32_240_377
    assert pretrained.SMALL.stat().st_size < 33_000_000


def test_reading_weights_draws_no_random_numbers():
    paddle.seed(0)
    expected = paddle.randn([3]).numpy()
    paddle.seed(0)
    load_network(pretrained.SMALL)
    assert np.array_equal(paddle.randn([3]).numpy(), expected)
    assert (nn.Linear(2, 2).weight.numpy() != 0).all()  # layers that are made later are random as ever


@pytest.mark.parametrize("suffix", [".safetensors", ".pdparams"])
def test_entries_other_than_weights_must_be_numbers_within_limits(tmp_path, error_message, suffix):
    path = tmp_path / f"epoch_1_model{suffix}"

    def write(**info):
        if suffix == ".pdparams":
            save_checkpoint({name: np.array(value) for name, value in info.items()}, path)
        else:
            save_safetensors({}, path, {name: str(value) for name, value in info.items()})

    write()
    read = read_weights(path)
    assert (read.load_size, read.temperature, read.epoch, read.step) == (256, 0.38, None, None)
    write(load_size=4096, temperature=0.5, epoch=0, step=3)
    read = read_weights(path)
    assert (read.load_size, read.temperature, read.epoch, read.step) == (4096, 0.5, 0, 3)
    for name, wrong in (("load_size", 4097), ("temperature", np.nan), ("step", -1), ("epoch", 1.5)):
        write(**{name: wrong})
        assert re.search(rf"^{path}: {name}: .*{wrong}", error_message(read_weights, path))
