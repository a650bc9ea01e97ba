"""The scripts that read images, run on damaged images of all formats (`damaged.py`)."""

from support.checkpoints import save_checkpoint
from support.cli import EXIT_SKIPPED

import paddle
from damaged import FORMATS, make, readable

import get_invalid_images
import metrics_auc
import test


def test_damaged_images_are_reported_and_readable_ones_are_used(tmp_path, small_network, capsys):
    paddle.seed(0)
    save_checkpoint(small_network().state_dict(), checkpoint := tmp_path / "network.pdparams")
    images, result = tmp_path / "in", tmp_path / "result"
    make(images, 72)
    whole = readable(images)
    assert {name.rsplit(".")[-1] for name in whole} == set(FORMATS) and len(whole) < 60

    flags = ["--load_model", checkpoint, "--load_size", 32, "--result_path", result, "--num_workers", 2]
    assert test.main(test.parse_args([str(images), *map(str, flags)])) == EXIT_SKIPPED
    colored = {path.stem for path in result.glob("*.png")}
    assert {name.rsplit(".", 1)[0] for name in whole} <= colored
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 72 - len(colored)

    flags = ["--image_dir", images, "--output", tmp_path, "--num_workers", 0]
    assert get_invalid_images.main(get_invalid_images.parse_args(list(map(str, flags)))) == EXIT_SKIPPED
    listed = (tmp_path / "invalid_images.csv").read_text()
    not_checked = [line for line in capsys.readouterr().err.splitlines() if ": not checked: " in line]
    assert listed.count("unreadable") + len(not_checked) == len(skipped) and len(not_checked) < len(skipped) / 2
    intact = [path.name for path in images.iterdir() if path.name in whole or "unharmed" in path.name]
    assert not any(f"{name},unreadable" in listed for name in intact)

    flags = ["--imgs_dir", images, "--results_dir", result, "--save_path", tmp_path, "--num_workers", 0]
    assert metrics_auc.main(metrics_auc.parse_args(list(map(str, flags)))) == EXIT_SKIPPED
