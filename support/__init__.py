"""Infrastructure shared by all scripts: files, images, checkpoints, logging, processes and CPU settings.

Modules here import nothing from the top-level scripts. Import this package before `paddle`: it silences Paddle's
startup messages.
"""

import logging
import os
import warnings
import zlib  # noqa: F401  before Paddle, whose 2.x GPU builds bundle a zlib with which Pillow reads no PNG

os.environ.setdefault("GLOG_minloglevel", "2")
_level = logging.getLogger().level  # Paddle raises it, and every library becomes verbose
with warnings.catch_warnings():  # of Paddle's import only (no ccache, no cuDNN)
    warnings.simplefilter("ignore")
    try:
        import paddle  # noqa: F401
    except ImportError as error:  # a line instead of a traceback where the remedy is known
        remedies = {
            "libgomp": "on Debian and Ubuntu: apt-get install libgomp1",
            "No module named 'paddle'": "activate the environment, or install it: pip install -r requirements.txt",
        }
        for cause, remedy in remedies.items():
            if cause in str(error):
                raise SystemExit(f"Paddle cannot be imported: {error}; {remedy}") from error
        raise
logging.getLogger().setLevel(_level)
