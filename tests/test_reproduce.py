"""The steps of an evaluation, one after another: get_invalid_images.py, test.py, then both metrics."""

import json
import subprocess
from pathlib import Path

from support.checkpoints import save_checkpoint

import numpy as np
import paddle
import pytest
from conftest import save_image
from PIL import Image
from skimage import data

import get_invalid_images
import metrics_acc
import metrics_auc
import test
from model import CIC

ROOT = Path(get_invalid_images.__file__).parent
SYNSETS = ("n01443537", "n02123045", "n04285008")
IMAGES = [data.coffee()[:200, :300], data.chelsea()[50:250, 50:350], data.rocket()[100:300, 200:500]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write an untrained colorization network and a classifier with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    paddle.seed(0)
    save_checkpoint(CIC().state_dict(), folder / "epoch_19_model.pdparams")
    paddle.save(paddle.vision.models.squeezenet1_1().state_dict(), str(folder / "squeezenet1_1.pdparams"))
    return folder


@pytest.mark.parametrize(("layout", "crop"), [("synsets", False), ("flat", True)])
def test_three_steps_of_evaluation_give_results_for_all_suitable_images(tmp_path, monkeypatch, weights, layout, crop):
    monkeypatch.chdir(tmp_path)
    folders = [f"val/{synset}" if layout == "synsets" else "val" for synset in SYNSETS]
    names = [f"{folder}/ILSVRC2012_val_0000000{i}" for i, folder in enumerate(folders)]
    for name, image in zip(names, IMAGES):
        path = save_image(tmp_path / f"{name}.JPEG", image)
        Image.fromarray(image).convert("L").save(path.with_name(path.stem + "9.JPEG"))
    path.with_name("truncated.JPEG").write_bytes(path.read_bytes()[:3000])
    Path("labels.txt").write_text("".join(f"{Path(name).name}.JPEG {s}\n" for name, s in zip(names, SYNSETS)))

    # 1. Clean the test set
    assert get_invalid_images.main(get_invalid_images.parse_args(["--image_dir", "val"])) == 0
    subprocess.run(["bash", "remove_invalid.sh"], check=True)
    assert sorted(str(path.with_suffix("")) for path in Path("val").rglob("*.JPEG")) == sorted(names)

    # 2. Colorize it
    sizes = ["--load_size", "64", "--crop_size", "56"] if crop else ["--load_size", "64"]
    assert test.main(test.parse_args(["--image_dir", "val", "--model_path", str(weights), *sizes])) == 0
    results = sorted(Path("result").rglob("*.png"))
    assert [str(path.with_suffix("")) for path in results] == sorted(n.replace("val", "result", 1) for n in names)

    # 3. Evaluate
    assert metrics_auc.main(metrics_auc.parse_args(["--image_dir", "val"])) == 0
    arguments = ["--image_dir", "val", "--arch", "squeezenet1_1", "--weights", str(weights / "squeezenet1_1.pdparams")]
    arguments += ["--labels", "labels.txt"] if layout == "flat" else []
    assert metrics_acc.main(metrics_acc.parse_args(arguments)) == 0
    area = json.loads(Path("metrics/auc.json").read_text())
    accuracy = json.loads(Path("metrics/accuracy.json").read_text())
    assert area["images"] == accuracy["images"] == accuracy["classes"] == 3
    assert area["pixels"] == (3 * 56 * 56 if crop else sum(image[..., 0].size for image in IMAGES))
    assert list(accuracy["accuracy"]) == ["colored", "true", "gray"]
    # An untrained network predicts nearly one color everywhere: near gray, and far from the true colors.
    assert 0.5 < area["auc_raw"] < 0.99
    lightness = [np.asarray(Image.open(path).convert("L"), float).std() for path in results]
    assert min(lightness) > 5  # pictures, not plain areas
