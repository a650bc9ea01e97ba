"""README, README_cn and docs/: links, flags and functions exist, examples run, and the Chinese page is in step."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import ROOT, same_values
from PIL import Image
from skimage import data

import test
from pretrained import SMALL, load_network
from resources import export_onnx

LINK = r"""(?:\]\(|(?:src|href)=")(?!https?://)([^)"]+)"""
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("resources/*.md"), *ROOT.glob("tests/**/*.md")]


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_existing_files_and_headings(page):
    for link in re.findall(LINK, page.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_in_chinese_has_the_commands_links_and_headings_of_the_english_one():
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README_cn.md"))
    for pattern in (r"^ *(?:python|pip|visualdl) [^#\n]+", LINK, r"^(##) "):
        ours, theirs = ([x.strip() for x in re.findall(pattern, page, re.M)] for page in (english, chinese))
        assert [x for x in ours if x != "README_cn.md"] == [x for x in theirs if x != "README.md"]


def test_named_functions_exist():
    """Pages name them as `module.name`."""
    pattern = r"`(dataset|model|train|utils|colorizer)\.(?!py|jsonl)(\w+)"
    found = {named for page in PAGES for named in re.findall(pattern, page.read_text("utf-8"))}
    for module, name in found:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    assert {("utils", "annealed_mean"), ("train", "classification")} <= found


def test_commands_in_documents_have_existing_flags(capsys):
    """Scripts in subfolders may be named within their folder."""
    used = defaultdict(set)
    for page in PAGES:
        text = re.sub(r"\s*\\\n\s*", " ", page.read_text("utf-8"))
        for script, rest in re.findall(r"\b((?:resources/)?\w+)\.py\b([^`#\n]*)", text):
            used[script].update(re.findall(r"--\w+", rest))
    for script, flags in used.items():
        found = [x for x in (script, f"resources/{script}") if (ROOT / f"{x}.py").exists()]
        if found and flags:
            with pytest.raises(SystemExit):
                importlib.import_module(found[0].replace("/", ".")).parse_args(["--help"])
            assert flags <= {*re.findall(r"--\w+", capsys.readouterr().out)}, script
        assert found or not flags or (ROOT / "tests" / "benchmarks" / f"{script}.py").exists(), script
    assert {"train", "test", "metrics_auc", "metrics_acc", "resources/ablation"} <= {*used}


# -------------------------------------------------------------------------------------------------
# Examples, unchanged: each colorizes an image as test.py does


def examples(page):
    return re.findall("```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


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
    python, hub, *_ = examples("docs/coloring.md")
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
    for shape, temperature in (((1, 1, 112, 168), 0.38), ((3, 1, 64, 40), 1)):
        lightness, t = np.random.default_rng(0).uniform(-50, 50, shape).astype(np.float32), np.float32([temperature])
        (ab,) = session.run(None, {"lightness": lightness, "temperature": t})
        with paddle.no_grad():
            expected = network(paddle.to_tensor(lightness), paddle.to_tensor(t))
        assert np.abs(ab - expected.numpy()).max() < 0.01
    # The example uses scikit-image's Lab in float64, which clips colors out of gamut. test.py uses bf16 where the CPU
    # supports it.
    steps = difference(folder, *examples("resources/README.md"))
    assert steps.mean() < 1 and np.quantile(steps, 0.97) <= 4


@pytest.mark.slow
def test_weights_are_published_as_safetensors(cic_checkpoint, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(cic_checkpoint, tmp_path / "model" / "epoch_19_model.pdparams")
    (example,) = examples("docs/weights.md")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=environment, check=True)
    published, weights = load_network(tmp_path / "epoch_19_model.safetensors"), load_network(cic_checkpoint)
    assert same_values(published.state_dict(), weights.state_dict())


@pytest.mark.slow
def test_cell_of_the_notebook_runs(tmp_path):
    """The cell that clones and installs is skipped."""
    pytest.importorskip("IPython")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("support", "resources"):
            (tmp_path / path.name).symlink_to(path)
    *_, cell = examples("docs/coloring.md")
    run = "import sys, IPython; IPython.InteractiveShell.instance().run_cell(sys.argv[1]).raise_error()"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-c", run, cell]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "demo" / "pairs.png").exists() and "Image object" in done.stdout
