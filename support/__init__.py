"""Infrastructure shared by all scripts: files, images, checkpoints, logging, processes and CPU settings.

Modules here import nothing from the top-level scripts. Import this package before `paddle`: it silences Paddle's
startup messages.
"""

import gc
import logging
import os
import signal
import sys
import warnings
import zlib  # noqa: F401  before Paddle, whose 2.x GPU builds bundle a zlib with which Pillow reads no PNG

import numpy  # noqa: F401  before OMP_NUM_THREADS is set below, which would limit its matrix products to one thread

# Ctrl-C during the imports, which take seconds, ends a script of this project without a traceback. Later, `run_script`
# sets a handler. Other programs that import this package keep theirs, and an ignored signal stays ignored.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_main = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or __file__)
_is_script = os.path.dirname(_main) in (_root, os.path.join(_root, "resources"))
if _is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

_threads = os.environ.get("OMP_NUM_THREADS")  # Paddle sets it to 1, also in its launcher
_is_paddles = _threads == "1" and ("paddle" in sys.modules or "PADDLE_TRAINER_ID" in os.environ)
OMP_NUM_THREADS = None if _is_paddles else _threads

if "paddle" not in sys.modules:
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ["OMP_NUM_THREADS"] = "1"  # about other values, Paddle prints two lines
    _level = logging.getLogger().level  # Paddle raises it, and every library becomes verbose
    _collects = gc.isenabled()
    gc.disable()  # the import makes a million objects; to look for garbage among them takes 0.15 s
    try:
        with warnings.catch_warnings():  # of Paddle's import only (no ccache, …)
            warnings.simplefilter("ignore")
            import paddle  # noqa: F401
    except ImportError as error:
        if not _is_script:
            raise
        remedy = "activate the environment in which it is installed (README.md); Debian and Ubuntu need libgomp1, too"
        raise SystemExit(f"Paddle cannot be imported: {error}; {remedy}") from error
    finally:
        if _collects:
            gc.enable()
        logging.getLogger().setLevel(_level)
        del os.environ["OMP_NUM_THREADS"]  # otherwise the processes that a script starts would get it
        if _threads is not None:
            os.environ["OMP_NUM_THREADS"] = _threads
