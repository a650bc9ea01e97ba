"""Unusual use: flags out of range, stopped runs, folders with links and other files, existing results."""

import ntpath
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from support import cli
from support.checkpoints import save_checkpoint
from support.cli import UserError, progress, run_script
from support.files import atomic_path, make_folder
from support.images import InvalidImageError, list_images, named_images, read_rgb, relative_path

import numpy as np
import pytest
from conftest import SmallNetwork
from PIL import Image
from processes import started, wait_for

import get_invalid_images
import metrics_acc
import metrics_auc
import test
import train
from pretrained import find_weights
from resources import convert_weights, estimate_prior
from utils import load_prior

ROOT = Path(train.__file__).parent
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "resources").glob("*.py")]
SCRIPTS = [path for path in SCRIPTS if "def parse_args" in path.read_text(encoding="utf-8")]


@pytest.fixture
def color(tmp_path, small_network):
    """Colorizes with a small network. Returns the exit code."""
    save_checkpoint(SmallNetwork().state_dict(), tmp_path / "model" / "epoch_19_model.pdparams")

    def color(*flags):
        where = ["--model_path", str(tmp_path / "model"), "--load_size", "32", "--precision", "float32"]
        return test.main(test.parse_args([*where, *map(str, flags)]))

    return color


def found(folder, pattern="*.png"):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern))


# Flags


TRAIN = [(train, "--image_dir x", flags) for flags in (
    *("--max_steps 0", "--max_steps -1", "--beta1 1.5", "--beta2 nan", "--seed -1", "--sigma 1e-30", "--sigma nan"),
    *("--lr 0", "--lr nan", "--lr inf", "--gamma nan", "--load_size 20000", "--lr_steps 5 -5", "--prior="),
)]  # fmt: skip
PRIOR = [(estimate_prior, "--image_dir x", flags) for flags in (
    *("--sigma nan", "--sigma 0", "--sigma -3", "--batch_size 0", "--num_workers -1"),
)]  # fmt: skip
COLOR = [(test, "x.jpg", flags) for flags in (
    *("--temperature 0", "--batch_size 0"),
    *("--temperature 1e-39", "--temperature nan", "--load_size 20000", "--num_workers 0", "--result_path="),
)]  # fmt: skip
OTHERS = [
    (train, "--image_dir x", "--gamma 2"),
    (train, "--image_dir x", "--NN 400"),
    (train, "--image_dir x", "--loss_step 0"),
    (get_invalid_images, "--image_dir x", "--move_to="),
    (get_invalid_images, "--image_dir x", "--tolerance 256"),
    (metrics_auc, "--imgs_dir x", "--crop_size 0"),
    (metrics_acc, "--results_dir x", "--weights="),
    (convert_weights, "x", "--head_temperature nan"),
]


@pytest.mark.parametrize(("script", "needed", "flags"), [*TRAIN, *PRIOR, *COLOR, *OTHERS])
def test_flag_out_of_range_exits_with_2_and_one_line_that_names_it(capsys, script, needed, flags):
    with pytest.raises(SystemExit) as stop:
        script.parse_args([*needed.split(), *flags.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert re.split("[ =]", flags)[0] in line and re.search("must be (at least|from)|is empty", line)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_flags_that_are_numbers_have_a_range(path):
    """A bare int or float would accept -1 and NaN."""
    assert not re.search(r"type=(int|float)\b", path.read_text(encoding="utf-8"))


def test_flag_that_is_neither_true_nor_false_is_named(capsys):
    with pytest.raises(SystemExit):
        test.parse_args(["x.jpg", "--compare", "maybe"])
    assert "neither true nor false: 'maybe'" in capsys.readouterr().err


# Ends of scripts


@pytest.fixture
def handlers():
    """Restores the usual handlers, because Ctrl-C is ignored when a shell runs the tests in the background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in cli.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(main, capsys, after_stop=""):
    code = run_script(lambda _: main(), lambda: None, after_stop)
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return code, said


@pytest.mark.parametrize(("number", "code", "why"), [("INT", 130, "by Ctrl-C"), ("TERM", 143, "by SIGTERM")])
def test_stopped_script_reports_how_many_images_were_done(handlers, capsys, number, code, why):
    def main():
        for i in progress(iter(range(9)), 9):
            if i == 4:
                os.kill(os.getpid(), getattr(signal, f"SIG{number}"))

    assert ended(main, capsys, "continue so") == (code, f"stopped {why} after 4 of 9 images; continue so")


@pytest.mark.parametrize(
    ("error", "line"),
    [(MemoryError(), "not enough memory"), (OSError(24, "Too many open files", "a.png"), "a.png: too many open files")],
)
def test_lack_of_memory_or_a_file_error_ends_the_script_with_one_line(handlers, capsys, error, line):
    def main():
        raise error

    code, said = ended(main, capsys)
    assert code == 1 and said.startswith(line)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_ends_through_run_script(path):
    ending = r'__name__ == "__main__":\n    sys\.exit\((?:cli\.)?run_script\(main, parse_args'
    assert re.search(ending, path.read_text("utf-8"))


COLOR_SMALL = """
import sys
sys.path[:0] = {paths}
import test, pretrained
from support.cli import run_script
from small_network import SmallNetwork
pretrained.CIC = SmallNetwork
sys.exit(run_script(test.main, test.parse_args, "to continue: --skip_existing"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_colorization_leaves_complete_results_only(tmp_path, color, photographs, number, code):
    (tmp_path / "many").mkdir()
    for i in range(600):
        (tmp_path / "many" / f"{i}.png").symlink_to(photographs / "coffee.png")
    (script := tmp_path / "color_small.py").write_text(
        COLOR_SMALL.format(paths=[str(ROOT), str(Path(__file__).parent)]), "utf-8"
    )
    result = tmp_path / "result"
    flags = [str(x) for x in (tmp_path / "many", "--model_path", tmp_path / "model", "--result_path", result)]
    with started(tmp_path / "run", *flags, "--load_size", "32", script=script) as process:
        wait_for(lambda: len(list(result.glob("*.png"))) > 9, process)
        os.killpg(process.pid, number)
        assert process.wait(60) == code
    lines = (tmp_path / "run" / "err").read_text().strip().splitlines()
    stop = re.fullmatch(r"stopped by .* after (\d+) of 600 images; to continue: --skip_existing", lines[-1])
    assert 0 < int(stop[1]) <= len(list(result.glob("*.png"))) < 600
    assert "Traceback" not in "".join(lines) and (result / "coloring.json").exists()
    assert not list(result.glob(".*"))
    for path in result.glob("*.png"):
        Image.open(path).load()


def test_closed_pipe_ends_the_script_silently():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from support.cli import run_script\n"
    code += "sys.exit(run_script(lambda _: print('x' * 10**6), lambda: None))"
    done = subprocess.run(f"{sys.executable} -W ignore -c \"$CODE\" | head -c 1", shell=True, capture_output=True,
                          env={**os.environ, "CODE": code})  # fmt: skip
    assert done.stdout == b"x" and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_only_temporary_files_older_than_a_day_are_removed(tmp_path):
    with atomic_path(tmp_path / "a.png") as left:
        left.touch()
    (folder := tmp_path / f".folder.{'1' * 16}.tmp").mkdir()
    others = [
        tmp_path / name for name in (".a.png.1.tmp", ".hidden", f"b.{'0' * 16}.tmp", ".c.tmp", ".d.12345678.9.tmp")
    ]
    for path in (left, *others):
        path.touch()
    for path in (folder, *others):
        os.utime(path, (time.time() - 90_000,) * 2)
    make_folder(tmp_path)
    assert left.exists()
    os.utime(left, (time.time() - 90_000,) * 2)
    make_folder(tmp_path)
    assert {*tmp_path.iterdir()} == {tmp_path / "a.png", folder, *others}
    make_folder(tmp_path / "new")


def test_interrupted_write_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and found(tmp_path, "*") == ["a"]


def test_replaced_file_keeps_its_permissions_and_links_to_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (file := tmp_path / "folder" / "a").write_text("old")
    file.chmod(0o640)
    (link := tmp_path / "link").symlink_to("folder/a")
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o640


def test_file_that_is_held_for_a_moment_is_replaced_later(tmp_path, monkeypatch):
    attempts, replace = [], os.replace

    def held(*paths):
        attempts.append(paths)
        if len(attempts) < 3:
            raise PermissionError(13, "Permission denied")
        replace(*paths)

    monkeypatch.setattr(os, "replace", held)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new" and len(attempts) == 3


def test_files_with_the_longest_names_are_written(tmp_path):
    for path in (tmp_path / ("x" * 251 + ".png"), tmp_path / ("猫" * 83 + ".png")):
        with atomic_path(path) as temporary:
            temporary.write_text("")
        assert path.exists()


# Lists of images


@pytest.fixture
def photo(photographs):
    def photo(path, name="coffee"):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs / f"{name}.png", path)

    return photo


def test_linked_folder_is_visited_once_under_its_own_name(tmp_path, photo, capsys):
    photo(tmp_path / "z" / "a.png")
    for name in ("up", "up2"):
        (tmp_path / "z" / name).symlink_to("..")  # with two of them there are endless paths
    (tmp_path / "a").symlink_to("z")
    assert [os.path.relpath(path, tmp_path) for path in list_images(tmp_path)] == ["z/a.png"]
    assert capsys.readouterr().err.count("a link to a folder that is visited anyway") == 3


def test_links_to_other_folders_are_followed(tmp_path, photo):
    photo(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("../elsewhere")
    assert [os.path.relpath(path, tmp_path) for path in list_images(tmp_path / "in")] == ["in/link/a.png"]


def test_unreadable_folder_is_reported(tmp_path, photo, monkeypatch, capsys, stopped):
    for name in ("open/a.png", "closed/b.png"):
        photo(tmp_path / name)
    scandir = os.scandir

    def guarded(folder):
        if "closed" in str(folder):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)  # root, which may run this test, may read any folder
    assert len(list_images(tmp_path)) == 1
    assert "closed: skipped: permission denied" in capsys.readouterr().err
    assert "no images here" in stopped(list_images, tmp_path / "closed")


def test_pipes_and_sockets_are_not_opened(tmp_path, photo, stopped):
    photo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "x.jpg")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(tmp_path / "y.jpg"))
        for path in list_images(tmp_path)[1:]:
            with pytest.raises(InvalidImageError, match="not a regular") as error:
                read_rgb(path)
            assert not error.value.damaged
    assert "no such file or folder" in stopped(list_images, tmp_path / "x.jpg")


def test_thumbnails_and_trash_of_network_drives_are_skipped(tmp_path, photo):
    for name in ("a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "#recycle/b.png", ".hidden/c.png", ".d.png"):
        photo(tmp_path / name)
    assert list_images(tmp_path) == [str(tmp_path / "a.png")]


def test_names_on_windows_have_forward_slashes(tmp_path, photo, monkeypatch):
    photo(tmp_path / "class" / "a.png")
    monkeypatch.setattr(os.path, "relpath", lambda *_: r"class\a.png")
    monkeypatch.setattr(os, "sep", "\\")
    assert relative_path(tmp_path / "class" / "a.png", tmp_path) == "class/a.png"


def test_images_on_two_drives_are_refused_in_one_line(monkeypatch, stopped):
    monkeypatch.setattr("support.images.os.path", ntpath)
    assert "different drives" in stopped(lambda roots: named_images(*roots), ("C:\\a", "D:\\b"))


def test_other_files_are_counted_in_one_line(tmp_path, photo, capsys):
    photo(tmp_path / "a.png")
    for name in ("b.JP2", "b.avif", "b.heic", "b.md", "c.md", "none", ".hidden"):
        (tmp_path / name).touch()
    assert [os.path.basename(path) for path in list_images(tmp_path)] == ["a.png", "b.JP2", "b.avif", "b.heic"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": 3 other files skipped (.md)")


def test_jpeg_2000_is_read(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.jp2", irreversible=False)
    assert np.array_equal(read_rgb(tmp_path / "a.jp2"), rgb)


def test_truncated_jpeg_is_damaged(tmp_path, photographs):
    Image.open(photographs / "coffee.png").save(path := tmp_path / "a.jpg")
    content = path.read_bytes()
    for cut in (2, 3, 60, 1000):
        path.write_bytes(content[:-cut])
        with pytest.raises(InvalidImageError, match="truncated") as error:
            read_rgb(path)
        assert error.value.damaged


# Results and images


def test_results_of_several_files_and_folders_keep_their_names(tmp_path, color, photo):
    for name in ("one.png", "two.png", "beach/a.png", "hills/a.png"):
        photo(tmp_path / name)
    names = [tmp_path / name for name in ("one.png", "two.png", "beach")]
    result = tmp_path / "result"
    assert color(*names, "--image_dir", tmp_path / "hills", "--compare", "--result_path", result) == 0
    assert found(result) == ["beach/a.png", "hills/a.png", "one.png", "two.png"]
    assert found(tmp_path / "result_compare") == ["sheet_001.png"]
    assert list(named_images(tmp_path / "one.png", tmp_path / "one.png")) == ["one"]


def test_output_names_the_result_of_one_image(tmp_path, color, photo, stopped):
    photo(tmp_path / "a.png")
    assert color(tmp_path / "a.png", "--output", tmp_path / "new" / "b.jpg") == 0
    assert found(tmp_path / "new", "*") == ["b.jpg"] and Image.open(tmp_path / "new" / "b.jpg").format == "JPEG"
    photo(tmp_path / "c.png")
    for flags, line in [
        ((tmp_path / "a.png", tmp_path / "c.png", "--output", tmp_path / "b.png"), "--output names one file"),
        ((tmp_path / "a.png", "--output", tmp_path / "a.png"), "would overwrite it"),
        ((tmp_path / "a.png", "--output", tmp_path / "b.xyz"), "must end in"),
        ((tmp_path / "a.png", "--output", tmp_path / "b.png", "--format", "jpg"), "must end in"),
    ]:
        assert line in stopped(lambda flags: color(*flags), flags)


def test_result_path_that_contains_images_is_refused(tmp_path, color, photo, stopped):
    """Otherwise a second run would colorize them again, as x.png.png."""
    photo(tmp_path / "same" / "x.png")
    photo(tmp_path / "same" / "y" / "x.png")
    for folders, result in (("same", "same"), ("same/y", "same"), ("same", "same/y"), ("same/x.png", "same")):
        message = stopped(lambda x: color(tmp_path / x[0], "--result_path", tmp_path / x[1]), (folders, result))
        assert "contains input images" in message
    assert found(tmp_path / "same") == ["x.png", "y/x.png"]


def test_earlier_results_and_their_sheets_are_not_colorized(tmp_path, color, photo, capsys):
    photo(tmp_path / "x.png")
    for result in ("out1", "out2"):
        assert color(tmp_path, "--compare", "--result_path", tmp_path / result) == 0
        assert found(tmp_path / result) == ["x.png"]
    assert "out1: skipped: results of test.py (coloring.json)" in capsys.readouterr().err


def test_run_without_results_writes_nothing(tmp_path, color):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    assert color(tmp_path / "in", "--result_path", tmp_path / "result") == 3
    assert not found(tmp_path / "result", "*")


def test_name_too_long_for_a_result_is_reported(tmp_path, color, photo, capsys):
    photo(tmp_path / "in" / "a.png")
    for suffix in ("gif", "ppm"):  # the second result would be x….ppm.png
        photo(tmp_path / "in" / ("x" * 251 + f".{suffix}"))
    assert color(tmp_path / "in", "--result_path", tmp_path / "result") == 3
    assert len(found(tmp_path / "result")) == 2 and "file name too long" in capsys.readouterr().err


def test_nearly_black_images_and_further_frames_are_reported(tmp_path, color, photographs, capsys):
    gray = Image.open(photographs / "coffee.png").convert("L")
    (tmp_path / "in").mkdir()
    Image.fromarray(np.asarray(gray).astype(np.uint16) << 4).save(tmp_path / "in" / "twelve.tif")
    gray.save(tmp_path / "in" / "frames.gif", save_all=True, append_images=[gray.rotate(90), gray.rotate(180)])
    gray.save(tmp_path / "in" / "usual.png")
    assert color(tmp_path / "in", "--result_path", tmp_path / "result") == 0
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == 2 and "frames.gif: only the first" in lines[0] and "twelve.tif: nearly black" in lines[1]


def test_remove_script_with_a_linked_image_dir_names_the_right_files(tmp_path):
    """cur/link/.. is the folder above the one that the link leads to, not cur."""
    (tmp_path / "cur").mkdir()
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "cur" / "link").symlink_to("../real/deep")
    for folder in ("cur", "real"):
        (tmp_path / folder / "x.jpg").write_bytes(b"")
    flags = ["--image_dir", str(tmp_path / "cur" / "link" / ".."), "--output", str(tmp_path), "--num_workers", "0"]
    get_invalid_images.main(get_invalid_images.parse_args(flags))
    subprocess.run(["bash", tmp_path / "remove_invalid.sh"], check=True)
    assert (tmp_path / "cur" / "x.jpg").exists() and not (tmp_path / "real" / "x.jpg").exists()


def test_checkpoint_is_found_by_its_file_name(tmp_path):
    (tmp_path / "epoch_latest_model.pdparams").touch()
    assert find_weights(tmp_path, "epoch_latest_model.pdparams") == tmp_path / "epoch_latest_model.pdparams"


@pytest.mark.parametrize(
    ("name", "line"), [("p.txt", "not a .npy file"), ("p.npz", "not a .npy file"), (".", "is a directory")]
)
def test_prior_of_another_format_is_refused_in_one_line(tmp_path, stopped, name, line):
    (tmp_path / "p.txt").write_text("hello")
    np.savez(tmp_path / "p.npz", a=np.ones(313))
    message = stopped(load_prior, tmp_path / name)
    assert line in message and "pickle" not in message and "Errno" not in message


# Training


def test_earlier_run_is_replaced_only_with_overwrite(tmp_path, squares, stopped, small_network):
    def run(*flags, model="model", log="log"):
        short = "--load_size 40 --crop_size 32 --batch_size 4 --max_steps 1 --num_workers 0"
        where = ["--model_path", str(tmp_path / model), "--log_path", str(tmp_path / log)]
        return train.main(train.parse_args(["--image_dir", str(squares), *where, *short.split(), *flags]))

    assert run() == 0
    line = (tmp_path / "log" / "train.jsonl").read_text()  # though it is shorter than --loss_step
    assert '"step": 1' in line
    for settings in ({}, {"model": "other"}, {"log": "other"}):
        message = stopped(lambda x: run(**x), settings)
        assert "--continue_train" in message and "--overwrite" in message
    assert "only valid with --continue_train" in stopped(lambda _: run("--which_epoch", "0"), None)
    assert (tmp_path / "log" / "train.jsonl").read_text() == line
    assert run("--overwrite") == 0 and run("--continue_train") == 0


def test_folder_that_cannot_be_written_is_reported_before_training(tmp_path, stopped):
    (tmp_path / "file").touch()
    flags = [
        "--image_dir",
        "missing",
        "--log_path",
        str(tmp_path / "log"),
        "--model_path",
        str(tmp_path / "file" / "m"),
    ]
    assert "file/m: cannot be written to" in stopped(train.main, train.parse_args(flags))


# Labels


@pytest.mark.parametrize("text", ["\ufeffa.png 5\n", "a.png\t5\n", "a.png,5\n", "a.png, 5\n", "a.png 5\na.jpg 5\n"])
def test_labels_of_other_styles_are_read(tmp_path, text):
    (tmp_path / "labels.txt").write_text(text, "utf-8")
    assert metrics_acc.find_labels(["a"], ".", tmp_path / "labels.txt") == [5]


@pytest.mark.parametrize(
    ("text", "line"), [("a 5\na 6\n", "line 2: a has a different class"), ("a " + "9" * 5000, "not a name")]
)
def test_contradictory_or_malformed_labels_are_refused(tmp_path, text, line):
    (tmp_path / "labels.txt").write_text(text, "utf-8")
    with pytest.raises(UserError, match=line) as stop:
        metrics_acc.find_labels(["a"], ".", tmp_path / "labels.txt")
    assert len(str(stop.value)) < 500


def test_name_that_is_not_utf_8_is_escaped_in_the_last_line(tmp_path, squares, capsys, handlers):
    output = os.fsdecode(os.fsencode(tmp_path) + b"/p\xff.npy")
    flags = ["--image_dir", str(squares), "--num_workers", "0", "--output", output]
    assert run_script(estimate_prior.main, lambda: estimate_prior.parse_args(flags)) == 0
    assert "p\\xff.npy: from 4 color images" in capsys.readouterr().out
