"""metrics_auc.py against scikit-image, a loop over pixels, and areas computed by hand."""

import csv
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from support.cli import EXIT_SKIPPED
from support.images import crop_resized

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import cKDTree
from skimage import data
from skimage.color import lab2rgb, rgb2lab
from skimage.metrics import peak_signal_noise_ratio

import metrics_auc
from utils import auc, error_histogram, load_ab_bins, load_prior, rebalancing_weights

PHOTOS = {"astronaut": data.astronaut(), "coffee": data.coffee(), "chelsea": data.chelsea(), "rocket": data.rocket()}
SMALL = {name: photo[100:148, 200:264] for name, photo in PHOTOS.items()}  # 64x48


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def save_all(folder, images, suffix=".png"):
    for name, image in images.items():
        save(folder / (name + suffix), image)
    return folder


def altered(image):
    """Other colors of the same image: red and blue swapped, washed out."""
    return (image[..., ::-1] // 2 + 60).astype(np.uint8)


def run(true, colored, output, *flags):
    """main's exit code and its JSON; `colored` None is --gray."""
    arguments = ["--image_dir", str(true), "--save_path", str(output), "--num_workers", "0", *flags]
    arguments += ["--result_path", str(colored)] if colored else ["--gray"]
    code = metrics_auc.main(metrics_auc.parse_args(arguments))
    return code, json.loads((output / ("auc.json" if colored else "gray_auc.json")).read_text())


def areas(summary):
    return [summary[f"auc_{kind}"] for kind in metrics_auc.KINDS]


def oracle(pairs, weight_of_bin):
    """Compute raw, rebalanced and macro AuC of (true, predicted) Lab images in float64 from the definition."""
    true_ab = np.concatenate([true[..., 1:].reshape(-1, 2) for true, _ in pairs])
    predicted_ab = np.concatenate([predicted[..., 1:].reshape(-1, 2) for _, predicted in pairs])
    distance = np.linalg.norm(true_ab - predicted_ab, axis=1)
    nearest = cKDTree(load_ab_bins().numpy()).query(true_ab)[1]
    own = 1 / np.bincount(nearest, minlength=313).clip(1)
    result = []
    for weights in (np.ones(len(distance)), weight_of_bin[nearest], own[nearest]):
        curve = [weights[distance <= t].sum() / weights.sum() for t in range(151)]
        result.append(sum((curve[t] + curve[t + 1]) / 2 for t in range(150)) / 150)
    return result


def prior_weights():
    return rebalancing_weights(load_prior(), lam=0).numpy().astype(np.float64)


# -------------------------------------------------------------------------------------------------
# Formulas


def test_rounding_finds_the_nearest_bin_of_every_color():
    """On a grid of all colors, and on the gamut's borders: no color falls on a grid point that is not a bin."""
    levels = np.arange(0, 256, 3, dtype=np.uint8)  # 0 and 255 among them
    rgb = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    ab, bins = metrics_auc.to_lab(rgb)[0, :, 1:], load_ab_bins().numpy()
    a, b = np.rint(ab / 10).astype(int).T + 11
    found = metrics_auc.bins_on_grid(bins)[a, b]
    distance, nearest = cKDTree(bins).query(ab, k=2)
    clear = distance[:, 1] - distance[:, 0] > 1e-4  # not on the border of two cells
    assert clear.mean() > 0.98 and (found[clear] == nearest[clear, 0]).all()
    assert (found >= 0).all() and np.abs(ab - bins[found]).max() < 5.001


@pytest.mark.parametrize(
    ("distance", "area"),
    # The curve is 0 below the first whole t within reach and 1 from there on.
    [(0, 1), (0.5, 149.5 / 150), (10.5, 139.5 / 150), (11, 139.5 / 150), (149.5, 0.5 / 150), (150.01, 0), (400, 0)],
)
def test_constant_distance_gives_the_area_by_hand(distance, area):
    true = np.random.default_rng(0).integers(-100, 100, (2, 30, 40)).astype(np.float64)
    angle = math.radians(0 if distance == 11 else 30)
    predicted = true + distance * np.array([math.cos(angle), math.sin(angle)])[:, None, None]
    histogram = error_histogram(predicted, true)
    assert auc(histogram) == pytest.approx(area, abs=1e-12)
    assert histogram.sum() == 1200


def test_raw_rebalanced_and_macro_weights():
    """One pixel of a bin, three of another: own weights even them out, given ones multiply; curve and area agree."""
    counts, given = np.zeros((313, 152), np.int64), np.arange(313.0) + 1
    counts[0, 10], counts[5, 20] = 1, 3
    curves = metrics_auc.curves(counts, given)
    assert curves[:, 9].tolist() == [0, 0, 0] and curves[:, 20].tolist() == [1, 1, 1]
    assert curves[:, 10].tolist() == [1 / 4, 1 / (1 + 3 * 6), 1 / 2]
    areas = np.stack([counts @ metrics_auc.AREAS, counts @ metrics_auc.AREAS, counts.sum(axis=1)])[None]
    one = dict.fromkeys(("chroma", "colorfulness", "psnr", "copies"), np.zeros((1, 3)))
    found = metrics_auc.measures({"areas": areas, "pixels": np.array([4]), "images": np.array([1]), **one}, given)
    for kind, curve in zip(metrics_auc.KINDS, curves):
        assert found["colored"][f"auc_{kind}"] == pytest.approx((curve[:-1] + curve[1:]).mean() / 2)
        assert found["true"][f"auc_{kind}"] == 1


def paper_colorfulness(image):
    """Hasler and Süsstrunk 2003, section 7, in float64."""
    red, green, blue = image.reshape(-1, 3).astype(np.float64).T
    rg, yb = red - green, 0.5 * (red + green) - blue
    sigma = np.sqrt(np.var(rg) + np.var(yb))
    mu = np.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2)
    return sigma + 0.3 * mu


def test_colorfulness_agrees_with_the_paper():
    for photo in (*PHOTOS.values(), *(altered(photo) for photo in PHOTOS.values())):
        assert metrics_auc.colorfulness(photo) == pytest.approx(paper_colorfulness(photo), rel=1e-5)
    assert metrics_auc.colorfulness(np.full((50, 3), 77, np.uint8)) == 0
    blue = np.full((500, 1000, 3), (0, 0, 255), np.uint8)  # no spread, only distance from gray
    assert metrics_auc.colorfulness(blue) == pytest.approx(0.3 * 255, rel=1e-6)


# -------------------------------------------------------------------------------------------------
# From files to measures


def test_auc_agrees_with_a_loop_over_pixels(tmp_path):
    true, colored = SMALL["coffee"], altered(SMALL["coffee"])
    _, summary = run(save_all(tmp_path / "t", {"a": true}), save_all(tmp_path / "c", {"a": colored}), tmp_path)
    bins, weights = load_ab_bins().numpy(), prior_weights()
    within, weight_within, weight_sum = [0] * 151, [0.0] * 151, 0.0
    for (_, a, b), (_, pa, pb) in zip(rgb2lab(true).reshape(-1, 3), rgb2lab(colored).reshape(-1, 3)):
        distance = math.hypot(pa - a, pb - b)
        weight = weights[min(range(313), key=lambda q: (bins[q][0] - a) ** 2 + (bins[q][1] - b) ** 2)]
        weight_sum += weight
        for t in range(151):
            if distance <= t:
                within[t] += 1
                weight_within[t] += weight
    raw = sum(within[t] + within[t + 1] for t in range(150)) / 2 / 150 / true[..., 0].size
    rebalanced = sum(weight_within[t] + weight_within[t + 1] for t in range(150)) / 2 / 150 / weight_sum
    assert 0.2 < raw < 0.95 and abs(raw - rebalanced) > 0.01  # a case that tells something
    assert summary["auc_raw"] == pytest.approx(raw, abs=1e-5)
    assert summary["auc_rebalanced"] == pytest.approx(rebalanced, abs=1e-5)
    assert (summary["images"], summary["pixels"]) == (1, 64 * 48)


def test_float32_changes_the_auc_by_less_than_a_millionth(tmp_path):
    true = {name: photo[::2] for name, photo in PHOTOS.items()}
    colored = {name: altered(photo) for name, photo in true.items()}
    code, summary = run(save_all(tmp_path / "t", true), save_all(tmp_path / "c", colored), tmp_path)
    labs = {name: (rgb2lab(photo), rgb2lab(colored[name])) for name, photo in true.items()}
    assert code == 0
    expected = oracle(labs.values(), prior_weights())
    assert areas(summary)[0] == pytest.approx(expected[0], abs=1e-6)
    assert areas(summary) == pytest.approx(expected, abs=2e-5)  # one pixel of a rare color weighs more
    gray = oracle([(lab, np.zeros_like(lab)) for lab, _ in labs.values()], prior_weights())
    assert areas(summary["gray"])[0] == pytest.approx(gray[0], abs=1e-6)
    assert areas(summary["gray"]) == pytest.approx(gray, abs=2e-5)


def as_gray(photo):
    lab = rgb2lab(photo)
    return (lab2rgb(lab * (1, 0, 0)) * 255).round().astype(np.uint8)


def test_chroma_colorfulness_and_psnr(tmp_path):
    """Chroma over all pixels, colorfulness and PSNR over the images; images of different sizes."""
    true = {name: photo[: 40 + 8 * i] for i, (name, photo) in enumerate(SMALL.items())}
    colored = {name: altered(photo) for name, photo in true.items()}
    _, summary = run(save_all(tmp_path / "t", true), save_all(tmp_path / "c", colored), tmp_path)

    def chroma(images):
        return np.concatenate([np.hypot(*rgb2lab(image)[..., 1:].reshape(-1, 2).T) for image in images.values()]).mean()

    def colorfulness(images):
        return np.mean([paper_colorfulness(image) for image in images.values()])

    def psnr(images):
        return np.mean([peak_signal_noise_ratio(true[name], images[name], data_range=255) for name in true])

    assert summary["chroma"] == pytest.approx(chroma(colored), rel=1e-5)
    assert summary["true"] == pytest.approx({"chroma": chroma(true), "colorfulness": colorfulness(true)}, rel=1e-5)
    assert summary["colorfulness"] == pytest.approx(colorfulness(colored), rel=1e-5)
    difference = colorfulness(colored) - colorfulness(true)
    assert summary["colorfulness_difference"] == pytest.approx(difference, rel=1e-4) and abs(difference) > 1
    assert summary["psnr"] == pytest.approx(psnr(colored), abs=1e-4)
    grays = {name: as_gray(photo) for name, photo in true.items()}
    assert summary["gray"]["psnr"] == pytest.approx(psnr(grays), abs=0.01)
    assert (summary["gray"]["chroma"], summary["gray"]["colorfulness"]) == (0, 0)
    with open(tmp_path / "auc.csv", newline="") as file:
        for row in csv.DictReader(file):
            name = row["image"]
            assert float(row["chroma"]) == pytest.approx(chroma({name: colored[name]}), rel=1e-4)
            assert float(row["true_chroma"]) == pytest.approx(chroma({name: true[name]}), rel=1e-4)
            assert float(row["colorfulness"]) == pytest.approx(paper_colorfulness(colored[name]), rel=1e-5)
            assert float(row["true_colorfulness"]) == pytest.approx(paper_colorfulness(true[name]), rel=1e-5)
            expected = peak_signal_noise_ratio(true[name], colored[name], data_range=255)
            assert float(row["psnr"]) == pytest.approx(expected, abs=1e-4)


def test_an_exact_copy_is_left_out_of_the_mean_psnr(tmp_path, capsys):
    true, colored = save_all(tmp_path / "t", SMALL), dict(SMALL, coffee=altered(SMALL["coffee"]))
    _, one = run(true / "coffee.png", save_all(tmp_path / "c", colored) / "coffee.png", tmp_path)
    _, summary = run(true, tmp_path / "c", tmp_path)
    assert summary["psnr"] == pytest.approx(one["psnr"]) and math.isfinite(one["psnr"])
    assert run(true, true, tmp_path)[1]["psnr"] is None
    assert "PSNR inf dB" in capsys.readouterr().out


def test_auc_of_copies_is_1(tmp_path):
    true = save_all(tmp_path / "t", SMALL)
    assert areas(run(true, true, tmp_path)[1]) == [1, 1, 1]


def test_the_largest_errors_are_counted(tmp_path):
    """Blue against green is 258 in ab: no index error, and all pixels in the total."""
    true = save_all(tmp_path / "t", {"a": np.full((4, 6, 3), (0, 0, 255), np.uint8)})
    colored = save_all(tmp_path / "c", {"a": np.full((4, 6, 3), (0, 255, 0), np.uint8)})
    _, summary = run(true, colored, tmp_path)
    assert areas(summary) == [0, 0, 0] and summary["pixels"] == 24
    assert (tmp_path / "auc.txt").read_text().splitlines()[-1].split() == ["total", "24"]


def test_gray_flag_gray_column_and_gray_files_agree(tmp_path):
    true = save_all(tmp_path / "t", SMALL)
    colored = save_all(tmp_path / "c", {name: altered(photo) for name, photo in SMALL.items()})
    grays = {name: np.asarray(Image.fromarray(photo).convert("L").convert("RGB")) for name, photo in SMALL.items()}
    _, flag = run(true, None, tmp_path)
    _, column = run(true, colored, tmp_path)
    _, files = run(true, save_all(tmp_path / "g", grays), tmp_path / "files")
    assert areas(flag) == areas(column["gray"]) == areas(flag["gray"])
    assert areas(files) == pytest.approx(areas(flag), abs=2e-3)  # uint8 gray is ab = 0 up to 0.01
    assert areas(column) != areas(flag)


def test_random_gives_each_image_the_ab_of_another(tmp_path, capsys):
    """Brute force over all ways to give four images of different sizes each other's ab."""
    true = {name: photo[: 40 + 8 * i] for i, (name, photo) in enumerate(SMALL.items())}
    folder = save_all(tmp_path / "t", true)
    found = []
    for seed in map(str, range(3)):
        arguments = ["--image_dir", str(folder), "--save_path", str(tmp_path), "--num_workers", "0"]
        assert metrics_auc.main(metrics_auc.parse_args([*arguments, "--random", "--seed", seed])) == 0
        found.append(json.loads((tmp_path / "random_auc.json").read_text()))
    labs = [rgb2lab(photo) for photo in true.values()]
    expected = {}
    for others in itertools.permutations(range(4)):
        if any(i == other for i, other in enumerate(others)):
            continue
        pairs = []
        for lab, other in zip(labs, others):
            image = Image.fromarray([*true.values()][other]).resize(lab.shape[1::-1], Image.Resampling.BILINEAR)
            pairs.append((lab, rgb2lab(np.asarray(image))))
        expected[others] = oracle(pairs, prior_weights())
    assert len(expected) == 9
    drawn = [min(expected.values(), key=lambda values: abs(values[0] - x["auc_raw"])) for x in found]
    for summary, values in zip(found, drawn):
        assert areas(summary) == pytest.approx(values, abs=2e-5)
        assert (summary["colored_images"], summary["images"]) == ("random ab", 4)
    assert len({*map(tuple, drawn)}) > 1  # the seed matters
    assert capsys.readouterr().out.startswith("random ab      AuC raw")


def test_prior_matters_to_rebalanced_alone(tmp_path):
    true = save_all(tmp_path / "t", SMALL)
    prior = np.zeros(313)  # zeros too: of bins that never occurred
    prior[100:200] = 1
    np.save(tmp_path / "prior.npy", prior)
    _, shipped = run(true, None, tmp_path)
    _, other = run(true, None, tmp_path, "--prior", str(tmp_path / "prior.npy"))
    assert (shipped["auc_raw"], shipped["auc_rebalanced_own"]) == (other["auc_raw"], other["auc_rebalanced_own"])
    # Equal weights: what never occurred is taken to be as rare as the rarest that did.
    assert other["auc_rebalanced"] == pytest.approx(other["auc_raw"], abs=1e-6)
    assert shipped["auc_rebalanced"] < shipped["auc_raw"] - 0.01
    assert other["prior"]["file"] == str(tmp_path / "prior.npy") != shipped["prior"]["file"]
    assert other["prior"]["sha256"] != shipped["prior"]["sha256"]


def test_worker_processes_give_the_same(tmp_path):
    images = {f"{name}{i}": np.roll(photo, 7 * i, axis=0) for name, photo in SMALL.items() for i in range(5)}
    true = save_all(tmp_path / "t", images)
    colored = save_all(tmp_path / "c", {name: altered(photo) for name, photo in images.items()})
    run(true, colored, tmp_path / "alone")
    run(true, colored, tmp_path / "shared", "--num_workers", "2")
    for name in ("auc.csv", "auc.txt"):
        assert (tmp_path / "alone" / name).read_text() == (tmp_path / "shared" / name).read_text()


# -------------------------------------------------------------------------------------------------
# Output files


def test_output_files(tmp_path, capsys):
    true = save_all(tmp_path / "t", SMALL)
    colored = save_all(tmp_path / "c", {name: altered(photo) for name, photo in SMALL.items()})
    (colored / "coloring.json").write_text('{"checkpoint": "model/epoch_19_model.pdparams"}')
    _, summary = run(true, colored, tmp_path / "new" / "folder")
    output = tmp_path / "new" / "folder"
    assert sorted(os.listdir(output)) == ["auc.csv", "auc.json", "auc.npz", "auc.png", "auc.txt"]
    # The counts give the area again.
    lines = (output / "auc.txt").read_text().splitlines()
    table = np.array([line.split() for line in lines[1:-1]], float)
    assert table[:, 0].tolist() == list(range(151))
    assert table[:, 1] / summary["pixels"] == pytest.approx(table[:, 2], abs=1e-8)
    expected = [*areas(summary), *areas(summary["gray"])]
    assert ((table[1:, 2:] + table[:-1, 2:]) / 2).mean(axis=0) == pytest.approx(expected, abs=1e-7)
    assert int(lines[-1].split()[1]) == summary["pixels"] == 4 * 64 * 48
    # Each image's row is what it gives alone.
    with open(output / "auc.csv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(SMALL)
    _, alone = run(true / "coffee.png", colored / "coffee.png", tmp_path / "alone")
    for key, expected in (("", alone), ("gray_", alone["gray"])):
        assert float(rows["coffee"][key + "auc_raw"]) == pytest.approx(expected["auc_raw"], abs=1e-6)
        assert float(rows["coffee"][key + "auc_rebalanced"]) == pytest.approx(expected["auc_rebalanced"], abs=1e-6)
    assert int(rows["coffee"]["pixels"]) == 64 * 48
    # The curve is a picture with something in it.
    with Image.open(output / "auc.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(10**6)) > 50
    assert summary["coloring"] == {"checkpoint": "model/epoch_19_model.pdparams"}
    assert summary["colored_images"] == str(colored) and summary["left_out"] == {}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:4] == ["colored", "AuC", "raw", f"{summary['auc_raw']:.2%}"]
    assert printed[2].startswith(
        f"chroma {summary['chroma']:.2f} (true {summary['true']['chroma']:.2f})  colorfulness "
    )
    assert printed[2].endswith(f"PSNR {summary['psnr']:.2f} dB (gray {summary['gray']['psnr']:.2f})")
    assert printed[4] == f"written: {output / 'auc'}.json, .csv, .npz, .txt, .png"


# -------------------------------------------------------------------------------------------------
# Pairs and sizes


def test_images_are_paired_by_path_and_missing_ones_reported(tmp_path, capsys):
    true, colored = tmp_path / "t", tmp_path / "c"
    for name, photo in SMALL.items():  # the same file name in two folders: only the path tells them apart
        save(true / name / "x.jpeg", photo)
        if name != "rocket":
            save(colored / name / "x.png", photo)
    save(colored / "stray.png", SMALL["coffee"])
    code, summary = run(true, colored, tmp_path)
    assert code == EXIT_SKIPPED and summary["images"] == 3
    assert summary["auc_raw"] > 0.97  # JPEG against PNG of the same; swapped ones would be far lower
    assert summary["left_out"] == {"no colored image": ["rocket/x"], "no true image": ["stray"]}
    error = capsys.readouterr().err
    assert "rocket/x: no colored image\n" in error and "stray: no true image\n" in error


def test_many_missing_images_are_counted(tmp_path, capsys):
    true = save_all(tmp_path / "t", {f"{i:02d}": SMALL["coffee"] for i in range(30)})
    colored = save_all(tmp_path / "c", {"07": SMALL["coffee"]})
    _, summary = run(true, colored, tmp_path)
    assert len(summary["left_out"]["no colored image"]) == 29
    assert capsys.readouterr().err.splitlines()[-1] == "… and 19 more: no colored image"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_results_of_any_format_are_paired(tmp_path, suffix):
    """test.py writes b.jpg to b.png, a.jpg to a.png and a.tif to a.tif.png; or .jpg, .webp (--format)."""
    true = save(tmp_path / "t" / "a.jpg", SMALL["coffee"]).parent
    save(true / "a.tif", SMALL["chelsea"])
    save(true / "b.JPEG", SMALL["rocket"])
    colored = save(tmp_path / "c" / f"a.{suffix}", SMALL["coffee"]).parent
    save(colored / f"a.tif.{suffix}", SMALL["chelsea"])
    save(colored / f"b.{suffix}", SMALL["rocket"])
    code, summary = run(true, colored, tmp_path)
    assert (code, summary["images"]) == (0, 3) and summary["auc_raw"] > 0.97  # swapped ones would be far lower


def test_sizes_are_taken_from_the_results_coloring_json(tmp_path):
    crops = {name: crop_resized(Image.fromarray(photo), 40, 32) for name, photo in SMALL.items()}
    true, colored = save_all(tmp_path / "t", SMALL), save_all(tmp_path / "c", crops)
    (colored / "coloring.json").write_text('{"load_size": 40, "crop_size": 32}')
    code, summary = run(true, colored, tmp_path)
    assert code == 0 and areas(summary) == [1, 1, 1] and (summary["load_size"], summary["crop_size"]) == (40, 32)
    assert run(true, colored, tmp_path, "--load_size", "48")[1]["auc_raw"] < 0.999  # flags take precedence
    (colored / "coloring.json").write_text('{"load_size": 48, "crop_size": null}')
    assert run(true, true, tmp_path)[1]["load_size"] is None


@pytest.mark.parametrize(
    "flags", [(), ("--crop_size", "32"), ("--load_size", "40"), ("--load_size", "40", "--crop_size", "32")]
)
def test_square_crops_are_compared_with_the_same_crop(tmp_path, flags):
    load_size = 40 if "--load_size" in flags else 32
    squares = {name: crop_resized(Image.fromarray(photo), load_size, 32) for name, photo in SMALL.items()}
    true, colored = save_all(tmp_path / "t", SMALL), save_all(tmp_path / "c", squares)
    code, summary = run(true, colored, tmp_path, *flags)
    assert code == 0 and areas(summary) == [1, 1, 1] and summary["pixels"] == 4 * 32 * 32
    if flags and flags != ("--load_size", "40"):
        assert areas(run(true, None, tmp_path, *flags)[1]) == areas(summary["gray"])
    # Under another crop they would not be the same.
    other = ("--load_size", "48") if load_size == 32 else ("--load_size", "32")
    assert run(true, colored, tmp_path, *other)[1]["auc_raw"] < 0.999


def test_a_square_crop_of_a_square_image_needs_the_flag(tmp_path):
    """A crop of the original with the same size as the original is recognized by --crop_size only."""
    image = SMALL["coffee"][:, :48]
    true = save_all(tmp_path / "t", {"a": image})
    colored = save_all(tmp_path / "c", {"a": crop_resized(Image.fromarray(image), 64, 48)})
    assert run(true, colored, tmp_path)[1]["auc_raw"] < 0.999
    assert run(true, colored, tmp_path, "--load_size", "64", "--crop_size", "48")[1]["auc_raw"] == 1


def test_originals_shrunk_by_the_decoder_match_results(tmp_path):
    """test.py lets the JPEG decoder shrink large photographs before the resize; so must the comparison."""
    path = tmp_path / "t" / "a.jpg"
    save(path, data.astronaut())
    image = Image.open(path)
    image.draft("RGB", (128, 128))
    colored = save_all(tmp_path / "c", {"a": crop_resized(image, 128, 64)})
    assert run(path, colored, tmp_path, "--load_size", "128")[1]["auc_raw"] == 1


@pytest.mark.parametrize(
    ("shape", "flags", "message"),
    [
        ((40, 64), (), "a.png: 64x40 does not match the original's 64x48"),
        ((48, 64), ("--crop_size", "32"), "a.png: 64x48 does not match --crop_size 32"),
        ((40, 40), ("--crop_size", "32"), "a.png: 40x40 does not match --crop_size 32"),
        ((40, 40), ("--load_size", "32"), "a.png: 40x40 does not match the original's 64x48"),
    ],
)
def test_mismatched_sizes_are_reported_and_skipped(tmp_path, capsys, shape, flags, message):
    true = save_all(tmp_path / "t", {"a": SMALL["coffee"], "b": SMALL["chelsea"]})
    colored = save_all(tmp_path / "c", {"a": SMALL["coffee"][: shape[0], : shape[1]], "b": SMALL["chelsea"][:32, :32]})
    code, summary = run(true, colored, tmp_path, *flags)
    assert code == EXIT_SKIPPED and summary["images"] == 1
    assert list(summary["left_out"].values()) == [["a"]]
    assert message in capsys.readouterr().err


def test_unreadable_files_are_reported_and_skipped(tmp_path, capsys):
    true = save_all(tmp_path / "t", SMALL)
    colored = save_all(tmp_path / "c", SMALL)
    whole = (colored / "coffee.png").read_bytes()
    (colored / "coffee.png").write_bytes(whole[: len(whole) // 2])
    (true / "rocket.png").write_text("text")
    code, summary = run(true, colored, tmp_path, "--num_workers", "2")
    assert code == EXIT_SKIPPED and summary["images"] == 2 and summary["auc_raw"] == 1
    error = capsys.readouterr().err
    assert f"skipped {colored / 'coffee.png'}: " in error and f"skipped {true / 'rocket.png'}: " in error
    assert sorted(*summary["left_out"].values()) == ["coffee", "rocket"]


def test_names_of_any_bytes(tmp_path):
    names = ["line\nbreak", os.fsdecode(b"latin-\xe9"), "com,ma \"quote\" 'x'"]
    true = save_all(tmp_path / "t", dict.fromkeys(names, SMALL["coffee"]))
    save(true / (os.fsdecode(b"missing-\xff\n") + ".png"), SMALL["coffee"])
    code, summary = run(true, save_all(tmp_path / "c", dict.fromkeys(names, SMALL["coffee"])), tmp_path)
    assert (code, summary["images"]) == (EXIT_SKIPPED, 3)
    assert summary["left_out"] == {"no colored image": ["missing-\\xff\\n"]}
    with open(tmp_path / "auc.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert sorted(row[0] for row in list(csv.reader(file))[1:]) == sorted(names)


# -------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image_dir", "missing"), "missing: no such file or folder"),
        (("--image_dir", "t", "--result_path", "missing"), "missing: no such file or folder"),
        (("--image_dir", "t", "--result_path", "other"), "t and other have no image in common"),
        (("--image_dir", "t", "--gray", "--prior", "missing.npy"), "missing.npy: cannot be read as a prior"),
        (("--image_dir", "t", "--random"), "t: --random needs at least two images"),
        (("--image_dir", "broken", "--gray"), "broken: none of its 1 images could be compared"),
        (
            ("--image_dir", "t", "--gray", "--crop_size", "9", "--load_size", "8"),
            "--crop_size 9: larger than --load_size 8",
        ),
        (("--image_dir", "t", "--gray", "--load_size", "8"), "--load_size has no effect on --gray without --crop_size"),
        (("--image_dir", "t", "--gray", "--save_path", "t/a.png"), "t/a.png: cannot be written to: file exists"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    save_all(tmp_path / "t", {"a": SMALL["coffee"]})
    save_all(tmp_path / "other", {"b": SMALL["coffee"]})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("text")
    with pytest.raises(SystemExit) as stop:
        metrics_auc.main(metrics_auc.parse_args(list(flags)))
    assert message in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.slow
def test_script_runs_without_a_display(tmp_path):
    script = Path(metrics_auc.__file__)
    true = save_all(tmp_path / "t", SMALL)
    environment = {**os.environ, "MPLBACKEND": "TkAgg", "DISPLAY": ""}  # it needs no display
    done = subprocess.run(
        [sys.executable, script, "--image_dir", true, "--gray"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "written: ./metrics/gray_auc.json, .csv, .npz, .txt, .png"
    assert "%|" not in done.stderr  # no progress bar off a terminal
