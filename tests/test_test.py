"""`test.py`: results, their sizes, formats and records."""

import hashlib
import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace

from support.checkpoints import load_checkpoint, save_checkpoint
from support.cli import EXIT_SKIPPED
from support.files import lock_folder
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


def largest_difference(one, other):
    return np.abs(np.subtract(one, other, dtype=int)).max()


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


def hold_lock(folder):
    hold_lock.file = lock_folder(folder)


def lowest_lightness(path):
    return color.rgb2lab(pixels(path))[..., 0].min()


def test_result_keeps_the_lightness_of_its_image(colorize_files, image_folder):
    """Also where strong colors leave the gamut, apart from rounding to 8 bits."""
    _, result = colorize_files(image_folder, "--saturation", 10)
    for path in image_folder.iterdir():
        before, after = (color.rgb2lab(pixels(p)) for p in (path, result / path.name))
        assert np.abs(before - after)[..., 0].max() < 0.5 and np.hypot(*after.T[1:]).max() > 50


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


def test_saturation_is_applied_and_recorded(colorize_files, image_folder):
    _, result = colorize_files(image_folder, "--saturation", 0)
    assert json.loads((result / "coloring.json").read_text())["saturation"] == 0
    records = read_records(result / "coloring.jsonl").values()
    assert [record["settings"]["saturation"] for record in records] == [0] * 4
    assert np.ptp(pixels(result / "coffee.png"), axis=2).max() <= 1


def test_batch_size_does_not_change_results(colorize_files, image_folder):
    _, single = colorize_files(image_folder, "--batch_size", 1, result="single")
    _, batches = colorize_files(image_folder, "--batch_size", 3, "--num_workers", 1, result="batches")
    for path in image_folder.iterdir():
        assert largest_difference(pixels(single / path.name), pixels(batches / path.name)) <= 1


def test_batch_of_large_images_ends_early():
    image = SimpleNamespace(width=5000, height=4000)  # 20 megapixels
    items = [test.Item("a.png", "a.png", image, np.zeros([8, 8, 3], np.uint8))] * 5
    assert [len(batch) for batch in test.batches(items, 8)] == [2, 2, 1]


def test_crop_size_flag_gives_center_crops(colorize_files, image_folder):
    _, result = colorize_files(image_folder, "--load_size", 72, "--crop_size", 64)
    for path in result.rglob("*.png"):
        assert pixels(path).shape == (64, 64, 3)
    whole = color.rgb2lab(np.asarray(Image.open(image_folder / "rocket.png").resize((108, 72), Image.BILINEAR)))
    left = (whole.shape[1] - 64) // 2
    crop = color.rgb2lab(pixels(result / "rocket.png"))[..., 0]
    assert np.abs(crop - whole[4:68, left : left + 64, 0])[1:-1, 1:-1].mean() < 1


def test_images_with_names_of_any_bytes_are_colorized_and_recorded(colorize_files, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.png", "猫.png".encode(), b"a\nb.png", b"-rf.png", b"a b.png"):
        Image.new("RGB", (16, 16), "gray").save(os.fsdecode(os.path.join(os.fsencode(folder), name)))
    code, result = colorize_files(folder)
    assert code == 0
    written = set(os.listdir(os.fsencode(result))) - {b"coloring.json", b"coloring.jsonl", b".lock"}
    assert written == set(os.listdir(os.fsencode(folder)))
    assert colorize_files(folder, "--skip_existing")[0] == 0 and ", 5 up to date" in capsys.readouterr().out


def test_contact_sheet_shows_all_images_whenever_they_were_colorized(colorize_files, write_image):
    write_image("in/a.png", "in/b.png", "in/c.png")
    colorize_files("in", "--compare", result="whole/")  # with a separator at its end
    colorize_files("in", "--max_samples", 2, result="part")
    _, part = colorize_files("in", "--compare", "--skip_existing", result="part")
    sheet = pixels(part.with_name("part_compare") / "sheet_001.png")
    assert sheet.shape[1] > 3 * 320 and np.array_equal(sheet, pixels(part.with_name("whole_compare") / "sheet_001.png"))


def test_contact_sheet_leaves_out_skipped_images(colorize_files, write_image, capsys):
    write_image("in/a.png")
    (write_image("in/b.png")).write_bytes(b"")
    code, result = colorize_files("in", "--compare", "--crop_size", 32)
    assert code == EXIT_SKIPPED and len(capsys.readouterr().err.splitlines()) == 1
    assert pixels(result.with_name("result_compare") / "sheet_001.png").shape[0] == HEAD + 240 + FOOT


def test_contact_sheets_are_not_written_among_other_files(colorize_files, write_image, error_message):
    own = write_image("result_compare/sheet_001.png")
    assert "result_compare: contains other files" in error_message(colorize_files, write_image("in/a.png"), "--compare")
    assert found(own.parent, "*") == ["sheet_001.png"]


def test_nearly_black_images_and_further_frames_are_reported(colorize_files, write_image, capsys):
    gray = Image.open(path := write_image("in/a.png"))
    gray.save(path.with_name("frames.gif"), save_all=True, append_images=[gray.rotate(90)])
    gray.save(path.with_name("phone.jpg"), "MPO", save_all=True, append_images=[gray])  # the second one is its depth
    save_image(path.with_name("twelve.tif"), np.asarray(gray).astype(np.uint16) << 4)
    assert colorize_files("in")[0] == 0
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == 2 and "frames.gif: only the first" in lines[0] and "twelve.tif: nearly black" in lines[1]


# Names of results


def test_results_of_several_files_and_folders_keep_their_names(tmp_path, colorize_files, write_image):
    write_image("one.png", "two.png", "beach/a.png", "hills/a.png")
    code, result = colorize_files(("one.png", "two.png", "one.png", "beach"), "--image_dir", "hills", "--compare")
    assert code == 0 and found(result) == ["beach/a.png", "hills/a.png", "one.png", "two.png"]
    assert found(tmp_path / "result_compare") == ["sheet_001.png"]


def test_output_flag_names_the_result_of_one_image(tmp_path, colorize_files, write_image, error_message):
    write_image("a.png", "c.png")
    assert colorize_files("a.png", "--output", "new/b.jpg")[0] == 0
    assert found(tmp_path / "new", "*") == ["b.jpg"] and Image.open(tmp_path / "new" / "b.jpg").format == "JPEG"
    assert "--output names one file" in error_message(colorize_files, ("a.png", "c.png"), "--output", "b.png")
    assert "would overwrite it" in error_message(colorize_files, "a.png", "--output", "a.png")
    for flags in (("b.xyz",), ("b.png", "--format", "jpg")):
        assert "must end in" in error_message(colorize_files, "a.png", "--output", *flags)


def test_result_path_that_contains_images_is_refused(tmp_path, colorize_files, write_image, error_message):
    """Otherwise a second run would colorize them again, as x.png.png."""
    write_image("same/x.png", "same/y/x.png")
    for images, result in (("same", "same"), ("same/y", "same"), ("same", "same/y"), ("same/x.png", "same")):
        assert "contains input images" in error_message(colorize_files, images, result=result)
    assert found(tmp_path / "same") == ["x.png", "y/x.png"]


def test_earlier_results_and_their_sheets_are_not_colorized(colorize_files, write_image, capsys):
    write_image("in/x.png")
    for name in ("out1", "out2"):
        code, result = colorize_files("in", "--compare", result=f"in/{name}")
        assert code == 0 and found(result) == ["x.png"]
    assert "out1: skipped: contains results (coloring.json)" in capsys.readouterr().err


def test_patterns_that_the_shell_did_not_expand_are_expanded(colorize_files, write_image):
    write_image("in/a1.png", "in/a2.png", "in/b.png", "in/[x].png", "in/x.png")
    _, result = colorize_files(("in/a*.png", "in/[x].png"))
    assert sorted(path.name for path in result.glob("*.png")) == ["[x].png", "a1.png", "a2.png"]


# Records of where results came from


def test_skip_existing_completes_a_run_and_reports_what_has_changed(
    colorize_files, write_image, small_checkpoint, capsys
):
    """The run was killed between the second record and its result. Later its checkpoint was replaced."""
    write_image("in/a.png", "in/b.png", "in/c.png")
    _, result = colorize_files("in", "--max_samples", 2)
    (result / "b.png").unlink()
    capsys.readouterr()

    def printed_again():
        assert colorize_files("in", "--skip_existing")[0] == 0
        return capsys.readouterr()

    printed = printed_again()
    assert printed.err == "1 image to colorize again: the result is missing or has changed\n"
    assert ": 2 images colorized" in printed.out and printed.out.endswith(", 1 up to date\n")
    save_checkpoint({**load_checkpoint(small_checkpoint), "step": np.array(1)}, small_checkpoint)
    assert printed_again().err == "3 images to colorize again: other settings (checkpoint)\n"
    assert found(result) == ["a.png", "b.png", "c.png"] and printed_again().out.endswith(", 3 up to date\n")


def test_skip_existing_recognizes_copied_folders(colorize_files, write_image, capsys):
    write_image("in/a.png", "in/b/a.png")
    colorize_files("in")
    for source, target in (("in", "in2"), ("result", "result2")):
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    assert colorize_files("in2", "--skip_existing", result="result2")[0] == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.endswith(", 2 up to date\n")


def test_files_that_are_not_results_of_the_same_images_are_kept(colorize_files, write_image, capsys):
    a = write_image("a/x.png", level=20)
    _, result = colorize_files(a)
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
    assert f"skipped b/x.png: {result}/x.png is not its result (coloring.jsonl); move it, or " in printed.err
    assert ": 1 image colorized with" in printed.out and printed.out.endswith(", 4 skipped\n")


def test_output_flag_replaces_the_named_file(colorize_files, write_image):
    write_image("b.png", level=20)
    assert (
        colorize_files(write_image("a.png", level=200), "--output", "b.png")[0] == 0 and lowest_lightness("b.png") > 70
    )


def test_second_run_into_one_folder_is_refused(colorize_files, write_image, tmp_path, error_message):
    write_image("in/a.png")
    (tmp_path / "result").mkdir()
    with get_context("fork").Pool(1) as other_process:  # one process may lock a file twice
        other_process.apply(hold_lock, [tmp_path / "result"])
        message = error_message(colorize_files, "in")
    assert message == f"{tmp_path / 'result'}: another run is writing to this folder"
    assert colorize_files("in")[0] == 0


@pytest.mark.parametrize(("flags", "size"), [((), (50, 75)), (("--load_size", 40, "--crop_size", 32), (32, 32))])
def test_result_in_the_given_format_keeps_the_metadata_of_its_image(colorize_files, tmp_path, flags, size):
    sideways = save_image(tmp_path / "sideways.png", COFFEE, exif=exif())
    _, result = colorize_files(sideways, "--format", "jpg", *flags)
    image = Image.open(result / "sideways.jpg")
    assert image.format == "JPEG" and image.size == size and image.getexif()[ExifTags.Base.Model] == "Camera"


def test_image_too_large_for_the_format_is_skipped(colorize_files, tmp_path, capsys):
    Image.new("L", (17_000, 8)).save(tmp_path / "wide.png")
    code, _ = colorize_files("wide.png", "--format", "webp", "--load_size", 8)
    assert code == EXIT_SKIPPED and "wide.png: too large for webp; choose --format png" in capsys.readouterr().err


# Reading and writing


def test_unreadable_images_are_skipped_and_the_others_colorized(colorize_files, write_image, capsys):
    write_image("in/a.png", "in/b.png", "in/c.png").with_name("b.png").write_bytes(b"")
    write_image("in/d.jpg").write_bytes(b"text")
    code, result = colorize_files("in")
    printed = capsys.readouterr()
    assert code == EXIT_SKIPPED and found(result) == ["a.png", "c.png"]
    reasons = "skipped in/b.png: empty file", "skipped in/d.jpg: not an image in a readable format, or damaged"
    assert printed.err.splitlines() == [*reasons]
    assert ": 2 images colorized with " in printed.out and printed.out.endswith(", 2 skipped\n")


def test_result_that_cannot_get_its_name_leaves_at_most_its_record(
    colorize_files, write_image, monkeypatch, error_message, capsys
):
    """A kill between the record and the renaming is like that, too."""

    def refuse(source, target):
        if str(target).endswith("a.png"):
            raise OSError(5, "Input/output error")
        os.rename(source, target)

    write_image("in/a.png", "in/b.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert error_message(colorize_files, "in").endswith("a.png: cannot be written: input/output error")
    assert colorize_files("in", "--skip_existing")[0] == 0
    printed = capsys.readouterr()
    assert "1 image to colorize again: the result is missing or has changed" in printed.err
    assert printed.out.endswith(", 1 up to date\n")


@pytest.mark.parametrize(("share", "most"), [(4, 5), (10**6, test.IMAGES_AHEAD + 1)])
def test_threads_work_ahead_by_a_limited_number_of_pixels(share, most):
    """The next job waits until there is room for it."""
    started = []

    def jobs():
        for i in range(99):
            started.append(i)
            yield test.PIXELS_AHEAD // share, partial(int, i)

    with ThreadPoolExecutor(1) as pool:
        for i, future in enumerate(test.in_threads(pool, jobs())):
            assert future.result() == i and len(started) - i <= most


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
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
    assert "Traceback" not in error and (result / "coloring.json").exists()
    if number != signal.SIGKILL:
        assert re.fullmatch(r"stopped by .*; to resume: .* --skip_existing", error.splitlines()[-1])
        assert [path.name for path in result.glob(".*")] == [".lock"]
    done = list(result.glob("*.png"))
    assert 0 < len(done) < 300
    for path in done:
        Image.open(path).load()
    assert test.main(test.parse_args([*map(str, flags), "--skip_existing"])) == 0
    assert len(list(result.glob("*.png"))) == len(read_records(result / "coloring.jsonl")) == 300


# Usage errors


def test_usage_errors_print_one_line(colorize_files, tmp_path, image_folder, error_message):
    coffee = image_folder / "coffee.png"
    (tmp_path / "file").touch()
    assert "multiple of 8" in error_message(colorize_files, coffee, "--crop_size", 100)
    assert "larger than --load_size" in error_message(colorize_files, coffee, "--crop_size", 512)
    assert "cannot be written" in error_message(colorize_files, coffee, result="file/result")
    os.link(coffee, tmp_path / "COFFEE.png")  # the same file by another name, as on a case-insensitive disk
    assert "overwrite" in error_message(colorize_files, coffee, "--output", tmp_path / "COFFEE.png")


# Weights


def test_size_and_temperature_of_the_checkpoint_are_recorded(colorize_files, small_checkpoint, image_folder):
    entries = {"load_size": np.array(40), "temperature": np.array(0.7)}
    save_checkpoint({**SmallNetwork().state_dict(), **entries}, small_checkpoint)
    for flags, size, temperature in (((), 40, 0.7), (("--load_size", 64, "--temperature", 0.1), 64, 0.1)):
        _, result = colorize_files(image_folder / "coffee.png", *flags)
        made_by = json.loads((result / "coloring.json").read_text())
        assert (made_by["load_size"], made_by["temperature"]) == (size, temperature)
        assert made_by["sha256"] == hashlib.sha256(small_checkpoint.read_bytes()).hexdigest()


def test_last_line_reports_how_long_the_weights_were_trained(colorize_files, small_checkpoint, image_folder, capsys):
    trained = {"load_size": np.array(64), "epoch": np.array(0), "step": np.array(3)}
    save_checkpoint({**load_checkpoint(small_checkpoint), **trained}, small_checkpoint)
    colorize_files(image_folder / "coffee.png")
    assert capsys.readouterr().out.endswith("epoch_19_model.pdparams (epoch 0, 3 steps) in float32\n")


def test_network_that_predicts_ab_has_no_temperature(colorize_files, ab_checkpoint, image_folder, error_message):
    coffee = image_folder / "coffee.png"
    code, result = colorize_files(coffee, "--load_model", "ab")
    assert code == 0 and pixels(result / "coffee.png").shape == pixels(coffee).shape
    assert json.loads((result / "coloring.json").read_text())["temperature"] is None
    assert colorize_files(coffee, "--load_model", "ab", "--skip_existing")[0] == 0
    message = error_message(colorize_files, coffee, "--load_model", "ab", "--temperature", 0.38)
    assert message.startswith("--temperature: does not apply to ")
