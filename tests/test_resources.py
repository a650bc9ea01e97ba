"""The bundled tables and weights, and the scripts that make them."""

from support.checkpoints import load_checkpoint

import numpy as np
import paddle
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.numpy import save_file
from skimage import color

from pretrained import SMALL, load_network, read_weights
from resources import demo, estimate_prior, export_onnx, make_pts_in_hull, make_small
from utils import load_ab_bins, load_prior, rebalancing_weights


def test_bundled_bins_match_their_script_in_the_published_order():
    bins = np.load(ROOT / "resources" / "pts_in_hull.npy")
    assert bins.dtype == np.int64 and bins.shape == (313, 2)
    assert np.array_equal(bins, make_pts_in_hull.ab_bins()) and np.array_equal(load_ab_bins().numpy(), bins)
    assert bins.tolist() == sorted(bins.tolist()) and bins[0].tolist() == [-90, 50] and bins[-1].tolist() == [100, 0]


def test_all_bins_except_four_follow_from_the_srgb_gamut():
    """Bins are the corners of 10x10 cells that contain an sRGB color; the published table has four more."""
    levels = np.arange(256, dtype=np.uint8)
    plane = np.stack(np.meshgrid(levels, levels), axis=-1).reshape(-1, 2)
    faces = [np.insert(plane, channel, end, axis=1) for channel in range(3) for end in (0, 255)]  # of the RGB cube
    ab = color.rgb2lab(np.concatenate(faces))[:, 1:]
    cells = np.unique(np.floor(ab / 10).astype(int), axis=0) * 10
    corners = {(a + i, b + j) for a, b in cells.tolist() for i in (0, 10) for j in (0, 10)}
    table = {tuple(x) for x in make_pts_in_hull.ab_bins().tolist()}
    assert table - corners == {(40, 90), (100, -90), (100, -10), (100, 0)}


def test_bundled_prior_has_no_zeros_and_nearly_the_weights_of_imagenet():
    prior = np.load(ROOT / "resources" / "prior_probs.npy")
    assert prior.dtype == np.float64 and prior.shape == (313,) and prior.min() > 0 and abs(prior.sum() - 1) < 1e-12
    weights = rebalancing_weights(load_prior()).numpy()  # over ImageNet's training set: 0.097 to 6.17
    assert weights.min() == pytest.approx(0.097, rel=0.05) and weights.max() == pytest.approx(6.17, rel=0.05)


def test_make_small_adjusts_logits_rounds_to_int8_and_stores_the_size(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    weights = {"conv1.0.weight": random.normal(size=(4, 6, 3, 3)), "conv8.0.weight": random.normal(size=(6, 3, 4, 4))}
    bias = random.normal(size=313).astype(np.float32)
    source, result = tmp_path / "trained.safetensors", tmp_path / "small.safetensors"
    save_file({**{x: y.astype(np.float32) for x, y in weights.items()}, "conv8_313.bias": bias}, source)
    monkeypatch.setattr(make_small, "SMALL", result)
    make_small.main(make_small.parse_args([str(source)]))
    state = load_checkpoint(result)
    strength = (bias - state["conv8_313.bias"]) / np.log(rebalancing_weights(load_prior()).numpy())
    np.testing.assert_allclose(strength, make_small.STRENGTH, atol=1e-4)
    for (name, weight), axes in zip(weights.items(), ((1, 2, 3), (0, 2, 3))):  # all except output channels
        half_a_step = np.abs(weight).max(axis=axes, keepdims=True) / 127 / 2
        assert 0 < np.max(np.abs(state[name] - weight) / half_a_step) < 1.001
    assert read_weights(result).load_size == read_weights(SMALL).load_size == make_small.LOAD_SIZE


def test_custom_prior_is_the_mean_gaussian_over_all_bins(tmp_path, square_crops):
    """Compare with a dense float64 computation over every pixel; gray and unreadable files do not count."""
    folder = tmp_path / "set"
    folder.mkdir()
    pixels = []
    for path in sorted(square_crops.iterdir())[:2]:
        image = Image.open(path).resize((256, 256), Image.Resampling.BILINEAR)
        image.save(folder / path.name)
        pixels.append(np.asarray(image))
    Image.new("RGB", (300, 200), "gray").save(folder / "gray.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff nothing")
    output = tmp_path / "prior.npy"
    flags = ["--image_dir", str(folder), "--output", str(output), "--num_workers", "0"]
    assert estimate_prior.main(estimate_prior.parse_args(flags)) == 3

    ab = color.rgb2lab(np.stack(pixels)).reshape(-1, 3)[:, 1:]
    bins = make_pts_in_hull.ab_bins()
    expected = np.zeros(313)
    for part in np.array_split(ab, 50):
        weights = np.exp(-((part[:, None] - bins) ** 2).sum(axis=2) / 50)
        expected += (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
    expected = (expected + 1) / (expected + 1).sum()
    # The script counts colors in cells of a quarter unit, which only matters far from all colors.
    assert np.abs(np.load(output) - expected).sum() < 1e-3
    np.testing.assert_allclose(np.load(output), expected, rtol=0.2)


def test_images_without_color_have_no_prior(tmp_path, error_message):
    Image.new("RGB", (30, 20), "gray").save(tmp_path / "gray.png")
    flags = f"--image_dir {tmp_path} --output {tmp_path}/prior.npy --num_workers 0"
    assert "no color image" in error_message(estimate_prior.main, estimate_prior.parse_args(flags.split()))


def test_demo_uses_the_images_bundled_with_installed_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES", {**demo.IMAGES, "sklearn": "", "nobody_has_this": "a.png"})
    assert demo.copy_images(tmp_path) == 6
    assert (tmp_path / "rocket.jpg").exists() and (tmp_path / "grace_hopper.jpg").exists()


@pytest.mark.slow
def test_onnx_of_a_network_that_predicts_ab_has_no_temperature(ab_checkpoint, tmp_path):
    pytest.importorskip("paddle2onnx", reason="paddle2onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    output = tmp_path / "ab.onnx"
    export_onnx.main(export_onnx.parse_args(["--load_model", str(ab_checkpoint), "--output", str(output)]))
    network = load_network(ab_checkpoint)
    network.eval()
    lightness = np.random.default_rng(0).uniform(-50, 50, (2, 1, 24, 40)).astype(np.float32)
    (ab,) = onnxruntime.InferenceSession(str(output)).run(["ab"], {"lightness": lightness})
    assert np.abs(ab - network(paddle.to_tensor(lightness)).numpy()).max() < 1e-3
