"""Weights of other projects give the output of the networks that they were made for, which are built here.

The authors' files are not available here. Random weights replace them, with the batch norm statistics that they have on
images, and with the releases' scales of input and output, temperature and file formats.
"""

import hashlib
import importlib.util
import os
import re
from itertools import islice
from pathlib import Path

from support.checkpoints import load_checkpoint, save_checkpoint
from support.cli import UserError

import numpy as np
import paddle
import pytest
import skimage.color
from caffe_files import caffe_layers, flat_network, run_by_opencv, write_caffe
from conftest import bundled_image
from paddle import nn
from safetensors.numpy import save_file

import pretrained
import test
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
    assert theirs.std() > 0.4 and theirs.std(axis=(2, 3)).mean() > 0.2
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.fixture
def refused(monkeypatch, error_message):
    """Return the message with which a state is refused that is not written to a file first."""

    def load(state):
        monkeypatch.setattr(pretrained, "read_checkpoint", lambda _: (dict(state), ""))
        return error_message(load_network, "other")

    return load


# -------------------------------------------------------------------------------------------------
# The authors' PyTorch release


def to_torch(layer):
    """Return a layer as PyTorch's module."""
    import torch

    if isinstance(layer, nn.ReLU):
        return torch.nn.ReLU()
    if isinstance(layer, nn.BatchNorm2D):
        made = torch.nn.BatchNorm2d(layer._num_features)
    else:
        kind = torch.nn.Conv2d if isinstance(layer, nn.Conv2D) else torch.nn.ConvTranspose2d
        sizes = layer._in_channels, layer._out_channels, layer._kernel_size, layer._stride, layer._padding
        made = kind(*sizes, dilation=layer._dilation)
    names = {"_mean": "running_mean", "_variance": "running_var"}
    state = {names.get(name, name): torch.tensor(x.numpy()) for name, x in layer.state_dict().items()}
    made.load_state_dict(state, strict=False)
    return made


@pytest.fixture(scope="module")
def official(lightness, tmp_path_factory):
    """Return a network in the form of the authors' eccv16 as a state, its logits and its ab map, by PyTorch."""
    torch = pytest.importorskip("torch")
    layers = map(to_torch, flat_network(lightness, affine=True))
    counts = {f"model{i}": count for i, count in enumerate((5, 5, 7, 7, 7, 7, 7, 7), start=1)}
    release = torch.nn.ModuleDict({x: torch.nn.Sequential(*islice(layers, count)) for x, count in counts.items()})
    last = torch.nn.Conv2d(313, 2, 1, bias=False)
    with torch.no_grad():
        release["model1"][0].weight *= 100
        for parameter in release["model8"][6].parameters():
            parameter *= 4  # logits as decided as a trained network's
        last.weight.copy_(torch.tensor(load_ab_bins().numpy().T.reshape(2, 313, 1, 1) / 110))
        logits = torch.nn.Sequential(*release.eval().values())((torch.tensor(lightness) - 50) / 100)
        ab = 110 * last(torch.softmax(logits, dim=1))
    state = {**release.state_dict(), "model_out.weight": last.weight.detach()}
    return state, logits.numpy(), ab.numpy()


@needs_torch
@pytest.mark.parametrize("zipped", [True, False], ids=["since 1.6", "before 1.6"])
def test_official_release_gives_the_colors_of_the_authors(official, lightness, tmp_path, zipped):
    """The authors use no temperature, so the head is scaled by 0.38."""
    import torch

    state, logits, ab = official
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    ours = run(tmp_path / "a.pth", lightness)
    assert_agree(ours, 0.38 * logits)
    np.testing.assert_allclose(ab_map(ours), ab, atol=0.05)
    assert ab.std() > 5  # they are colors


@needs_torch
def test_changed_official_release_is_refused(official, refused):
    state = {name: tensor.numpy() for name, tensor in official[0].items()}
    bins = state.pop("model_out.weight")
    for changed in ({}, {"model_out.weight": bins[:, ::-1]}, {"model_out.weight": bins[:, :300]}):
        assert "model_out does not contain pts_in_hull.npy's" in refused({**state, **changed})
    del state["model3.6.running_var"], state["model8.6.bias"]
    message = refused({**state, "model_out.weight": bins})
    assert message.endswith("missing or unknown: conv3.6._variance, conv8_313.bias")


# -------------------------------------------------------------------------------------------------
# The earlier Paddle port


def test_port_keeps_its_colors_in_place_and_cannot_be_trained_further(
    lightness, tmp_path, monkeypatch, image_folder, capsys, error_message
):
    network = flat_network(lightness, extra_relu=True, affine=True)
    path = tmp_path / "model" / "epoch_19_model.pdparams"  # the default name there and here
    # as saved within paddle.DataParallel
    save_checkpoint({f"_layers.features.{name}": tensor for name, tensor in network.state_dict().items()}, path)
    assert_agree(run(path, lightness), run(network, lightness))
    assert "additional ReLU before conv6" in error_message(initialize, None, path)
    monkeypatch.chdir(tmp_path)
    assert test.main(test.parse_args([str(image_folder / "coffee.png"), "--load_size", "32"])) == 0
    assert "with model/epoch_19_model.pdparams" in capsys.readouterr().out
    assert os.listdir("model") == [path.name]


# -------------------------------------------------------------------------------------------------
# The authors' Caffe release


def test_caffe_release_gives_the_colors_of_the_authors(lightness, tmp_path, refused):
    network = flat_network(lightness)
    layers = caffe_layers(network)
    path = write_caffe(tmp_path / "release.caffemodel", layers)
    ours = run(path, lightness)
    assert_agree(ours, run(network, lightness))
    if importlib.util.find_spec("cv2"):  # OpenCV has its own reader of Caffe's files
        theirs = np.concatenate([run_by_opencv(path, network, SIDE, SIDE)(x[None] - 50) for x in lightness])
        np.testing.assert_allclose(ab_map(ours), theirs, atol=0.1)
    ones = np.ones(256)
    for change, message in (
        ({"conv8_313": []}, "missing or unknown: conv8_313.bias, conv8_313.weight"),
        ({"conv3_3norm": [ones, ones, np.zeros(1)]}, "a negative variance: conv3.6._mean"),  # never trained
        ({"conv3_3norm": [ones, ones[:3], ones[:1]]}, "conv3.6._variance is float64 [3] instead of"),
    ):
        changed = {**layers, **change}
        assert message in refused({f"{name}.{i}": x for name in changed for i, x in enumerate(changed[name])})


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
    network = small_network()
    before = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    assert initialize(network, ab_checkpoint) == "conv8_313"
    loaded = load_checkpoint(ab_checkpoint)
    for name, tensor in network.state_dict().items():
        expected = before[name] if name.startswith("conv8_313") else loaded[name]
        assert np.array_equal(tensor.numpy(), expected), name
    assert initialize(network, small_checkpoint) is None
    assert np.array_equal(network.conv8_313.weight, load_checkpoint(small_checkpoint)["conv8_313.weight"])


# -------------------------------------------------------------------------------------------------
# --load_model official


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Let the official address lead to a file, whose name ends with digits of its hash, or others."""

    def put(content, digits=None):
        name = f"release-{digits or hashlib.sha256(content).hexdigest()[:8]}.pth"
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(pretrained, "OFFICIAL_URL", (tmp_path / name).as_uri())
        monkeypatch.setattr("paddle.utils.download.WEIGHTS_HOME", str(tmp_path / "cache"))
        return tmp_path / name, tmp_path / "cache" / name

    return put


def test_official_weights_are_downloaded_to_the_cache_once(served, tmp_path, capsys):
    """Nothing is stored in the model folder, so the default weights do not change."""
    source, cached = served(b"PK the release")
    assert find_weights(tmp_path / "model", "official") == cached and not (tmp_path / "model").exists()
    assert cached.read_bytes() == b"PK the release"
    assert capsys.readouterr().err == f"downloading {source.as_uri()} to {cached}\n"
    source.unlink()
    assert find_weights(tmp_path / "model", "official") == cached


def test_failed_download_prints_one_line_and_leaves_nothing_in_the_cache(served, error_message):
    source, cached = served(b"PK not what it says", digits="9b330a0b")
    message = error_message(find_weights, "model", "official")
    assert re.search("download failed: its SHA-256 is [0-9a-f]{8}…, not 9b330a0b…; try again", message)
    source.unlink()
    message = error_message(find_weights, "model", "official")
    assert message.startswith(f"{source.as_uri()}: download failed (")
    assert message.endswith("; download it on another machine and pass its path: --load_model release-9b330a0b.pth")
    assert not cached.exists()


# -------------------------------------------------------------------------------------------------
# From a name to a file


def test_weights_are_found_by_name_or_path(tmp_path, error_message):
    message = f"x.caffemodel: no such checkpoint in {tmp_path}; available: small, official"
    assert error_message(find_weights, tmp_path, "x.caffemodel") == message
    (path := tmp_path / "epoch_3_model.safetensors").touch()
    (tmp_path / "epoch_best_model.pdparams").touch()
    assert error_message(find_weights, tmp_path, "19").endswith("available: 3, best, small, official")
    assert find_weights(tmp_path, "3") == find_weights("nowhere", path) == path


@pytest.mark.parametrize("existing", ["19 latest 20", "latest 3 best", "10 1 2 best", "best wide"])
def test_without_a_name_the_preferred_checkpoint_of_the_folder_is_used(tmp_path, capsys, existing):
    """The preferred one is the first of each list."""
    names = existing.split()
    for name in names:
        (tmp_path / f"epoch_{name}_model.pdparams").touch()
    assert find_weights(tmp_path) == tmp_path / f"epoch_{names[0]}_model.pdparams"
    assert (f"no --load_model: using {names[0]}" in capsys.readouterr().err) == (names[0] != "19")


# -------------------------------------------------------------------------------------------------
# The bundled weights


def test_folder_without_checkpoints_defaults_to_the_bundled_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert find_weights("./model") == find_weights(tmp_path, "small") == pretrained.SMALL
    assert not capsys.readouterr().err  # of people who never train
    assert find_weights(tmp_path) == pretrained.SMALL
    assert capsys.readouterr().err == f"no --load_model: using small, as {tmp_path} contains no 19\n"
    with pytest.raises(UserError, match="nowhere: no such folder$"):
        find_weights(tmp_path / "nowhere")


def test_reading_the_bundled_weights_draws_no_random_numbers():
    paddle.seed(0)
    expected = paddle.randn([3]).numpy()
    paddle.seed(0)
    load_network(pretrained.SMALL)
    assert np.array_equal(paddle.randn([3]).numpy(), expected)
    assert (nn.Linear(2, 2).weight.numpy() != 0).all()  # layers that are made later are random as ever


@pytest.mark.parametrize("format", ["safetensors", "pdparams"])
def test_entries_other_than_weights_must_be_numbers_within_limits(tmp_path, error_message, format):
    path = tmp_path / "weights"

    def write(**entries):
        if format == "safetensors":
            save_file({}, path, {name: str(value) for name, value in entries.items()})
        else:
            save_checkpoint({name: np.array(value) for name, value in entries.items()}, path)

    for entries in (
        {"load_size": 256, "temperature": 0.38, "epoch": None, "step": None},  # the defaults
        {"load_size": 4096, "temperature": 0.5, "epoch": 0, "step": 3},
    ):
        write(**{name: value for name, value in entries.items() if value is not None})
        assert {name: getattr(read_weights(path), name) for name in entries} == entries
    for name, wrong in (("load_size", 4097), ("temperature", np.nan), ("step", -1), ("epoch", 1.5)):
        write(**{name: wrong})
        assert re.search(rf"^{path}: {name}: .*{wrong}", error_message(read_weights, path))
