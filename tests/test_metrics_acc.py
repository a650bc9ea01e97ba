"""Test metrics_acc.py with a random classifier whose answers are computed independently."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from support.cli import EXIT_SKIPPED

import numpy as np
import paddle
import pytest
from PIL import Image
from skimage import data
from skimage.color import lab2rgb, rgb2lab

import metrics_acc

SYNSETS = metrics_acc.load_synsets()
# Short side 256 and even long sides: the center crop of 224 needs no resampling and is plain indexing.
PHOTOS = {
    "astronaut": data.astronaut()[:256, 100:400],
    "coffee": data.coffee()[80:336, 100:400],
    "chelsea": data.chelsea()[:256, 100:400],
    "rocket": data.rocket()[100:356, 200:500],
}


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def save_all(folder, images):
    for name, image in images.items():
        save(folder / (name + ".png"), image)
    return folder


def gray(image):
    lab = rgb2lab(image)
    return (lab2rgb(np.stack([lab[..., 0], 0 * lab[..., 0], 0 * lab[..., 0]], axis=-1)) * 255).round().astype(np.uint8)


def logits(network, image):
    """Compute the logits of uint8 [256, 300, 3], with the crop and the normalization in NumPy."""
    square = image[16:240, 38:262].astype(np.float64) / 255
    normalized = (square - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return network(paddle.to_tensor(normalized.transpose(2, 0, 1)[None].astype(np.float32))).numpy()[0]


@pytest.fixture(scope="module")
def network():
    """MobileNetV2 with random weights, its last layer such that the photographs get different classes."""
    paddle.seed(0)
    network = paddle.vision.models.mobilenet_v2()
    network.eval()
    last = network.classifier[1]
    found = np.stack([logits(network, version) for photo in PHOTOS.values() for version in (photo, gray(photo))])
    last.weight.set_value(last.weight / float(found.std(axis=0).mean()))
    last.bias.set_value(paddle.to_tensor(-found.mean(axis=0) / found.std(axis=0).mean()))
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory, network):
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.pdparams"
    paddle.save(network.state_dict(), str(path))
    return path


@pytest.fixture(scope="module")
def ranking(network):
    """Return a function that sorts the classes of an image by descending logit."""
    return lambda image: np.argsort(-logits(network, image))


def run(output, weights, *flags):
    """main's exit code and its JSON."""
    arguments = ["--save_path", str(output), "--arch", "mobilenet_v2", "--weights", str(weights), "--num_workers", "0"]
    code = metrics_acc.main(metrics_acc.parse_args([*arguments, *map(str, flags)]))
    return code, json.loads((output / "accuracy.json").read_text())


# -------------------------------------------------------------------------------------------------
# Classes


def test_synsets_are_1000_and_sorted():
    assert len(set(SYNSETS)) == 1000 and sorted(SYNSETS) == SYNSETS
    known = {0: "n01440764", 1: "n01443537", 207: "n02099601", 281: "n02123045", 817: "n04285008", 999: "n15075141"}
    assert {i: SYNSETS[i] for i in known} == known  # tench, goldfish, golden retriever, tabby, sports car, tissue


def test_labels_file_takes_numbers_and_ids(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("ILSVRC2012_val_00000001.JPEG 65\nsub/two words.v2 n01443537\n\nbare.png  0999 \n")
    numbers = {synset: i for i, synset in enumerate(SYNSETS)}
    labels = metrics_acc.read_labels(path, numbers)
    assert labels == {"ILSVRC2012_val_00000001": 65, "sub/two words.v2": 1, "bare": 999}
    assert metrics_acc.label_by_file("deep/er/bare", labels, path) == 999
    assert metrics_acc.label_by_file("bare.jpg", labels, path) == 999


@pytest.mark.parametrize("line", ["a.png", "a.png,", "a.png 1000", "a -1", "a n99999999", "a 1.5", "281", "a.png ²"])
def test_labels_file_with_a_bad_line(tmp_path, line):
    (tmp_path / "labels.txt").write_text(f"fine.png 3\n{line}\n")
    with pytest.raises(SystemExit, match="labels.txt, line 2: not a name and a class"):
        metrics_acc.read_labels(tmp_path / "labels.txt", {synset: i for i, synset in enumerate(SYNSETS)})


# -------------------------------------------------------------------------------------------------
# Measures


def test_top1_and_top5_in_a_flat_folder(tmp_path, weights, ranking):
    """Labels of the ranks 1, 3, 6 and 5: one of four is right at once, three of four are among five."""
    lines = [f"{name}.JPEG {ranking(image)[i]}" for (name, image), i in zip(PHOTOS.items(), (0, 2, 5, 4))]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    results = save_all(tmp_path / "c", PHOTOS)
    for flags in (), ("--batch_size", 3), ("--num_workers", 2):
        code, summary = run(tmp_path, weights, "--result_path", results, "--labels", tmp_path / "labels.txt", *flags)
        assert (code, summary["images"]) == (0, 4)
        assert summary["accuracy"] == {"colored": {"top1": 0.25, "top5": 0.75}}


def test_controls_and_class_folders(tmp_path, weights, ranking, capsys):
    """Folders named by the true images' top class: the true ones are right, the others where they get the same."""
    true, colored, expected = tmp_path / "t", tmp_path / "c", {"colored": [], "true": [], "gray": []}
    for name, image in PHOTOS.items():
        versions = {"colored": 255 - image, "true": image, "gray": gray(image)}
        label = ranking(image)[0]
        save(true / SYNSETS[label] / f"{name}.png", image)
        save(colored / SYNSETS[label] / f"{name}.png", versions["colored"])
        for version in expected:
            rank = ranking(versions[version]).tolist().index(label)
            expected[version].append([rank < 1, rank < 5])
    (colored / "coloring.json").write_text('{"checkpoint": "some.pdparams"}')
    code, summary = run(tmp_path, weights, "--result_path", colored, "--image_dir", true)
    shares = {version: np.mean(hits, axis=0).tolist() for version, hits in expected.items()}
    assert code == 0
    assert {version: [*found.values()] for version, found in summary["accuracy"].items()} == shares
    assert shares["true"] == [1, 1] != shares["colored"] and len({*map(tuple, shares.values())}) > 1
    assert summary["classes"] > 1
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == ["top-1", "top-5"]
    assert printed[1:4] == [[version, *(f"{share:.2%}" for share in shares[version])] for version in expected]
    # Per class the same again.
    with open(tmp_path / "accuracy_per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == sorted({path.parent.name for path in true.rglob("*.png")})
    images = np.array([int(row["images"]) for row in rows])
    for version, share in shares.items():
        assert images @ [float(row[f"{version}_top1"]) for row in rows] / 4 == pytest.approx(share[0])
        assert images @ [float(row[f"{version}_top5"]) for row in rows] / 4 == pytest.approx(share[1])
    assert summary["coloring"] == {"checkpoint": "some.pdparams"}
    # And image by image.
    with open(tmp_path / "accuracy_images.csv", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: list(PHOTOS).index(Path(row["image"]).name))
    assert all(row["class"] == Path(row["image"]).parent.name for row in rows)
    for version, hits in expected.items():
        assert [[row[f"{version}_top1"], row[f"{version}_top5"]] for row in rows] == [
            [f"{x:d}" for x in y] for y in hits
        ]
    # And without results.
    _, controls = run(tmp_path, weights, "--controls_only", "--image_dir", true)
    assert controls["accuracy"] == {version: summary["accuracy"][version] for version in ("true", "gray")}
    assert controls["colored_images"] is None


def test_classes_do_not_depend_on_the_other_folders(tmp_path, weights, ranking):
    image = PHOTOS["coffee"]
    top = ranking(image)[0]
    save(tmp_path / "c" / SYNSETS[top] / "a.png", image)
    assert run(tmp_path, weights, "--result_path", tmp_path / "c")[1]["accuracy"]["colored"]["top1"] == 1
    save(tmp_path / "c" / SYNSETS[0] / "a.png", image)  # sorted before it
    assert run(tmp_path, weights, "--result_path", tmp_path / "c")[1]["accuracy"]["colored"]["top1"] == 0.5
    # The class folder itself may be named.
    assert run(tmp_path, weights, "--result_path", tmp_path / "c" / SYNSETS[top])[1]["accuracy"]["colored"]["top1"] == 1


def test_load_and_crop_size_reach_the_classifier(tmp_path, weights, monkeypatch):
    seen = []
    real = metrics_acc.top_classes
    monkeypatch.setattr(metrics_acc, "top_classes", lambda network, rgb: seen.append(rgb) or real(network, rgb))
    save(tmp_path / "c" / SYNSETS[5] / "a.png", PHOTOS["coffee"])
    run(tmp_path, weights, "--result_path", tmp_path / "c", "--load_size", "256", "--crop_size", "96")
    square = PHOTOS["coffee"][80:176, 102:198]
    assert np.abs(seen[0].numpy()[0].transpose(1, 2, 0) * 255 - square).max() < 1e-3
    run(tmp_path, weights, "--result_path", tmp_path / "c", "--load_size", "128", "--crop_size", "96")
    half = np.asarray(Image.fromarray(PHOTOS["coffee"]).resize((150, 128), Image.Resampling.BILINEAR))
    assert np.abs(seen[1].numpy()[0].transpose(1, 2, 0) * 255 - half[16:112, 27:123]).max() < 1.01


def test_gray_is_lab_without_ab():
    found = metrics_acc.as_gray(paddle.to_tensor(PHOTOS["coffee"].transpose(2, 0, 1)[None])).numpy()[0]
    assert np.abs(found.transpose(1, 2, 0) * 255 - gray(PHOTOS["coffee"])).max() < 0.6


def test_first_of_several_outputs_is_used():
    logits = paddle.to_tensor([[0.0, 3, 1, 2, 5, 4]])
    for output in (logits, (logits, -logits, -logits), [logits]):
        top = metrics_acc.top_classes(lambda _, output=output: output, paddle.zeros([1, 3, 8, 8]))
        assert top.tolist() == [[4, 5, 1, 3, 2]]


# -------------------------------------------------------------------------------------------------
# Bad input


def test_unreadable_and_missing_images_are_left_out_of_all_versions(tmp_path, weights, capsys):
    true, colored = tmp_path / "t" / SYNSETS[7], tmp_path / "c" / SYNSETS[7]
    save_all(true, PHOTOS)
    save_all(colored, {name: image for name, image in PHOTOS.items() if name != "rocket"})
    (colored / "coffee.png").write_bytes((colored / "coffee.png").read_bytes()[:3000])
    (true / "chelsea.png").write_text("text")
    code, summary = run(tmp_path, weights, "--image_dir", tmp_path / "t", "--result_path", tmp_path / "c")
    assert (code, summary["images"]) == (EXIT_SKIPPED, 1)
    assert summary["left_out"] == {
        "no colored image": [f"{SYNSETS[7]}/rocket"],
        "unreadable": [f"{SYNSETS[7]}/chelsea", f"{SYNSETS[7]}/coffee"],
    }
    error = capsys.readouterr().err
    for line in (
        "rocket: no colored image",
        f"skipped {colored / 'coffee.png'}: ",
        f"skipped {true / 'chelsea.png'}: ",
    ):
        assert line in error
    (colored / "astronaut.png").unlink()
    with pytest.raises(SystemExit, match="none of the 2 images can be read"):
        run(tmp_path, weights, "--image_dir", tmp_path / "t", "--result_path", tmp_path / "c")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--result_path", "missing"), "missing: no such file or folder"),
        (("--result_path", "named"), "tabby: the folder of tabby/a is not an ImageNet class"),
        (("--result_path", "flat"), "flat: the folder of a is not an ImageNet class"),
        (("--result_path", "flat", "--labels", "labels.txt"), "a: is not listed in labels.txt"),
        (("--result_path", "flat", "--labels", "missing.txt"), "missing.txt: cannot be read: no such file"),
        (("--result_path", "good", "--arch", "vgg61"), "--arch vgg61: not one of alexnet, densenet121, "),
        (("--result_path", "good", "--arch", "LeNet"), "--arch LeNet: not one of "),
        (("--result_path", "good", "--weights", "missing.pdparams"), "missing.pdparams: no such checkpoint"),
        (("--result_path", "good", "--weights", "labels.txt"), "labels.txt: not a readable checkpoint"),
        (("--result_path", "good", "--arch", "squeezenet1_0"), "another network's checkpoint"),
        (("--result_path", "good", "--load_size", "200"), "--crop_size 224: larger than --load_size 200"),
        (("--controls_only",), "--controls_only needs --image_dir"),
        (("--result_path", "good", "--save_path", "labels.txt"), "labels.txt: cannot be written to: file exists"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, weights, flags, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("named/tabby", "flat", f"good/{SYNSETS[281]}"):
        save(tmp_path / folder / "a.png", PHOTOS["coffee"])
    (tmp_path / "labels.txt").write_text("b.png 3\n")
    defaults = ["--arch", "mobilenet_v2", "--weights", str(weights), "--num_workers", "0"]
    with pytest.raises(SystemExit) as stop:
        metrics_acc.main(metrics_acc.parse_args([*defaults, *flags]))
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_failed_download_names_the_file(monkeypatch, caplog):
    """Paddle's own downloader, whose requests all fail."""
    monkeypatch.setattr("paddle.utils.download._md5check", lambda *_: False)  # as if nothing were cached
    monkeypatch.setattr("paddle.utils.download._download_methods", {"get": lambda *_: False})
    monkeypatch.setattr("time.sleep", lambda _: None)
    caplog.set_level("INFO")
    with pytest.raises(SystemExit) as stop:
        metrics_acc.load_classifier("squeezenet1_1")
    assert str(stop.value).startswith("https://")
    assert ".pdparams: download failed; download the file on a machine with internet access" in str(stop.value)
    assert "--arch squeezenet1_1 --weights FILE" in str(stop.value) and "\n" not in str(stop.value)
    assert caplog.text == ""  # not a line for each retry


def test_classifier_without_published_weights_needs_a_file(monkeypatch):
    def create(pretrained=False):
        raise AssertionError("vgg11 model do not have a pretrained model now")

    monkeypatch.setattr(paddle.vision.models, "vgg11", create)
    with pytest.raises(SystemExit, match="--arch vgg11: Paddle has no published weights for it; pass --weights FILE"):
        metrics_acc.load_classifier("vgg11")


@pytest.mark.slow
def test_as_a_command(tmp_path):
    script = Path(metrics_acc.__file__)
    save(tmp_path / "result" / "no class" / "a.png", PHOTOS["coffee"])
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("no class: the folder of no class/a is not an ImageNet class")
