"""resources/ablation.py, compared with the metrics' scripts, and with a bootstrap in a plain loop."""

import json
import shutil

from support.cli import EXIT_SKIPPED
from support.folders import pair_images
from support.images import crop_resized
from support.sheets import FOOT, HEAD

import numpy as np
import pytest
from conftest import BUNDLED_IMAGES, bundled_image, save_image
from metrics_by_definition import classify
from PIL import Image

import metrics_acc
import metrics_auc
from dataset import COLORING, RECORDS
from resources import ablation

VARIANTS = ("non_rebalance", "full", "rebalance")
SYNSETS = metrics_acc.load_synsets()


@pytest.fixture(scope="module")
def val_dir(tmp_path_factory):
    """Eight images of different shapes, in two class folders."""
    folder = tmp_path_factory.mktemp("val")
    for i, name in enumerate(BUNDLED_IMAGES * 2):
        part = bundled_image(name).crop((40 * i, 20 * i, 40 * i + 200, 20 * i + 160))
        part = part.resize((72 - 2 * i, 56) if i % 3 else (56, 80))
        save_image(folder / SYNSETS[i % 2] / f"{name} {i}.png", np.asarray(part))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory, val_dir):
    """Three folders of images colored in three ways, and one of their square crops."""
    folder = tmp_path_factory.mktemp("results")
    for path in sorted(val_dir.rglob("*.png")):
        image, name = np.asarray(Image.open(path)), path.relative_to(val_dir)
        for i, variant in enumerate(VARIANTS):
            colored = (image[..., ::-1] // (1 + i) + 20 * (3 - i)).astype(np.uint8)
            save_image(folder / variant / name, colored)
        save_image(folder / "square_crops" / name, crop_resized(Image.fromarray(image), 40, 32)[..., ::-1])
    (folder / "square_crops" / "coloring.json").write_text('{"load_size": 40, "crop_size": 32}')
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory, val_dir):
    """Write a file of labels, in which images 0, 3 and 6 have their most likely class and others one of the next."""
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    images = sorted(val_dir.rglob("*.png"))
    _, classes = metrics_acc.measure(classify, [(None, None, image) for image in images])
    path.write_text("".join(f"{image.name} {classes['colored'][i, i % 3]}\n" for i, image in enumerate(images)))
    return path


def run(val_dir, results, rows, output, *flags):
    """Return main's exit code and its JSON."""
    where = ["--val_dir", str(val_dir), "--save_path", str(output), "--results", *(str(results / row) for row in rows)]
    few = ["--bootstrap", "50", "--num_workers", "0"]
    code = ablation.main(ablation.parse_args([*where, *few, *map(str, flags)]))
    return code, json.loads((output / "ablation.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory, val_dir, results, labels):
    """Return the output folder and the JSON of a whole run; its tables sort the rows."""
    output = tmp_path_factory.mktemp("whole") / "ablation"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_acc, "load_classifier", lambda arch, weights: classify)
        code, summary = run(val_dir, results, sorted(VARIANTS), output, "--labels", labels)
    assert code == 0
    return output, summary


def value(summary, row, quantity):
    return summary["results"][row][quantity]["value"]


# -------------------------------------------------------------------------------------------------
# Values


def test_values_and_intervals_agree_with_those_of_each_resample(val_dir, results):
    """The images have different sizes, which pooling has to respect."""
    pairs, _, _ = pair_images(val_dir, results / "full", COLORING, RECORDS)
    images = [*metrics_auc.measure(pairs)[0].values()]
    hits, weights = np.random.default_rng(1).random(8) < 0.5, metrics_auc.inverse_prior(None)
    times = ablation.resamples(8, 20, seed=3)
    found = ablation.evaluate({"full": metrics_auc.stack(images)}, {"full": {"top1": hits}}, times, weights)
    random = np.random.default_rng(3)
    draws = [np.arange(8), *(random.integers(8, size=8) for _ in range(20))]
    for i, draw in enumerate(draws):
        sums = metrics_auc.pool(metrics_auc.stack([images[j] for j in draw]), np.ones((1, 8)))
        expected = {**metrics_auc.evaluate(sums, weights)["colored"], "top1": [hits[draw].mean()]}
        assert expected.keys() == found["full"].keys()
        for quantity, values in found["full"].items():
            assert values[i] == pytest.approx(expected[quantity][0])
    values = found["full"]["auc_rebalanced"]
    assert np.ptp(values) > 0.01 and "psnr" not in found["true"]
    estimate = ablation.estimate(values)
    interval = np.quantile(values[1:], [0.025, 0.975])
    assert [estimate[x] for x in ("value", "low", "high")] == pytest.approx([values[0], *interval], rel=1e-4)


def test_differences_of_the_expected_order_are_paired_and_judged_by_their_interval():
    """The rows vary together by much more than they differ."""
    common = np.random.default_rng(0).normal(0, 10, 1001)
    noise = np.append(0, np.random.default_rng(1).normal(0, 1, 1000))
    chroma = {"rebalance": common + 2, "full": common, "non_rebalance": common + noise - 0.5, "l2_ft": common + 4}
    found = {row: {"chroma": values} for row, values in {**chroma, "gray": common, "96": common}.items()}
    lines = [(x["of"], x["minus"], pytest.approx(x["value"]), x["verdict"]) for x in ablation.differences(found)]
    assert lines == [
        ("rebalance", "full", 2, "holds"),
        ("full", "non_rebalance", 0.5, "undecided"),
        ("non_rebalance", "l2_ft", -4.5, "does not"),
    ]
    assert list(ablation.find_rows(["b/l2_ft", "b/other", "a/full"])) == ["full", "l2_ft", "other"]


# -------------------------------------------------------------------------------------------------
# A whole run, against the scripts


def test_values_agree_with_those_of_the_metrics_scripts(done, val_dir, results, tmp_path, labels, monkeypatch):
    _, summary = done
    monkeypatch.setattr(metrics_acc, "load_classifier", lambda arch, weights: classify)
    where = ["--image_dir", str(val_dir), "--result_path", str(results / "rebalance"), "--save_path", str(tmp_path)]
    assert metrics_auc.main(metrics_auc.parse_args([*where, "--num_workers", "0"])) == 0
    assert metrics_acc.main(metrics_acc.parse_args([*where, "--num_workers", "0", "--labels", str(labels)])) == 0
    auc, accuracy = (json.loads((tmp_path / name).read_text()) for name in ("auc.json", "accuracy.json"))
    for quantity in (*(f"auc_{kind}" for kind in metrics_auc.KINDS), "chroma", "colorfulness", "psnr"):
        assert value(summary, "rebalance", quantity) == pytest.approx(auc[quantity], abs=1e-9)
        assert value(summary, "gray", quantity) == pytest.approx(auc["gray"][quantity], abs=1e-9)
    assert value(summary, "true", "colorfulness") == pytest.approx(auc["true"]["colorfulness"])
    assert (summary["images"], summary["prior"]) == (auc["images"], auc["prior"])
    for row, name in (("rebalance", "colored"), ("true", "true"), ("gray", "gray")):
        found = {x: value(summary, row, x) for x in ("top1", "top5")}
        assert found == pytest.approx(accuracy["accuracy"][name])
    assert value(summary, "true", "top1") == 3 / 8 and value(summary, "true", "top5") == 1
    assert summary["classifier"] == accuracy["classifier"]
    assert len({round(value(summary, row, "auc_raw"), 4) for row in (*VARIANTS, "gray")}) == 4  # a mix-up would show


def test_tables_contain_the_values_of_the_json(done):
    output, summary = done
    assert sorted(path.name for path in output.iterdir()) == [
        f"ablation{end}" for end in (".json", ".md", "_auc.png", "_sheet.jpg")
    ]
    tables = (output / "ablation.md").read_text()
    results, pattern = (part.strip().splitlines() for part in tables.split("*8 images"))
    assert results[0] == "|  | " + " | ".join(heading for heading, _ in ablation.QUANTITIES.values()) + " |"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in results[2:]}
    assert list(cells) == [ablation.ROWS[row] for row in (*VARIANTS, "gray", "true")]
    chroma = summary["results"]["full"]["chroma"]
    assert "{value:.2f} ({low:.2f} – {high:.2f})".format(**chroma) in cells["λ = 0.5 (full)"]
    assert cells["ground truth"][:3] == ["100.00"] * 3 and cells["ground truth"][-1] == "–"
    assert len(summary["differences"]) == 9
    for line, written in zip(summary["differences"], pattern[-9:]):
        assert written.endswith(f"| {line['verdict']} |")


def test_contact_sheet_shows_gray_versions_and_original_in_this_order(tmp_path):
    """Each image has one color."""
    colors = {"true.webp": (250, 10, 10), "a.jpg": (10, 250, 10), "b.png": (10, 10, 250)}
    paths = [save_image(tmp_path / name, np.full((60, 80, 3), color, np.uint8)) for name, color in colors.items()]
    original, *results = ({"x": path} for path in paths)
    ablation.save_sheet(["x"], original, dict(zip("ab", results)), tmp_path / "sheet.jpg")
    sheet = np.asarray(Image.open(tmp_path / "sheet.jpg")).astype(int)
    luma = round(0.299 * 250 + 0.587 * 10 + 0.114 * 10)
    for column, color in enumerate([(luma,) * 3, (10, 250, 10), (10, 10, 250), (250, 10, 10)]):
        assert np.abs(sheet[HEAD + 60, 10 + 170 * column + 80] - color).max() < 12
    assert sheet.shape == (HEAD + 120 + FOOT, 4 * 170 + 10, 3)


# -------------------------------------------------------------------------------------------------
# Folders of any name, missing and unreadable images, usage errors


def test_rows_of_any_name_use_their_common_images(tmp_path, val_dir, results, capsys):
    """One image is unreadable in one row, and a different one is missing in the other: both are excluded."""
    for row in ("96", "no (1)"):
        shutil.copytree(results / "full", tmp_path / row)
    first, second = (sorted((tmp_path / "96" / SYNSETS[i]).glob("*.png"))[0] for i in (0, 1))
    first.write_bytes(first.read_bytes()[:300])
    (tmp_path / "no (1)" / second.relative_to(tmp_path / "96")).unlink()
    code, summary = run(val_dir, tmp_path, ("96", "no (1)"), tmp_path / "out", "--arch", "none", "--panel", "2")
    captured = capsys.readouterr()
    assert code == EXIT_SKIPPED and summary["images"] == 6
    left_out = [str(path.relative_to(tmp_path / "96").with_suffix("")) for path in (first, second)]
    assert summary["left_out"] == left_out and f"skipped {first}: " in captured.err
    assert captured.out.splitlines()[-1].endswith("_sheet.jpg; 2 rows, 6 images, 2 skipped")
    assert summary["results"]["96"] == summary["results"]["no (1)"] and summary["differences"] == []
    tables = (tmp_path / "out" / "ablation.md").read_text()
    assert "top-1" not in tables and "| no (1) | " in tables and tables.count("|---") == 7


def test_crops_and_whole_images_cannot_share_a_table(tmp_path, val_dir, results, error_message):
    """Sizes come from coloring.json."""
    message = error_message(run, val_dir, results, ["full", "square_crops"], tmp_path, "--arch", "none")
    assert "square_crops and full differ in size or crop" in message


@pytest.mark.parametrize("rows", [("full", "a/full"), ("gray",)])
def test_rows_with_the_same_or_a_reserved_name_are_reported_before_measuring(
    tmp_path, val_dir, results, error_message, rows
):
    message = error_message(run, val_dir, results, rows, tmp_path / "out")
    assert "rows have the folders' names, which must differ and be neither gray nor true" in message
    assert not (tmp_path / "out").exists()
