"""`hubconf.py`, used through paddle.hub."""

import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT
from PIL import Image

import colorizer

HERE = {"repo_dir": str(ROOT), "source": "local"}


def test_entry_points_are_listed_and_documented():
    assert paddle.hub.list(**HERE) == ["colorizer", "network"]
    for name in paddle.hub.list(**HERE):
        assert "weights" in paddle.hub.help(model=name, **HERE)


@pytest.mark.slow
def test_hub_gives_the_same_pixels_next_to_modules_of_the_same_names(cic_checkpoint, image_folder, tmp_path):
    (tmp_path / "utils.py").write_text("theirs = True")
    (tmp_path / "model.py").write_text("theirs = True")
    (tmp_path / "notebook.py").write_text("""if True:
        import sys
        import utils
        import zlib  # before Paddle: see support/__init__.py
        import paddle

        where = {"repo_dir": sys.argv[1], "source": "local", "weights": sys.argv[2]}
        for _ in range(2):
            colorize = paddle.hub.load(model="colorizer", **where)
        colorize(sys.argv[3]).save("colored.png")
        assert paddle.hub.load(model="network", **where)(paddle.zeros([1, 1, 16, 24])).shape == [1, 313, 4, 6]
        import model
        assert utils.theirs and model.theirs
    """)
    coffee = image_folder / "coffee.png"
    subprocess.run([sys.executable, "notebook.py", ROOT, cic_checkpoint, coffee], cwd=tmp_path, check=True)
    assert np.array_equal(Image.open(tmp_path / "colored.png"), colorizer.Colorizer(cic_checkpoint)(coffee))
