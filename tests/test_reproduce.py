"""docs/reproduce.md in miniature."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import ROOT, save_image
from PIL import Image
from skimage import data

SYNSETS = ("n01443537", "n02123045", "n04285008")
IMAGES = [data.coffee()[:200, :300], data.chelsea()[50:250, 50:350], data.rocket()[100:300, 200:500]]


SMALLER = {  # commands of the page: the same for a set of 40 images
    "--load_size 256 --crop_size 256": "--load_size 64 --crop_size 56",
    "--max_steps 450000": "--max_steps 3 --load_size 40 --crop_size 32 --batch_size 4 --num_workers 0",
    "--load_model official": "--load_model small",
    'classifier=""': 'classifier="--arch squeezenet1_1 --weights classifier.pdparams"',
}
ROWS = ("full", "non_rebalance", "rebalance", "l2", "l2_ft", "official")


def save_crop(path, i):
    crop = Image.fromarray(np.roll(IMAGES[i % 3], 29 * i, axis=1)).resize((100 + i, 90))
    save_image(path, np.asarray(crop))


def make_imagenet(folder, names):
    """Write ImageNet's two archives in their official layout: one archive per class, and a flat one of `names`."""
    for i, synset in enumerate((*SYNSETS, "n01440764")):
        for j in range(5):
            save_crop(folder / "raw" / synset / f"{synset}_{j}.JPEG", 5 * i + j)
        shutil.make_archive(folder / "raw" / "train" / synset, "tar", folder / "raw" / synset)
    for i, name in enumerate(names):
        save_crop(folder / "raw" / "val" / f"{name}.JPEG", 20 + i)
    for part in ("train", "val"):
        shutil.make_archive(folder / f"ILSVRC2012_img_{part}", "tar", folder / "raw" / part)


@pytest.fixture
def project(tmp_path):
    """Copy the project, with split lists of ten images each. Return the copy."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("support", "resources"):
        shutil.copytree(ROOT / name, tmp_path / name)
    script, table = (tmp_path / "resources" / name for name in ("imagenet_splits.py", "ctest10k.txt"))
    script.write_text(script.read_text().replace("VALIDATION_IMAGES = 10_000", "VALIDATION_IMAGES = 10"))
    table.write_text("".join(f"{synset} {30_000 + i} {40_000 + i} {45_000 + i}\n" for i, synset in enumerate(SYNSETS)))
    return tmp_path


@pytest.mark.slow
def test_all_commands_of_the_page_lead_to_the_table(project):
    test_set = [f"ILSVRC2012_val_{number + i:08d}" for i in range(3) for number in (30_000, 40_000, 45_000)]
    make_imagenet(project, [*(f"ILSVRC2012_val_{i:08d}" for i in range(1, 12)), *test_set])
    paddle.save(paddle.vision.models.squeezenet1_1().state_dict(), str(project / "classifier.pdparams"))
    page = (ROOT / "docs" / "reproduce.md").read_text("utf-8")
    for command, smaller in SMALLER.items():
        assert command in page
        page = page.replace(command, smaller)
    (project / "page.sh").write_text("".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "page.sh"]
    done = subprocess.run(command, cwd=project, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ctest10k: 9 of 9 images (links)" in done.stdout and "val10k: 10 of 10 images (links)" in done.stdout
    assert "from 20 color images" in done.stdout and not list((project / "imagenet" / "train").glob("*.tar"))

    def read(name):
        return json.loads((project / f"{name}.json").read_text())

    for name in ("gray_auc", "random_auc", "random_accuracy"):
        assert read(f"metrics/{name}")["images"] == 9
    table = read("ablation/ablation")["results"]
    assert sorted(table) == sorted((*ROWS, "gray", "true"))
    weights = set()
    for row in ROWS:
        area, accuracy = (read(f"metrics/{row}/{x}") for x in ("auc", "accuracy"))
        assert area["pixels"] == 9 * 56 * 56 and area["load_size"] == 64 and area["left_out"] == {}
        for quantity in ("auc_raw", "auc_rebalanced", "chroma"):
            assert table[row][quantity]["value"] == pytest.approx(area[quantity], abs=1e-9)
        assert table[row]["top1"]["value"] == accuracy["accuracy"]["colored"]["top1"]
        weights.add(area["coloring"]["sha256"])
    assert len(weights) == len(ROWS)
    for heading in ("no rebalancing", "λ = 0.5 (full)", "λ = 0", "L2", "L2, ft", "official", "gray (ab = 0)"):
        assert f"| {heading} | " in done.stdout
