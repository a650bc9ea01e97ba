"""metrics_acc.py, with a stand-in for the classifier whose answers are computed independently."""

import csv
import json
import warnings

from support.cli import EXIT_SKIPPED

import numpy as np
import paddle
import pytest
from conftest import save_image, save_images
from metrics_by_definition import as_gray, classify
from PIL import Image
from skimage import data
from skimage.color import lab2rgb, rgb2lab

import metrics_acc

SYNSETS = metrics_acc.load_synsets()
NUMBERS = {synset: i for i, synset in enumerate(SYNSETS)}
# The shorter side is 256 and the longer one even: the center crop of 224 needs no resampling and is plain indexing.
IMAGES = {
    "astronaut": data.astronaut()[:256, 100:400],
    "coffee": data.coffee()[80:336, 100:400],
    "chelsea": data.chelsea()[:256, 100:400],
    "rocket": data.rocket()[100:356, 200:500],
}


def ranking(image):
    """Sort the classes of uint8 [256, 300, 3] by descending logit, with crop and normalization in NumPy."""
    square = image[16:240, 38:262].astype(np.float64) / 255
    normalized = (square - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return np.argsort(-classify(paddle.to_tensor(normalized.transpose(2, 0, 1)[None].astype(np.float32))).numpy()[0])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run main. Return its exit code and its JSON."""
    monkeypatch.setattr(metrics_acc, "load_classifier", lambda arch, weights: classify)

    def run(*flags, name="accuracy.json"):
        arguments = ["--save_path", tmp_path, "--num_workers", 0, *flags]
        code = metrics_acc.main(metrics_acc.parse_args([*map(str, arguments)]))
        return code, json.loads((tmp_path / name).read_text())

    return run


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------
# Classes


def test_synsets_are_1000_and_sorted():
    assert len(set(SYNSETS)) == 1000 and sorted(SYNSETS) == SYNSETS
    known = {0: "n01440764", 207: "n02099601", 281: "n02123045", 999: "n15075141"}
    assert {i: SYNSETS[i] for i in known} == known  # tench, golden retriever, tabby, tissue


@pytest.mark.parametrize(
    "text",
    [
        "cafe\u0301.png\t1\n",  # its name in the other form
        "\ufeffimage,class\n\nother.png 5\ncafé.JPEG,  1 \n",
        "ImageId,PredictionString\r\nb,n01440764 1 2 3 4\r\ncafé,n01443537 1 2 3 4 n01443537 9 9 9 9\r\n",
    ],
    ids=["number", "heading", "Kaggle"],
)
def test_labels_file_accepts_numbers_and_wordnet_ids(tmp_path, text):
    (tmp_path / "labels.txt").write_text(text, "utf-8")
    names = ["café", "deep/er/café"]
    assert metrics_acc.find_labels(names, ".", tmp_path / "labels.txt") == dict.fromkeys(names, 1)


@pytest.mark.parametrize("line", ["a.png", "a 1000", "a,n99999999 1 2 3 4", "two words.v2 4", "a " + "9" * 5000])
def test_labels_file_with_a_bad_or_contradictory_line_is_refused(tmp_path, error_message, line):
    (tmp_path / "labels.txt").write_text(f"two words.v2 3\n{line}\n", "utf-8")
    message = error_message(metrics_acc.find_labels, ["two words.v2"], ".", tmp_path / "labels.txt")
    assert "labels.txt, line 2: not a name and a class, or not the class of an" in message and len(message) < 500


def test_class_is_the_name_of_the_folder_or_the_end_of_the_image_name():
    named = f"ILSVRC2012_val_00000293_{SYNSETS[5]}"  # as at Hugging Face
    assert metrics_acc.find_labels([named, f"{SYNSETS[6]}/a"], "flat") == {named: 5, f"{SYNSETS[6]}/a": 6}
    assert metrics_acc.find_labels(["a"], f"images/{SYNSETS[5]}") == {"a": 5}


# -------------------------------------------------------------------------------------------------
# Accuracy


def test_accuracy_of_a_flat_folder_agrees_with_the_ranking(tmp_path, run):
    """The labels have the ranks 1, 3, 6 and 5: one of four is the most likely class, three are among five."""
    lines = [f"{name}.JPEG {ranking(image)[i]}" for (name, image), i in zip(IMAGES.items(), (0, 2, 5, 4))]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    flags = ["--labels", tmp_path / "labels.txt", "--batch_size", 3, "--num_workers", 2]
    code, summary = run("--result_path", save_images(tmp_path / "c", IMAGES), *flags)
    assert (code, summary["images"]) == (0, 4)
    assert summary["accuracy"] == {"colored": {"top1": 0.25, "top5": 0.75}}


def test_accuracy_of_class_folders_and_controls_agrees_with_the_ranking(tmp_path, run, capsys):
    """Each folder is named by the top class of its original image, so that all originals are right."""
    true, colored, expected = tmp_path / "t", tmp_path / "c", []
    for name, image in sorted(IMAGES.items()):
        label = ranking(image)[0]
        versions = {"colored": 255 - image, "true": image, "gray": as_gray(image)}
        save_image(true / SYNSETS[label] / f"{name}.png", image)
        save_image(colored / SYNSETS[label] / f"{name}.png", versions["colored"])
        ranks = {version: ranking(shown).tolist().index(label) for version, shown in versions.items()}
        hits = {f"{version}_top{n}": f"{rank < n:d}" for version, rank in ranks.items() for n in (1, 5)}
        expected.append({"image": f"{SYNSETS[label]}/{name}", "class": SYNSETS[label], **hits})
    (colored / "coloring.json").write_text('{"checkpoint": "some.pdparams"}')
    code, summary = run("--result_path", colored, "--image_dir", true)
    expected.sort(key=lambda row: row["image"])
    assert code == 0 and table(tmp_path / "accuracy_images.csv") == expected
    shares = {
        version: {x: np.mean([int(row[f"{version}_{x}"]) for row in expected]) for x in ("top1", "top5")}
        for version in versions
    }
    assert summary["accuracy"] == shares and shares["true"]["top1"] == 1 != shares["colored"]["top1"]
    assert summary["classes"] > 1 and summary["coloring"] == {"checkpoint": "some.pdparams"}
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[1:4] == [[x, *(f"{share:.2%}" for share in found.values())] for x, found in shares.items()]


def test_load_and_crop_size_reach_the_classifier(tmp_path, run, monkeypatch):
    inputs, real = [], metrics_acc.top_classes
    monkeypatch.setattr(metrics_acc, "top_classes", lambda network, rgb: inputs.append(rgb) or real(network, rgb))
    save_image(tmp_path / "c" / SYNSETS[5] / "a.png", IMAGES["coffee"])
    half = np.asarray(Image.fromarray(IMAGES["coffee"]).resize((150, 128), Image.Resampling.BILINEAR))
    for load_size, expected in ((256, IMAGES["coffee"][80:176, 102:198]), (128, half[16:112, 27:123])):
        run("--result_path", tmp_path / "c", "--load_size", load_size, "--crop_size", 96)
        assert np.abs(inputs[-1].numpy()[0].transpose(1, 2, 0) * 255 - expected).max() < 1.01


def test_random_baseline_has_the_lightness_of_an_image_and_the_colors_of_another(tmp_path, run):
    image, other = (IMAGES[name][:96, :96] for name in ("coffee", "rocket"))
    found = metrics_acc.to_versions([(image, other)], random=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # out-of-gamut colors
        expected = lab2rgb(np.concatenate([rgb2lab(image)[..., :1], rgb2lab(other)[..., 1:]], axis=-1))
    assert np.abs(found["random"].numpy()[0].transpose(1, 2, 0) - expected).max() < 2e-3
    for name, pixels in IMAGES.items():
        save_image(tmp_path / "t" / SYNSETS[5] / f"{name}.png", pixels)
    code, summary = run("--image_dir", tmp_path / "t", "--random", name="random_accuracy.json")
    assert (code, [*summary["accuracy"]], summary["seed"]) == (0, ["random", "true", "gray"], 0)


def test_first_of_several_classifier_outputs_is_used():
    logits = paddle.to_tensor([[0.0, 3, 1, 2, 5, 4]])
    top = metrics_acc.top_classes(lambda _: (logits, -logits, -logits), paddle.zeros([1, 3, 8, 8]))
    assert top.tolist() == [[4, 5, 1, 3, 2]]


# -------------------------------------------------------------------------------------------------
# Analysis per class


def test_confusions_are_sorted_by_what_colorization_adds():
    """Rates are counted image by image: entry (c, d) is the share of images of c for which d is among the five."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 60)
    classes = {
        version: random.permuted(np.tile(np.arange(8), (60, 1)), axis=1)[:, :5] for version in ("colored", "true")
    }
    pairs, rates = metrics_acc.rank_confusions(classes, labels)
    assert len(pairs) == 4 * 7 and (pairs[:, 0] != pairs[:, 1]).all()  # random classes: each of 8 is among the five
    for (c, d), found in zip(pairs, rates):
        images = np.flatnonzero(labels == c)
        expected = [np.mean([d in classes[version][i] for i in images]) for version in ("colored", "true")]
        assert found.tolist() == expected
    added = rates[:, 0] - rates[:, 1]
    assert (np.diff(added) <= 0).all() and added[0] > 0 > added[-1]


def test_classes_are_sorted_by_the_gain_over_gray_and_printed_with_new_confusions(tmp_path, run, capsys):
    """One class is found among the five only with its colors, one only without them, and one either way."""
    gray = {name: as_gray(image) for name, image in IMAGES.items()}
    top, gray_top = ({name: ranking(image)[:5] for name, image in images.items()} for images in (IMAGES, gray))
    raised = next(c for c in top["rocket"] if c not in gray_top["rocket"])
    lowered = next(c for c in gray_top["chelsea"] if c not in top["chelsea"])
    same = gray_top["coffee"][0]
    for name, label, result in (("rocket", raised, IMAGES), ("chelsea", lowered, IMAGES), ("coffee", same, gray)):
        save_image(tmp_path / "t" / SYNSETS[label] / f"{name}.png", IMAGES[name])
        save_image(tmp_path / "c" / SYNSETS[label] / f"{name}.png", result[name])
    run("--result_path", tmp_path / "c", "--image_dir", tmp_path / "t")
    printed = capsys.readouterr().out
    assert f"raised most (top-5 minus gray's): {SYNSETS[raised]} +100.0\n" in printed
    assert f"lowered most (top-5 minus gray's): {SYNSETS[lowered]} -100.0\n" in printed
    rows = [(x["class"], x["colored_top5"], x["gray_top5"]) for x in table(tmp_path / "accuracy_per_class.csv")]
    expected = ((raised, "1.0000", "0.0000"), (same, "1.0000", "1.0000"), (lowered, "0.0000", "1.0000"))
    assert rows == [(SYNSETS[c], *shares) for c, *shares in expected]
    added = table(tmp_path / "accuracy_confusions.csv")[0]
    assert [*added.values()] == [SYNSETS[same], added["taken_for"], "1.0000", "0.0000"]
    assert added["taken_for"] in {SYNSETS[c] for c in gray_top["coffee"] if c not in top["coffee"]}
    assert f"originals'): {SYNSETS[same]} as {added['taken_for']} +100.0" in printed


# -------------------------------------------------------------------------------------------------
# Bad input


def test_unreadable_and_missing_images_are_excluded_from_all_versions(tmp_path, run, capsys, error_message):
    true, colored = tmp_path / "t" / SYNSETS[7], tmp_path / "c" / SYNSETS[7]
    save_images(true, IMAGES)
    save_images(colored, {name: image for name, image in IMAGES.items() if name != "rocket"})
    (colored / "coffee.png").write_bytes((colored / "coffee.png").read_bytes()[:3000])
    (true / "chelsea.png").write_text("text")
    where = ["--image_dir", tmp_path / "t", "--result_path", tmp_path / "c"]
    code, summary = run(*where)
    assert (code, summary["images"]) == (EXIT_SKIPPED, 1)
    assert summary["left_out"] == {
        "no result": [f"{SYNSETS[7]}/rocket"],
        "unreadable": [f"{SYNSETS[7]}/chelsea", f"{SYNSETS[7]}/coffee"],
    }
    printed = capsys.readouterr().err
    assert f"skipped {colored / 'coffee.png'}: " in printed and f"skipped {true / 'chelsea.png'}: " in printed
    (colored / "astronaut.png").unlink()
    assert "none of the 2 images can be read" in error_message(run, *where)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--result_path", "flat"), "a: neither its folder nor its name's end is an ImageNet class"),
        (("--result_path", "flat", "--labels", "labels.txt"), "a: not listed in labels.txt"),
        (("--result_path", "flat", "--labels", "missing.txt"), "missing.txt: cannot be read: no such file"),
        (("--result_path", "good", "--arch", "vgg61"), "--arch vgg61: not one of alexnet, densenet121, "),
        (("--result_path", "good", "--weights", "other.pdparams"), "other.pdparams: another network's checkpoint"),
        (("--result_path", "good", "--load_size", "200"), "--crop_size 224: larger than --load_size 200"),
        (("--random",), "--random needs --image_dir"),
    ],
)
def test_usage_error_prints_one_line(tmp_path, monkeypatch, error_message, flags, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("flat", f"good/{SYNSETS[281]}"):
        save_image(tmp_path / folder / "a.png", IMAGES["coffee"])
    (tmp_path / "labels.txt").write_text("b.png 3\n")
    paddle.save({"a": paddle.ones([1])}, "other.pdparams")
    assert message in error_message(metrics_acc.main, metrics_acc.parse_args(["--arch", "mobilenet_v2", *flags]))


def test_failed_download_names_the_address(tmp_path, monkeypatch, error_message):
    monkeypatch.setattr("paddle.utils.download.WEIGHTS_HOME", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    message = error_message(metrics_acc.load_classifier, "squeezenet1_1")
    assert "--arch squeezenet1_1: no published weights: " in message and "https://" in message
    assert ".pdparams failed" in message and "pass --weights FILE" in message


def test_classifier_without_published_weights_needs_a_file(monkeypatch, error_message):
    def create(pretrained=False):
        raise AssertionError("vgg11 model do not have a pretrained model now")

    monkeypatch.setattr(paddle.vision.models, "vgg11", create)  # faster than the real one
    assert "a pretrained model now; pass --weights FILE" in error_message(metrics_acc.load_classifier, "vgg11")
