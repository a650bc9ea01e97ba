"""resources/ablation.py against the scripts that it builds on, scikit-image, and a bootstrap in a plain loop."""

import json
import os
import shutil

from support import files
from support.cli import EXIT_SKIPPED

import numpy as np
import paddle
import pytest
from conftest import PHOTOGRAPHS, SmallNetwork
from PIL import Image
from scipy.spatial import cKDTree
from skimage import data
from skimage.color import rgb2lab

import metrics_acc
import metrics_auc
import pretrained
import train
from dataset import crop_resized
from resources import ablation
from utils import load_ab_bins, load_prior, rebalancing_weights

FLAGS = {"non_rebalance": ["--rebalance", "False"], "full": ["--gamma", "0.5"], "rebalance": ["--gamma", "0"]}
FILES = [f"ablation{end}" for end in (".json", ".md", "_auc.png", "_bundled.jpg", "_curves.png", "_held_out.jpg")]
SYNSETS = metrics_acc.load_synsets()


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CIC", SmallNetwork)
        patch.setattr(pretrained, "CIC", SmallNetwork)
        yield


@pytest.fixture(scope="module")
def val_dir(tmp_path_factory):
    """Eight photographs of two shapes, in two class folders."""
    folder = tmp_path_factory.mktemp("val")
    for i, name in enumerate(PHOTOGRAPHS * 2):
        path = folder / SYNSETS[i % 2] / f"{name} {i}.png"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(getattr(data, name)()[20 * i :, 40 * i : 40 * i + 200])
        image.resize((72, 56) if i % 3 else (56, 80)).save(path)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, val_dir):
    """Three small networks, trained for some steps; validated on the same photographs."""
    folder = tmp_path_factory.mktemp("runs")
    for variant, flags in FLAGS.items():
        where = ["--model_path", str(folder / variant), "--log_path", str(folder / variant)]
        short = "--load_size 52 --crop_size 32 --batch_size 4 --num_epochs 6 --loss_step 1 --num_workers 0 --lr 1e-2"
        images = ["--image_dir", str(val_dir), "--val_dir", str(val_dir)]
        assert train.main(train.parse_args([*images, *where, *short.split(), *flags])) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, val_dir):
    """The flags of a random classifier that tells photographs apart, and of labels of which it gets some right."""
    folder = tmp_path_factory.mktemp("classifier")
    paddle.seed(0)
    network = paddle.vision.models.mobilenet_v2()
    network.eval()
    paths = sorted(val_dir.rglob("*.png"))
    images = np.stack([crop_resized(Image.open(path), 256, 224).transpose(2, 0, 1) for path in paths])
    with paddle.no_grad():
        shown = metrics_acc.as_float(paddle.to_tensor(images))
        mean, std = (paddle.to_tensor(x).reshape([1, 3, 1, 1]) for x in (metrics_acc.MEAN, metrics_acc.STD))
        logits = network((shown - mean) / std).numpy()
        last, spread = network.classifier[1], float(logits.std(axis=0).mean())
        last.weight.set_value(last.weight / spread)
        last.bias.set_value(paddle.to_tensor(-logits.mean(axis=0) / spread))
        classes = metrics_acc.top_classes(network, shown).numpy()
    paddle.save(network.state_dict(), str(folder / "mobilenet_v2.pdparams"))
    lines = [f"{path.name} {classes[i, i % 3]}\n" for i, path in enumerate(paths)]  # right at once: 0, 3, 6
    (folder / "labels.txt").write_text("".join(lines))
    weights, labels = str(folder / "mobilenet_v2.pdparams"), str(folder / "labels.txt")
    return ["--arch", "mobilenet_v2", "--weights", weights, "--labels", labels]


def run(runs, val_dir, output, *flags):
    """main's exit code and its JSON."""
    where = ["--runs", str(runs), "--val_dir", str(val_dir), "--save_path", str(output), "--load_size", "52"]
    few = ["--bootstrap", "50", "--num_workers", "0"]
    code = ablation.main(ablation.parse_args([*where, *few, *map(str, flags)]))
    return code, json.loads((output / "ablation.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory, runs, val_dir, classifier):
    """The folder and the JSON of a whole run."""
    output = tmp_path_factory.mktemp("whole") / "ablation"
    code, summary = run(runs, val_dir, output, *classifier)
    assert code == 0
    return output, summary


def value(summary, row, quantity):
    return summary["results"][row][quantity]["value"]


def one_variant(runs, tmp_path, variant="full"):
    """A folder of runs with one of them alone."""
    shutil.copytree(runs / variant, tmp_path / "one" / variant)
    return tmp_path / "one"


# -------------------------------------------------------------------------------------------------
# Figures


def pixel_figures(images, bin_weights):
    """AuC raw, rebalanced and own-rebalanced and chroma of (true ab, predicted ab, bins) of images, from definition."""
    true, predicted, bins = (np.concatenate(parts) for parts in zip(*images))
    distance = np.linalg.norm(true - predicted, axis=1)
    own = 1 / np.bincount(bins, minlength=313).clip(1)
    result = []
    for weights in (np.ones(len(bins)), bin_weights[bins], own[bins]):
        curve = [weights[distance <= t].sum() / weights.sum() for t in range(151)]
        result.append(sum((curve[t] + curve[t + 1]) / 2 for t in range(150)) / 150)
    return [*result, np.linalg.norm(predicted, axis=1).mean()]


def test_figures_and_intervals_are_those_of_a_loop_over_pixels(tmp_path):
    """Images of different sizes, a bootstrap that gathers the pixels of each resample again."""
    random = np.random.default_rng(1)
    weights = rebalancing_weights(load_prior(), lam=0).numpy().astype(np.float64)
    tree = cKDTree(load_ab_bins().numpy())
    paths, images, hits, kl = [], [], random.random((7, 2)) < 0.5, random.random(7)
    for i, name in enumerate((*PHOTOGRAPHS, *PHOTOGRAPHS[:3])):
        true = getattr(data, name)()[30 * i :: 9, 60:200:7][: 10 + 2 * i]
        colored = (true[..., ::-1] // (1 + i % 3) + 20 * i).astype(np.uint8)
        for kind, rgb in (("true", true), ("colored", colored)):
            paths.append(tmp_path / f"{kind} {i}.png")
            Image.fromarray(rgb).save(paths[-1])
        true_ab, colored_ab = (rgb2lab(rgb)[..., 1:].reshape(-1, 2) for rgb in (true, colored))
        images.append((true_ab, colored_ab, tree.query(true_ab)[1]))
    readable, measured, _ = ablation.compare(paths[::2], {"full": paths[1::2]}, num_workers=0)
    measured.update(hits={"full": hits}, kl={"full": kl})
    found = ablation.figures(measured, ablation.resamples(7, 40, seed=3), weights)

    assert readable == list(range(7))
    random = np.random.default_rng(3)
    draws = [np.arange(7), *(random.integers(7, size=7) for _ in range(40))]
    names = ("auc_raw", "auc_rebalanced", "auc_rebalanced_own", "chroma", "top1", "top5", "kl")
    for row in ("full", "gray"):
        versions = [(true, predicted if row == "full" else 0 * true, bins) for true, predicted, bins in images]
        expected = [
            [*pixel_figures([versions[i] for i in draw], weights), *hits[draw].mean(axis=0), kl[draw].mean()]
            for draw in draws
        ]
        for name, values in zip(names, np.transpose(expected)):
            if row == "gray" and name in names[4:]:
                assert name not in found["gray"]
                continue
            np.testing.assert_allclose(found[row][name], values, atol=5e-5, err_msg=f"{row} {name}")
            estimate = ablation.estimate(found[row][name])
            assert estimate["low"] == pytest.approx(np.quantile(values[1:], 0.025), abs=5e-5)
            assert estimate["high"] == pytest.approx(np.quantile(values[1:], 0.975), abs=5e-5)
    assert np.ptp(found["full"]["auc_rebalanced"]) > 0.01  # resamples that differ
    assert (found["true"]["auc_raw"] == 1).all() and (found["gray"]["chroma"] == 0).all()


def test_the_difference_is_paired_and_judged_by_its_interval():
    """Rows that vary together by much more than they differ."""
    common = np.random.default_rng(0).normal(0, 10, 1001)
    found = {
        "non_rebalance": {"auc_raw": common + 1},
        "full": {"auc_raw": common},
        "rebalance": {"auc_raw": common + 2},
    }
    found["gray"] = {"auc_raw": common}
    first, second = ablation.differences(found)[:2]
    assert (first["verdict"], first["value"]) == ("holds", pytest.approx(1))
    assert first["high"] - first["low"] < 1e-9
    assert (second["verdict"], second["value"]) == ("does not", pytest.approx(-2))
    noise = np.random.default_rng(1).normal(0, 1, 1001)
    noise[0] = 0
    for value in (0.5, -0.5):  # within the spread, whichever side it is on
        found["full"]["auc_raw"] = common + 1 - value - noise
        first = ablation.differences(found)[0]
        assert (first["verdict"], first["value"]) == ("undecided", pytest.approx(value))
    del found["full"]
    lines = ablation.differences(found)
    assert len(lines) == 2 and {line["verdict"] for line in lines} == {None}


def test_resamples_follow_from_the_seed():
    times = ablation.resamples(20, 30, seed=0)
    assert times.shape == (31, 20) and (times[0] == 1).all() and (times.sum(axis=1) == 20).all()
    assert (times == ablation.resamples(20, 30, seed=0)).all() and (times != ablation.resamples(20, 30, seed=1)).any()
    assert 0.2 < (times[1:] == 0).mean() < 0.5  # 1 / e in the mean


# -------------------------------------------------------------------------------------------------
# A whole run, against the scripts


@pytest.mark.parametrize("variant", FLAGS)
def test_auc_is_that_of_metrics_auc(done, val_dir, tmp_path, variant):
    output, summary = done
    colored = ["--results_dir", str(output / variant / "colored"), "--save_path", str(tmp_path), "--num_workers", "0"]
    assert metrics_auc.main(metrics_auc.parse_args(["--imgs_dir", str(val_dir), *colored])) == 0
    expected = json.loads((tmp_path / "auc.json").read_text())
    for kind in metrics_auc.KINDS:
        assert value(summary, variant, f"auc_{kind}") == pytest.approx(expected[f"auc_{kind}"], abs=1e-9)
        assert value(summary, "gray", f"auc_{kind}") == pytest.approx(expected["gray"][f"auc_{kind}"], abs=1e-9)
        assert value(summary, "true", f"auc_{kind}") == 1
    assert (summary["images"], summary["pixels"]) == (expected["images"], expected["pixels"])
    assert summary["prior"] == expected["prior"]
    others = [value(summary, row, "auc_raw") for row in (*FLAGS, "gray")]
    assert len({round(x, 4) for x in others}) == 4  # so that a mix-up would show


@pytest.mark.parametrize("variant", FLAGS)
def test_accuracy_is_that_of_metrics_acc(done, val_dir, tmp_path, classifier, variant):
    output, summary = done
    flags = ["--imgs_dir", str(val_dir), "--results_dir", str(output / variant / "colored"), "--num_workers", "0"]
    assert metrics_acc.main(metrics_acc.parse_args([*flags, "--save_path", str(tmp_path), *classifier])) == 0
    expected = json.loads((tmp_path / "accuracy.json").read_text())
    for row, name in ((variant, "colored"), ("true", "true"), ("gray", "gray")):
        assert {x: value(summary, row, x) for x in ("top1", "top5")} == pytest.approx(expected["accuracy"][name])
    assert value(summary, "true", "top1") == 3 / 8 and value(summary, "true", "top5") == 1
    assert summary["classifier"] == expected["classifier"]


@pytest.mark.parametrize("variant", FLAGS)
def test_kl_is_that_of_trainings_last_validation(done, runs, variant):
    lines = [json.loads(line) for line in (runs / variant / "train.jsonl").read_text().splitlines()]
    last = [line["val_kl"] for line in lines if "val_kl" in line][-1]
    assert value(done[1], variant, "kl") == pytest.approx(last, rel=1e-5)
    assert done[1]["runs"][variant]["steps"] == lines[-1]["step"] == 12


def test_kl_of_the_prior_alone(done, val_dir):
    prior, bins, found = load_prior().numpy().astype(np.float64), load_ab_bins().numpy(), []
    for path in val_dir.rglob("*.png"):
        ab = rgb2lab(crop_resized(Image.open(path), 52, 48)[::4, ::4])[..., 1:].reshape(-1, 2)
        distance, nearest = cKDTree(bins).query(ab, k=5)
        soft = np.exp(-(distance**2) / 50)
        soft /= soft.sum(axis=1, keepdims=True)
        found.append((soft * (np.log(soft) - np.log(prior[nearest]))).sum(axis=1).mean())
    assert value(done[1], "prior", "kl") == pytest.approx(np.mean(found), rel=1e-3)


def test_chroma_is_the_mean_over_all_pixels(done, val_dir):
    output, summary = done
    for row, folder in (("true", val_dir), *((v, output / v / "colored") for v in FLAGS)):
        labs = [rgb2lab(np.asarray(Image.open(path)))[..., 1:].reshape(-1, 2) for path in folder.rglob("*.png")]
        assert value(summary, row, "chroma") == pytest.approx(np.hypot(*np.concatenate(labs).T).mean(), rel=1e-4)
    assert value(summary, "gray", "chroma") == 0 < value(summary, "full", "chroma")


def test_what_is_written(done, runs):
    output, summary = done
    assert sorted(path.name for path in output.iterdir() if path.is_file()) == FILES
    for variant, described in summary["runs"].items():
        assert described["sha256"] == files.sha256(runs / variant / "epoch_latest_model.pdparams")
        assert described["flags"]["rebalance"] == (variant != "non_rebalance")
    # Every figure of the tables, as it is in the JSON.
    tables = (output / "ablation.md").read_text()
    results, pattern = (part.strip().splitlines() for part in tables.split(f"*{summary['images']} images")[0:2])
    assert results[0] == "|  | " + " | ".join(heading for heading, _ in ablation.QUANTITIES.values()) + " |"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in results[2:]}
    assert list(cells) == list(ablation.ROWS.values())
    for row, name in ablation.ROWS.items():
        for (quantity, (_, factor)), cell in zip(ablation.QUANTITIES.items(), cells[name]):
            figure = summary["results"][row].get(quantity)
            assert (cell == "–") == (figure is None)
            if figure is not None:
                shown = [float(x) for x in cell.replace("(", "").replace("– ", "").replace(")", "").split()]
                expected = [factor * figure[x] for x in ("value", "low", "high")]
                assert shown == pytest.approx(expected[: len(shown)], abs=0.0051)
                assert len(shown) == (3 if f"{expected[1]:.2f}" != f"{expected[2]:.2f}" else 1)
    assert len(summary["differences"]) == 9
    for line, written in zip(summary["differences"], pattern[-9:]):
        assert line["verdict"] in ("holds", "does not", "undecided") and written.endswith(f"| {line['verdict']} |")
        difference = value(summary, line["of"], line["quantity"]) - value(summary, line["minus"], line["quantity"])
        assert line["value"] == pytest.approx(difference, abs=1e-12)


def test_pictures(done):
    output, _ = done
    for name, rows in (("ablation_held_out.jpg", 6), ("ablation_bundled.jpg", 4)):
        with Image.open(output / name) as sheet:
            assert sheet.format == "JPEG" and sheet.width == 5 * 170 + 10
            assert rows * 80 < sheet.height <= rows * (120 + ablation.sheets.FOOT) + ablation.sheets.HEAD
        assert (output / name).stat().st_size < 250_000
    for name in ("ablation_curves.png", "ablation_auc.png"):
        with Image.open(output / name) as chart:
            assert chart.format == "PNG" and len(chart.convert("RGB").getcolors(10**6)) > 50
        assert (output / name).stat().st_size < 150_000


def test_columns_of_a_sheet_are_in_their_order(tmp_path):
    """Plain pictures in place of photographs: gray of the first, the versions, the first again."""
    paths = []
    for color in ((250, 10, 10), (10, 250, 10), (10, 10, 250)):
        paths.append(tmp_path / f"{color}.png")
        Image.new("RGB", (80, 60), color).save(paths[-1])
    ablation.save_sheet(paths[:1], {"non_rebalance": paths[1:2], "rebalance": paths[2:]}, tmp_path / "sheet.jpg")
    sheet = np.asarray(Image.open(tmp_path / "sheet.jpg")).astype(int)
    luma = round(0.299 * 250 + 0.587 * 10 + 0.114 * 10)
    expected = [(luma,) * 3, (10, 250, 10), (10, 10, 250), (250, 10, 10)]
    for column, color in enumerate(expected):
        assert np.abs(sheet[ablation.sheets.HEAD + 60, 10 + 170 * column + 80] - color).max() < 8
    assert sheet.shape == (ablation.sheets.HEAD + 120 + ablation.sheets.FOOT, 4 * 170 + 10, 3)


# -------------------------------------------------------------------------------------------------
# Runs that are missing, wrong or changed; broken images


def test_a_missing_variant_is_named_and_left_out(tmp_path, runs, val_dir, capsys):
    code, summary = run(one_variant(runs, tmp_path), val_dir, tmp_path / "out", "--arch", "none", "--panel", "2")
    captured = capsys.readouterr()
    assert (
        code == 0
        and "Non-rebalance is left out: " in captured.err
        and "Rebalance (λ = 0) is left out: " in captured.err
    )
    assert captured.out.splitlines()[-1].endswith("1 of 3 variants, 8 images")
    assert list(summary["results"]) == ["full", "gray", "prior", "true"] and summary["runs"]["rebalance"] is None
    tables = (tmp_path / "out" / "ablation.md").read_text()
    assert "| Rebalance (λ = 0) | *not trained yet* |" in tables and "| Full | *not" not in tables
    # Without accuracy neither its columns nor its difference; the other eight are not there either, as two are missing.
    assert "top-1" not in tables and tables.count("> 0 | *not trained yet* |") == 8
    with Image.open(tmp_path / "out" / "ablation_held_out.jpg") as sheet:
        assert sheet.width == 3 * 170 + 10


def test_no_variant_at_all(tmp_path, val_dir, stopped):
    args = ablation.parse_args(["--runs", str(tmp_path), "--val_dir", str(val_dir), "--save_path", str(tmp_path / "o")])
    assert "no trained variant in its folders non_rebalance, full, rebalance" in stopped(ablation.main, args)


def test_another_variant_in_the_folder_is_refused(tmp_path, runs, val_dir, stopped):
    shutil.copytree(runs / "rebalance", tmp_path / "runs" / "full")
    args = ablation.parse_args(["--runs", str(tmp_path / "runs"), "--val_dir", str(val_dir)])
    message = stopped(ablation.main, args)
    assert "trained with --rebalance True --gamma 0.0, which is not Full" in message


def test_a_result_amid_the_photographs_is_refused(runs, val_dir, stopped):
    where = ["--runs", str(runs), "--val_dir", str(val_dir), "--save_path", str(val_dir / "out")]
    assert "lies in --val_dir" in stopped(ablation.main, ablation.parse_args(where))


def test_colors_anew_only_what_changed(tmp_path, runs, val_dir, stopped):
    """What is there stays; what is missing comes back; another checkpoint's colors go, strays among them."""
    args = ablation.parse_args(["--val_dir", str(val_dir), "--load_size", "52", "--num_workers", "0"])
    folder = tmp_path / "full" / "colored"

    def color(variant):
        ablation.color(runs / variant / "epoch_latest_model.pdparams", val_dir, folder, args)
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}

    first = color("full")
    kept, missing = sorted(folder.rglob("*.png"))[:2]
    Image.new("RGB", (8, 8)).save(kept)  # a mark
    missing.unlink()
    second = color("full")
    assert len(first) == 8 and {path for path in first if first[path] != second[path]} == {kept.relative_to(folder)}
    (folder / "stray.png").write_bytes(kept.read_bytes())
    third = color("rebalance")
    assert third.keys() == first.keys() and all(third[path] != first[path] for path in first)
    assert color("full") == first
    os.remove(folder.with_suffix(".json"))
    assert "not written by this script" in stopped(color, "full")


def test_a_broken_image_is_named_and_left_out(tmp_path, runs, val_dir, done, capsys):
    """The figures are those without it."""
    images = tmp_path / "val"
    shutil.copytree(val_dir, images)
    whole = next(images.rglob("*.png")).read_bytes()
    (images / SYNSETS[0] / "a broken.png").write_bytes(whole[: len(whole) // 2])
    code, summary = run(one_variant(runs, tmp_path), images, tmp_path / "out", "--arch", "none")
    captured = capsys.readouterr()
    assert code == EXIT_SKIPPED and summary["images"] == 8
    assert summary["left_out"] == {"unreadable": [f"{SYNSETS[0]}/a broken"]}
    assert f"skipped {images / SYNSETS[0] / 'a broken.png'}: " in captured.err
    assert captured.out.splitlines()[-1].endswith("1 of 3 variants, 8 images, 1 skipped")
    for quantity in ("auc_raw", "auc_rebalanced_own", "chroma", "kl"):
        assert summary["results"]["full"][quantity] == pytest.approx(done[1]["results"]["full"][quantity], rel=1e-5)


def test_worker_processes_give_the_same(tmp_path, runs, val_dir, done):
    _, summary = run(one_variant(runs, tmp_path), val_dir, tmp_path / "out", "--arch", "none", "--num_workers", "2")
    expected = done[1]["results"]["full"]
    for quantity, figure in summary["results"]["full"].items():
        assert figure == pytest.approx(expected[quantity], rel=1e-6)


def test_a_line_of_the_log_that_was_cut_off(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"step": 1, "kl": 2.0}\n{"step": 1, "val_kl": 3.0}\n{"step": 2, "k')
    assert ablation.read_log(tmp_path) == [{"step": 1, "kl": 2.0}, {"step": 1, "val_kl": 3.0}]
    assert ablation.read_log(tmp_path / "none") == []
    ablation.plot_curves({"full": ablation.read_log(tmp_path), "rebalance": []}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"
