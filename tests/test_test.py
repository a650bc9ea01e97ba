"""`test.py`: results, their sizes, formats and records."""

import errno
import json
import os
import shutil
import signal
import time
from threading import Lock
from types import SimpleNamespace

from support.checkpoints import load_checkpoint, save_checkpoint
from support.cli import EXIT_SKIPPED
from support.files import sha256
from support.folders import read_records
from support.sheets import FOOT, HEAD

import numpy as np
import paddle
import pytest
from conftest import ROOT, SmallNetwork, bundled_image, exif, save_image, upsample_by_scipy
from PIL import ExifTags, Image
from processes import started, wait_for
from skimage import color, data

import colorizer
import test
from dataset import lab_to_rgb, rgb_to_lab, to_uint8
from utils import annealed_mean, load_ab_bins

COFFEE = data.coffee()[::8, ::8]  # uint8 [50, 75, 3]


def pixels(path):
    return np.asarray(Image.open(path))


def found(folder, pattern="*.png"):
    """Return the sorted relative paths of a folder's files."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern))


@pytest.fixture
def write_image(tmp_path):
    """Write a small gradient from a gray level to white at each of these paths. Return the last one."""

    def write(*names, level=100):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.linspace(level, 255, 16 * 24, dtype=np.uint8).reshape(16, 24)).save(path)
        return path

    return write


def lowest_lightness(path):
    return color.rgb2lab(pixels(path))[..., 0].min()


def test_result_equals_step_by_step_computation(colorize_files, small_checkpoint, tmp_path):
    """The image is large enough to be converted in two strips."""
    image = bundled_image("coffee").resize((480, 320))
    assert colorizer.STRIP_PIXELS < 480 * 320
    image.save(tmp_path / "coffee.png")
    _, result = colorize_files("coffee.png", "--load_size", 64)
    small = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR))
    network = SmallNetwork()
    network.set_state_dict(load_checkpoint(small_checkpoint))
    network.eval()
    with paddle.no_grad():
        lightness = rgb_to_lab(paddle.to_tensor(small.transpose(2, 0, 1)[None]))[:, :1]
        ab = annealed_mean(network(lightness - 50), load_ab_bins())
    full = rgb_to_lab(paddle.to_tensor(np.asarray(image).transpose(2, 0, 1)[None]))
    ab = paddle.to_tensor(upsample_by_scipy(ab[0].numpy(), *full.shape[2:])[None].astype(np.float32))
    lab = paddle.concat([full[:, :1], ab], axis=1)
    expected = to_uint8(lab_to_rgb(lab, keep_lightness=True))[0].transpose([1, 2, 0]).numpy()
    difference = np.abs(pixels(result / "coffee.png").astype(int) - expected)
    assert np.quantile(difference, 0.99) <= 1 and difference.max() <= 4  # the share of chroma in gamut has steps


def test_batch_size_does_not_change_results(colorize_files, image_folder):
    _, single = colorize_files(image_folder, "--batch_size", 1, result="single")
    _, batches = colorize_files(image_folder, "--batch_size", 3, "--num_workers", 1, result="batches")
    for path in image_folder.iterdir():
        one, other = pixels(single / path.name), pixels(batches / path.name)
        assert np.abs(np.subtract(one, other, dtype=int)).max() <= 1


def test_batch_of_large_images_ends_early():
    image = SimpleNamespace(width=5000, height=4000)  # 20 megapixels
    items = [test.Item("a.png", "a.png", image, np.zeros([8, 8, 3], np.uint8))] * 5
    assert [len(batch) for batch in test.batches(items, 8)] == [2, 2, 1]


def test_share_of_an_image_is_known_from_its_header(write_image):
    path = write_image("a.png")
    assert test.share_of_file(path) == 16 * 24 / test.PIXELS_AHEAD
    path.write_bytes(b"")
    assert test.share_of_file(path) == 0


@pytest.mark.parametrize(("flags", "size"), [((), (50, 75)), (("--load_size", 40, "--crop_size", 32), (32, 32))])
def test_result_in_the_given_format_keeps_the_metadata_of_its_image(colorize_files, tmp_path, flags, size):
    sideways = save_image(tmp_path / "sideways.png", COFFEE, exif=exif())
    _, result = colorize_files(sideways, "--format", "jpg", *flags)
    image = Image.open(result / "sideways.jpg")
    assert image.format == "JPEG" and image.size == size and image.getexif()[ExifTags.Base.Model] == "Camera"


def test_unreadable_or_too_large_images_are_skipped_and_the_others_colorized(colorize_files, write_image, capsys):
    write_image("in/a.png", "in/b.png", "in/c.png").with_name("b.png").write_bytes(b"")
    Image.new("L", (17_000, 8)).save("in/d.png")
    code, result = colorize_files("in", "--format", "webp", "--load_size", 8)
    printed = capsys.readouterr()
    assert code == EXIT_SKIPPED and found(result, "*.webp") == ["a.webp", "c.webp"]
    reasons = "skipped in/b.png: empty file", "skipped in/d.png: too large for webp; choose --format png"
    assert printed.err.splitlines() == [*reasons]
    assert ": 2 images colorized with " in printed.out and printed.out.endswith(", 2 skipped\n")


def test_nearly_black_images_and_further_frames_are_reported(colorize_files, write_image, capsys):
    gray = Image.open(path := write_image("in/a.png"))
    gray.save(path.with_name("frames.gif"), save_all=True, append_images=[gray.rotate(90)])
    gray.save(path.with_name("phone.jpg"), "MPO", save_all=True, append_images=[gray])  # the second one is its depth
    save_image(path.with_name("twelve.tif"), np.asarray(gray).astype(np.uint16) << 4)
    assert colorize_files("in")[0] == 0
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == 2 and "frames.gif: only the first" in lines[0] and "twelve.tif: nearly black" in lines[1]


def test_contact_sheet_shows_all_results_whenever_they_were_written(colorize_files, write_image):
    write_image("in/a.png", "in/b.png", "in/c.png").with_name("b.png").write_bytes(b"")
    colorize_files("in", "--compare", result="whole/")  # with a separator at its end
    colorize_files("in", "--max_samples", 2, result="part")
    _, part = colorize_files("in", "--compare", "--skip_existing", result="part")
    sheet = pixels(part.with_name("part_compare") / "sheet_001.png")
    assert sheet.shape[0] == HEAD + 2 * 213 + FOOT * 2
    assert np.array_equal(sheet, pixels(part.with_name("whole_compare") / "sheet_001.png"))


# Names of images and results


def test_results_of_files_folders_and_patterns_keep_their_places(colorize_files, write_image):
    """Patterns are those that the shell did not expand."""
    write_image("one.png", "beach/a.png", "hills/a.png", *(f"in/{name}.png" for name in ("a1", "a2", "b", "[x]", "x")))
    paths = ("one.png", "one.png", "beach", "in/a*.png", "in/[x].png")
    _, result = colorize_files(paths, "--image_dir", "hills")
    assert found(result) == ["beach/a.png", "hills/a.png", "in/[x].png", "in/a1.png", "in/a2.png", "one.png"]


def test_images_with_names_of_any_bytes_are_colorized_and_recorded(colorize_files, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.png", "猫.png".encode(), b"a\nb.png", b"-rf.png", b"a b.png"):
        Image.new("RGB", (16, 16), "gray").save(os.fsdecode(os.path.join(os.fsencode(folder), name)))
    code, result = colorize_files(folder)
    assert code == 0 and {*os.listdir(folder)} <= {*os.listdir(result)}
    assert colorize_files(folder, "--skip_existing")[0] == 0 and ", 5 up to date" in capsys.readouterr().out


def test_output_flag_names_the_result_of_one_image(colorize_files, write_image, error_message):
    write_image("a.png", "c.png", level=200)
    write_image("new/b.jpg")
    assert colorize_files("a.png", "--output", "new/b.jpg")[0] == 0 and os.listdir("new") == ["b.jpg"]
    assert lowest_lightness("new/b.jpg") > 70 and Image.open("new/b.jpg").format == "JPEG"
    assert "--output names one file" in error_message(colorize_files, ("a.png", "c.png"), "--output", "b.png")
    for flags in (("b.xyz",), ("b.png", "--format", "jpg")):
        assert "must end in" in error_message(colorize_files, "a.png", "--output", *flags)
    os.link("a.png", "A.png")  # the same file by another name, as on a case-insensitive disk
    assert "would overwrite it" in error_message(colorize_files, "a.png", "--output", "A.png")


def test_results_among_images_and_sheets_among_other_files_are_refused(colorize_files, write_image, error_message):
    """Otherwise a second run would colorize results again, as x.png.png."""
    write_image("same/x.png", "same/y/x.png", "other_compare/sheet_001.png")
    for images, result in (("same", "same"), ("same/y", "same"), ("same", "same/y"), ("same/x.png", "same")):
        assert "contains input images" in error_message(colorize_files, images, result=result)
    message = error_message(colorize_files, "same", "--compare", result="other")
    assert "other_compare: contains other files" in message


def test_earlier_results_and_their_sheets_are_not_colorized(colorize_files, write_image, capsys):
    write_image("in/x.png")
    for name in ("out1", "out2"):
        code, result = colorize_files("in", "--compare", result=f"in/{name}")
        assert code == 0 and found(result) == ["x.png"]
    assert "out1: skipped: contains results (coloring.json)" in capsys.readouterr().err


def test_crop_size_must_be_a_multiple_of_8(colorize_files, image_folder, error_message):
    assert "multiple of 8" in error_message(colorize_files, image_folder, "--crop_size", 100)


# Records of where results came from


def test_skip_existing_completes_a_run_and_reports_what_has_changed(
    colorize_files, write_image, small_checkpoint, monkeypatch, error_message, capsys
):
    """The run ended between a record and the name of its result, as by a kill. Later its checkpoint was replaced."""

    def fail(source, target):
        if str(target).endswith("b.png"):
            raise OSError(errno.EIO, "Input/output error")
        os.rename(source, target)

    write_image("in/a.png", "in/b.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert error_message(colorize_files, "in").endswith("b.png: cannot be written: input/output error")
    write_image("in/c.png")

    def printed_again():
        assert colorize_files("in", "--skip_existing")[0] == 0
        return capsys.readouterr()

    printed = printed_again()
    assert printed.err == "1 image to colorize again: the result is missing or has changed\n"
    assert ": 2 images colorized" in printed.out and printed.out.endswith(", 1 up to date\n")
    trained = {"epoch": np.array(0), "step": np.array(1)}
    save_checkpoint({**load_checkpoint(small_checkpoint), **trained}, small_checkpoint)
    printed = printed_again()
    assert printed.err == "3 images to colorize again: other settings (checkpoint)\n"
    assert printed.out.endswith("/model/epoch_19_model.pdparams (epoch 0, 1 step) in float32\n")
    assert printed_again().out.endswith(", 3 up to date\n")


def test_threads_append_their_records_one_after_another(colorize_files, write_image, monkeypatch):
    appending = Lock()

    def append(*_):
        assert appending.acquire(blocking=False)
        time.sleep(0.01)
        appending.release()

    monkeypatch.setattr(test, "append_record", append)
    write_image(*(f"in/{i}.png" for i in range(8)))
    assert colorize_files("in", "--num_workers", 8)[0] == 0


def test_skip_existing_recognizes_copied_folders(colorize_files, write_image, capsys):
    write_image("in/a.png", "in/b/a.png")
    colorize_files("in")
    for source, target in (("in", "in2"), ("result", "result2")):
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    assert colorize_files("in2", "--skip_existing", result="result2")[0] == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.endswith(", 2 up to date\n")


def test_files_that_are_not_results_of_the_same_images_are_kept(colorize_files, write_image, capsys):
    _, result = colorize_files(write_image("a/x.png", level=20))
    own = write_image("result/y.png").read_bytes()
    (result / "z.png").symlink_to("nowhere")
    (result / "folder.png").mkdir()
    write_image("b/x.png", "b/y.png", "b/z.jpg", "b/folder.jpg", "b/new.jpg", level=200)
    capsys.readouterr()
    code, _ = colorize_files("b", "--skip_existing")
    assert code == EXIT_SKIPPED and (result / "new.png").exists()
    assert lowest_lightness(result / "x.png") < 20 and (result / "y.png").read_bytes() == own
    assert (result / "z.png").is_symlink() and (result / "folder.png").is_dir()
    printed = capsys.readouterr()
    assert f"skipped b/x.png: {result}/x.png is not its result, according to coloring.jsonl; move" in printed.err
    assert ": 1 image colorized with" in printed.out and printed.out.endswith(", 4 skipped\n")


def test_second_run_into_one_folder_is_refused(colorize_files, image_folder, monkeypatch, error_message):
    def locked(*_):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("support.files.fcntl.lockf", locked)
    assert error_message(colorize_files, image_folder).endswith("/result: another run is writing to this folder")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_colorization_leaves_only_complete_results_and_is_resumed(tmp_path, image_folder, number, code):
    (tmp_path / "many").mkdir()
    for i in range(300):
        (tmp_path / "many" / f"{i}.png").symlink_to(image_folder / "coffee.png")
    result = tmp_path / "result"
    flags = [tmp_path / "many", "--load_model", "small", "--load_size", 32, "--result_path", result]
    with started(tmp_path / "run", *map(str, flags), script=ROOT / "test.py") as process:
        wait_for(lambda: len(list(result.glob("*.png"))) > 9, process)
        os.killpg(process.pid, number)
        assert process.wait(60) == code
    error = (tmp_path / "run" / "err").read_text()
    if number == signal.SIGTERM:
        assert error.endswith("stopped by SIGTERM; to resume: the same command with --skip_existing\n")
    assert "Traceback" not in error and 0 < len(done := list(result.glob("*.png"))) < 300
    for path in done:
        Image.open(path).load()
    assert test.main(test.parse_args([*map(str, flags), "--skip_existing"])) == 0
    assert len(list(result.glob("*.png"))) == len(read_records(result / "coloring.jsonl")) == 300
    assert [path.name for path in result.glob(".*")] == [".lock"]


# Weights and settings


@pytest.mark.parametrize("recorded", [(40, 0.7, 1), (64, 0.1, 0)])
def test_settings_of_the_checkpoint_or_of_flags_are_recorded(colorize_files, small_checkpoint, image_folder, recorded):
    entries = {"load_size": np.array(40), "temperature": np.array(0.7)}
    save_checkpoint({**SmallNetwork().state_dict(), **entries}, small_checkpoint)
    flags = [] if recorded[0] == 40 else ["--load_size", 64, "--temperature", 0.1, "--saturation", 0]
    _, result = colorize_files(image_folder / "coffee.png", *flags)
    settings = read_records(result / "coloring.jsonl")["coffee.png"]["settings"]
    made_by = json.loads((result / "coloring.json").read_text())
    assert settings == {name: made_by[name] for name in settings}
    assert tuple(settings[name] for name in ("load_size", "temperature", "saturation")) == recorded
    assert settings["sha256"] == sha256(small_checkpoint)
    assert (np.ptp(pixels(result / "coffee.png"), axis=2).max() <= 1) == (recorded[2] == 0)


def test_network_that_predicts_ab_has_no_temperature(colorize_files, ab_checkpoint, image_folder, error_message):
    coffee = image_folder / "coffee.png"
    code, result = colorize_files(coffee, "--load_model", "ab")
    assert code == 0 and json.loads((result / "coloring.json").read_text())["temperature"] is None
    message = error_message(colorize_files, coffee, "--load_model", "ab", "--temperature", 0.38)
    assert message.startswith("--temperature: does not apply to ")
