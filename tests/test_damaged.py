"""The scripts that read images, run on damaged images of all formats (`damaged.py`)."""

from damaged import FORMATS, find_problems

import get_invalid_images
import metrics_auc
import test

MAINS = {"test.py": test, "metrics_auc.py": metrics_auc, "get_invalid_images.py": get_invalid_images}


def test_damaged_images_are_reported_and_readable_ones_are_used(tmp_path, small_checkpoint, capsys):
    def run(script, *flags):
        more = ["--load_model", str(small_checkpoint)] if script == "test.py" else []
        code = MAINS[script].main(MAINS[script].parse_args([*flags, *more]))
        return code, "".join(capsys.readouterr())

    problems, readable = find_problems(tmp_path, 72, 0, run)
    assert not problems
    assert {name.rsplit(".")[-1] for name in readable} == set(FORMATS) and len(readable) < 60
