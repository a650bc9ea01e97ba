"""Entry points for `paddle.hub`; DIR is this folder.

    colorize = paddle.hub.load(DIR, "colorizer", source="local", weights="official")
    colorize("photo.jpg").save("colored.png")

From GitHub: "OWNER/REPOSITORY:main" for DIR, without `source`.
"""

import os as _os
import re as _re
import sys as _sys

dependencies = ["paddle", "numpy", "PIL", "safetensors", "tqdm"]

_HERE = _os.path.dirname(_os.path.abspath(__file__))
_OURS = {"colorizer", "dataset", "model", "pretrained", "support", "utils"}
_PREFIX = _re.sub(r"\W", "_", _HERE) + "__"  # of the unique names of these modules


def colorizer(weights=None, **settings):
    """Return an object that colorizes images at full resolution: `colorizer(...)("photo.jpg")` is a Pillow image.

    Args:
        weights (str, optional): A checkpoint's name in `model_path`, "official" for the authors' weights, "small" for
            the bundled ones, or a path; by default the checkpoint that test.py would use.
        **settings: `model_path` and `precision` of the class `Colorizer` in colorizer.py.

    Raises:
        UserError: If there are no such weights, or they are damaged.
    """
    return _import("colorizer").Colorizer(weights, **settings)


def network(weights=None, model_path="./model"):
    """Return the network in evaluation mode: float32 [N, 1, H, W] of L - 50 -> logits [N, 313, H/4, W/4], or ab.

    Args:
        weights (str, optional): As for `colorizer`.
        model_path (str): Folder of the checkpoints.

    Raises:
        UserError: If there are no such weights, or they are damaged.
    """
    pretrained = _import("pretrained")
    network = pretrained.load_network(pretrained.find_weights(model_path, weights))
    network.eval()
    return network


def _import(name):
    """Import a module of this folder. The caller's modules of the same names (`utils`, `model`) stay as they are.

    Afterwards the modules have unique names, under which their classes can be pickled.
    """
    theirs = _remove_modules()
    _sys.modules.update({module.__name__: module for key, module in _sys.modules.items() if key.startswith(_PREFIX)})
    _sys.path.insert(0, _HERE)
    try:
        return __import__(name)
    finally:
        _sys.path.remove(_HERE)
        for original, module in _remove_modules().items():
            unique = _PREFIX + original.replace(".", "_")
            _sys.modules[unique] = module
            for value in vars(module).values():
                if isinstance(value, type) and value.__module__ == original:
                    value.__module__ = unique
        _sys.modules.update(theirs)


def _remove_modules():
    return {name: _sys.modules.pop(name) for name in list(_sys.modules) if name.split(".")[0] in _OURS}
