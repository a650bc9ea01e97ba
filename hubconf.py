"""What `paddle.hub` offers of this project; DIR is this folder.

    colorize = paddle.hub.load(DIR, "colorizer", source="local", weights="official")
    colorize("photo.jpg").save("colored.png")

From GitHub: "OWNER/REPOSITORY:main" for DIR, and no `source`.
"""

import os as _os
import sys as _sys

dependencies = ["paddle", "numpy", "PIL", "tqdm"]

_HERE = _os.path.dirname(_os.path.abspath(__file__))
_OURS = {"colorizer", "dataset", "model", "pretrained", "support", "utils"}


def colorizer(weights=None, **settings):
    """An object that colors photographs at full resolution: `colorizer(...)("photo.jpg")` is a Pillow image.

    weights: a checkpoint's name in `model_path` (./model by default), "official" for the authors', or a path; without
    it the one that `test.py` takes. Other settings are those of the class `Colorizer` in colorizer.py, which also says
    what photographs can be and which errors there are.
    """
    return _import("colorizer").Colorizer(weights, **settings)


def network(weights=None, model_path="./model"):
    """The network alone, to evaluate: float32 [N, 1, H, W] of L - 50 -> logits over the ab bins [N, 313, H/4, W/4].

    H and W are multiples of 8; weights as for `colorizer`.
    """
    pretrained = _import("pretrained")
    network = pretrained.load_network(pretrained.find_weights(model_path, weights))
    network.eval()
    return network


def _import(name):
    """A module of this folder; the caller's own by such names (`utils`, `model`) neither get in its way nor change."""
    theirs = _take_away()
    _sys.path.insert(0, _HERE)
    try:
        return __import__(name)
    finally:
        _sys.path.remove(_HERE)
        _take_away()
        _sys.modules.update(theirs)


def _take_away():
    return {name: _sys.modules.pop(name) for name in list(_sys.modules) if name.split(".")[0] in _OURS}
