"""metrics_auc.py, compared with the definitions of its values in float64 by scikit-image and SciPy."""

import csv
import json
import os

from support.cli import EXIT_SKIPPED, UserError
from support.folders import append_record, make_record, pair_at_random, pair_images
from support.images import crop_resized

import numpy as np
import pytest
from conftest import save_image, save_images
from metrics_by_definition import as_gray, auc_by_definition, image_ab, nearest_bins, paper_colorfulness
from PIL import Image
from scipy.spatial import cKDTree
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

import metrics_auc
from dataset import COLORING, RECORDS
from utils import load_ab_bins

IMAGES = {"astronaut": data.astronaut(), "coffee": data.coffee(), "chelsea": data.chelsea(), "rocket": data.rocket()}
SMALL = {name: image[100:148, 200:264] for name, image in IMAGES.items()}  # 64x48


@pytest.fixture(autouse=True)
def real_plot(monkeypatch):
    """Draw no curves, which takes longer than all else. Return the function that does."""
    plot = metrics_auc.plot
    monkeypatch.setattr(metrics_auc, "plot", lambda results, path: None)
    return plot


def run(true, colored, output, *flags):
    """Return main's exit code and its JSON; without `colored`, of --gray or --random."""
    where = ["--result_path", colored] if colored else [] if "--random" in flags else ["--gray"]
    arguments = ["--image_dir", true, "--save_path", output, "--num_workers", 0, *where, *flags]
    args = metrics_auc.parse_args([*map(str, arguments)])
    code = metrics_auc.main(args)
    return code, json.loads((output / (f"{args.baseline}_auc.json" if args.baseline else "auc.json")).read_text())


def recolored(images):
    """Return the images in other colors: red and blue swapped, washed out."""
    return {name: (image[..., ::-1] // 2 + 60).astype(np.uint8) for name, image in images.items()}


def auc_values(summary):
    return [summary[f"auc_{kind}"] for kind in metrics_auc.KINDS]


# -------------------------------------------------------------------------------------------------
# Formulas


def test_rounding_finds_the_nearest_bin_of_every_color():
    """The colors cover the gamut and its borders: none falls on a grid point that is not a bin."""
    levels = np.arange(0, 256, 3, dtype=np.uint8)  # 0 and 255 among them
    rgb = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    ab, bins = metrics_auc.to_lab(rgb)[0, :, 1:], load_ab_bins().numpy()
    a, b = np.rint(ab / 10).astype(int).T + 11
    found = metrics_auc.bins_on_grid(bins)[a, b]
    distance, nearest = cKDTree(bins).query(ab, k=2)
    clear = distance[:, 1] - distance[:, 0] > 1e-4  # not on the border of two cells
    assert clear.mean() > 0.98 and (found[clear] == nearest[clear, 0]).all()
    assert (found >= 0).all() and np.abs(ab - bins[found]).max() < 5.001


# -------------------------------------------------------------------------------------------------
# From files to measures


def test_values_agree_with_their_definitions(tmp_path):
    """AuC and chroma are of all pixels, colorfulness and PSNR averaged over the images, which have different sizes."""
    true = {name: image[::2, : 300 + 40 * i] for i, (name, image) in enumerate(IMAGES.items())}
    colored, grays = recolored(true), {name: as_gray(image) for name, image in true.items()}
    code, summary = run(save_images(tmp_path / "t", true), save_images(tmp_path / "c", colored), tmp_path)
    true_ab, colored_ab = (np.concatenate([*map(image_ab, images.values())]) for images in (true, colored))
    assert code == 0
    for found, predicted_ab in ((summary, colored_ab), (summary["gray"], 0 * colored_ab)):
        expected = auc_by_definition(true_ab, predicted_ab, nearest_bins(true_ab))
        assert auc_values(found)[0] == pytest.approx(expected[0], abs=1e-6)
        assert auc_values(found) == pytest.approx(expected, abs=2e-5)  # one pixel of a rare color weighs more
    for found, images, ab in ((summary, colored, colored_ab), (summary["true"], true, true_ab)):
        assert found["chroma"] == pytest.approx(np.hypot(*ab.T).mean(), rel=1e-5)
        assert found["colorfulness"] == pytest.approx(np.mean([*map(paper_colorfulness, images.values())]), rel=1e-5)
    assert summary["colorfulness_difference"] == summary["colorfulness"] - summary["true"]["colorfulness"] != 0
    for found, images in ((summary, colored), (summary["gray"], grays)):
        ratios = [peak_signal_noise_ratio(true[name], images[name], data_range=255) for name in true]
        assert found["psnr"] == pytest.approx(np.mean(ratios), abs=0.01)
    assert (summary["gray"]["chroma"], summary["gray"]["colorfulness"]) == (0, 0)


def test_exact_copy_is_excluded_from_the_mean_psnr(tmp_path, capsys):
    true, colored = save_images(tmp_path / "t", SMALL), dict(SMALL, coffee=recolored(SMALL)["coffee"])
    _, summary = run(true, save_images(tmp_path / "c", colored), tmp_path)
    assert summary["psnr"] == pytest.approx(peak_signal_noise_ratio(SMALL["coffee"], colored["coffee"], data_range=255))
    assert run(true, true, tmp_path)[1]["psnr"] is None
    assert "PSNR inf dB" in capsys.readouterr().out


def test_random_flag_gives_each_image_the_ab_of_another(tmp_path, capsys):
    true = {name: image[: 40 + 8 * i] for i, (name, image) in enumerate(SMALL.items())}
    folder, drawn_ab = save_images(tmp_path / "t", true), []
    originals, _, _ = pair_images(folder, None, COLORING, RECORDS)
    for name, _, other in pair_at_random(originals, seed=1):
        other = Image.open(other).resize(true[name].shape[1::-1], Image.Resampling.BILINEAR)
        drawn_ab.append(image_ab(np.asarray(other)))
    true_ab = np.concatenate([image_ab(true[name]) for name in sorted(true)])
    expected = auc_by_definition(true_ab, np.concatenate(drawn_ab), nearest_bins(true_ab))
    _, summary = run(folder, None, tmp_path, "--random", "--seed", 1)
    assert auc_values(summary) == pytest.approx(expected, abs=2e-5)
    assert (summary["colored_images"], summary["images"], summary["seed"]) == ("random ab", 4, 1)
    assert capsys.readouterr().out.startswith("random ab      AuC raw")


def test_gray_flag_agrees_with_the_baseline_of_results_and_prior_changes_only_the_rebalanced_auc(tmp_path):
    true = save_images(tmp_path / "t", SMALL)
    np.save(tmp_path / "prior.npy", np.ones(313))  # equal weights
    _, gray = run(true, None, tmp_path)
    _, column = run(true, save_images(tmp_path / "c", recolored(SMALL)), tmp_path)
    assert auc_values(gray) == auc_values(column["gray"]) == auc_values(gray["gray"]) != auc_values(column)
    _, other = run(true, None, tmp_path, "--prior", tmp_path / "prior.npy")
    assert (gray["auc_raw"], gray["auc_macro"]) == (other["auc_raw"], other["auc_macro"])
    assert other["auc_rebalanced"] == pytest.approx(other["auc_raw"], abs=1e-6)
    assert gray["auc_rebalanced"] < gray["auc_raw"] - 0.01
    assert other["prior"]["file"] == str(tmp_path / "prior.npy")


# -------------------------------------------------------------------------------------------------
# Output files


def test_output_files_and_printed_lines_agree_with_the_summary(tmp_path, capsys, monkeypatch, real_plot):
    monkeypatch.setattr(metrics_auc, "plot", real_plot)
    true = save_images(tmp_path / "t", SMALL)
    colored = save_images(tmp_path / "c", recolored(SMALL))
    _, summary = run(true, colored, tmp_path / "new" / "folder")
    output = tmp_path / "new" / "folder"
    assert sorted(os.listdir(output)) == ["auc.csv", "auc.json", "auc.png", "auc.txt"]
    # The counts give the area again.
    lines = (output / "auc.txt").read_text().splitlines()
    table = np.array([line.split() for line in lines[1:-1]], float)
    assert table[:, 0].tolist() == list(range(151))
    assert table[:, 1] / summary["pixels"] == pytest.approx(table[:, 2], abs=1e-8)
    expected = [*auc_values(summary), *auc_values(summary["gray"])]
    assert ((table[1:, 2:] + table[:-1, 2:]) / 2).mean(axis=0) == pytest.approx(expected, abs=1e-7)
    assert int(lines[-1].split()[1]) == summary["pixels"] == 4 * 64 * 48
    # Each image's row equals a run on it alone.
    with open(output / "auc.csv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(SMALL)
    _, alone = run(true / "coffee.png", colored / "coffee.png", tmp_path / "alone")
    for heading, text in list(rows["coffee"].items())[1:]:
        values = next((alone[x] for x in ("gray", "true") if heading.startswith(x)), alone)
        assert float(text) == pytest.approx(values[heading.removeprefix("gray_").removeprefix("true_")], abs=1e-6)
    # The plot is not blank.
    with Image.open(output / "auc.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 50
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:4] == ["colored", "AuC", "raw", f"{summary['auc_raw']:.2%}"]
    assert printed[2].startswith(f"chroma {summary['chroma']:.2f} (true {summary['true']['chroma']:.2f})")
    assert printed[2].endswith(f"PSNR {summary['psnr']:.2f} dB (gray {summary['gray']['psnr']:.2f})")


# -------------------------------------------------------------------------------------------------
# Pairs and sizes


def test_only_results_with_the_settings_of_the_newest_one_are_measured(tmp_path):
    """A second run with another checkpoint was stopped after two images: the mean of both would be nobody's."""
    true = save_images(tmp_path / "t", SMALL)
    colored = save_images(tmp_path / "c", SMALL)
    for names, weights in ((SMALL, "old"), (("coffee", "rocket"), "new")):
        for name in names:
            source, settings = true / f"{name}.png", {"crop_size": None, "load_size": 256, "sha256": weights}
            append_record(make_record(source, settings, f"{name}.png", colored / f"{name}.png"), colored / RECORDS)
    code, summary = run(true, colored, tmp_path)
    assert (code, summary["images"], summary["coloring"]) == (EXIT_SKIPPED, 2, settings)
    assert summary["left_out"] == {"made with other settings than the newest result": ["astronaut", "chelsea"]}


def test_values_of_another_folder_are_replaced_with_a_warning(tmp_path, capsys):
    true = save_images(tmp_path / "t", SMALL)
    for _ in range(2):
        run(true, true, tmp_path)
    assert "replaced" not in capsys.readouterr().err
    run(true, save_images(tmp_path / "c", SMALL), tmp_path)
    warning = f"auc.json: is about {true} and will be replaced; to keep it, choose another --save_path\n"
    assert warning in capsys.readouterr().err


def test_square_crops_are_compared_with_the_same_crops(tmp_path):
    """Sizes are those in coloring.json, unless flags give them."""
    crops = {name: crop_resized(Image.fromarray(image), 40, 32) for name, image in SMALL.items()}
    true, colored = save_images(tmp_path / "t", SMALL), save_images(tmp_path / "c", crops)
    sizes = ("--load_size", 40, "--crop_size", 32)
    code, summary = run(true, colored, tmp_path, *sizes)
    assert code == 0 and auc_values(summary) == [1, 1, 1] and summary["pixels"] == 4 * 32 * 32
    assert auc_values(run(true, None, tmp_path, *sizes)[1]) == auc_values(summary["gray"])
    (colored / "coloring.json").write_text('{"load_size": 40, "crop_size": 32}')
    _, recorded = run(true, colored, tmp_path)
    assert recorded["gray"] == summary["gray"] and (recorded["load_size"], recorded["crop_size"]) == (40, 32)
    assert run(true, colored, tmp_path, "--load_size", 48, "--crop_size", 32)[1]["auc_raw"] < 0.999
    (true / "coloring.json").write_text('{"load_size": 48, "crop_size": null}')
    assert run(true, true, tmp_path)[1]["load_size"] is None


def test_originals_shrunk_by_the_decoder_match_results(tmp_path):
    """test.py lets the JPEG decoder shrink large images before they are resized."""
    path = tmp_path / "t" / "a.jpg"
    save_image(path, data.astronaut())
    image = Image.open(path)
    image.draft("RGB", (128, 128))
    colored = save_images(tmp_path / "c", {"a": crop_resized(image, 128, 64)})
    assert run(path, colored, tmp_path, "--load_size", 128, "--crop_size", 64)[1]["auc_raw"] == 1


def test_unreadable_images_and_other_sizes_are_reported_and_skipped(tmp_path, capsys):
    true, colored = save_images(tmp_path / "t", SMALL), save_images(tmp_path / "c", SMALL)
    save_image(colored / "astronaut.png", SMALL["astronaut"][:40])
    (colored / "coffee.png").write_bytes((colored / "coffee.png").read_bytes()[:500])
    (true / "rocket.png").write_text("text")
    code, summary = run(true, colored, tmp_path)
    assert (code, summary["images"]) == (EXIT_SKIPPED, 1)
    assert [*summary["left_out"].values()] == [["astronaut", "coffee", "rocket"]]
    error = capsys.readouterr().err
    assert f"skipped {colored / 'astronaut.png'}: does not have the original's size (square crops need --load" in error
    assert f"skipped {colored / 'coffee.png'}: " in error and f"skipped {true / 'rocket.png'}: " in error
    with pytest.raises(UserError, match="none of the 1 images can be compared"):
        run(true / "rocket.png", None, tmp_path)


# -------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prior", "missing.npy"), "missing.npy: cannot be read as a prior"),
        (("--crop_size", "9", "--load_size", "8"), "--crop_size 9: larger than --load_size 8"),
        (("--load_size", "8"), "--load_size and --crop_size: give both or neither"),
    ],
)
def test_usage_error_prints_one_line(error_message, flags, message):
    assert message in error_message(metrics_auc.main, metrics_auc.parse_args(["--image_dir", "t", "--gray", *flags]))
