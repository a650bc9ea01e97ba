"""The examples in docs/coloring.md before its notebook, unchanged: each colorizes an image as test.py does."""

import re
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT
from PIL import Image
from skimage import data

import test
from pretrained import SMALL, load_network
from resources import export_onnx

EXAMPLES = re.findall("```python\n(.*?)```", (ROOT / "docs" / "coloring.md").read_text("utf-8"), re.DOTALL)[:3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write photo.jpg and its result by test.py. Return their folder."""
    folder = tmp_path_factory.mktemp("examples")
    Image.fromarray(data.coffee()).save(folder / "photo.jpg")
    flags = ["--load_model", "small", "--result_path", str(folder / "result")]
    assert test.main(test.parse_args([str(folder / "photo.jpg"), *flags])) == 0
    return folder


def difference(folder, example, *path):
    """Run an example. Return the absolute difference of its result and that of test.py: uint8 steps, [H, W, 3]."""
    setup = f"import sys; DIR = {str(ROOT)!r}; sys.path[:0] = {list(path)!r}\n"
    subprocess.run([sys.executable, "-W", "ignore", "-c", setup + example], cwd=folder, check=True)
    images = (Image.open(folder / name) for name in ("colored.png", "result/photo.png"))
    return np.abs(np.subtract(*(np.asarray(image).astype(int) for image in images)))


@pytest.mark.slow
def test_python_and_the_hub_give_the_same_pixels(folder):
    python, hub, _ = EXAMPLES
    assert not difference(folder, python, str(ROOT)).any()
    assert not difference(folder, hub).any()


@pytest.mark.slow
def test_onnx_gives_the_same_ab_at_any_size_and_the_same_colors(folder):
    pytest.importorskip("paddle2onnx", reason="paddle2onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    output = folder / "small.onnx"
    assert export_onnx.main(export_onnx.parse_args(["--load_model", "small", "--output", str(output)])) == 0
    session = onnxruntime.InferenceSession(str(output))
    network = export_onnx.NetworkToAb(load_network(SMALL))
    network.eval()
    for shape in ((1, 1, 112, 168), (3, 1, 64, 40), (2, 1, 8, 8)):
        lightness = np.random.default_rng(0).uniform(-50, 50, shape).astype(np.float32)
        for temperature in np.float32([[0.38], [1]]):
            (ab,) = session.run(None, {"lightness": lightness, "temperature": temperature})
            with paddle.no_grad():
                expected = network(paddle.to_tensor(lightness), paddle.to_tensor(temperature))
            assert np.abs(ab - expected.numpy()).max() < 0.01
    # The example uses scikit-image's Lab in float64. test.py uses bf16 where the CPU supports it.
    steps = difference(folder, EXAMPLES[2])
    assert steps.mean() < 1 and np.quantile(steps, 0.99) <= 4


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
