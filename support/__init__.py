"""What any training program needs, and knows no color: imports nothing from the scripts above it.

Imported ahead of Paddle by every one of them.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
import zlib  # noqa: F401  ahead of Paddle, whose 2.x GPU builds carry a zlib with which Pillow reads no PNG


def _leave(number, _):
    os.write(2, b"\nstopped before it began\n")
    os._exit(128 + number)


# Importing Paddle takes seconds, in which Ctrl-C would meet a traceback; `cli.run_script` takes over from here.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_script = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
if os.path.dirname(_script) in (_root, os.path.join(_root, "resources")):
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) is not signal.SIG_IGN:  # as in the background of a shell's script
            signal.signal(_number, _leave)

# A SIGTERM waits until the handler that Paddle brings along, which dumps its C++ stack, is replaced.
_waits = threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_sigmask")
if _waits:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

# VisualDL cannot be imported without a home to write to, as in a container run for another user; matplotlib complains.
if not os.access(os.path.expanduser("~"), os.W_OK):
    _home = tempfile.TemporaryDirectory()  # removed at the end
    os.environ["HOME"] = _home.name

# Paddle greets its user (no ccache, no cuDNN), talks to itself, and makes every library tell what it does, as it turns
# the root logger up; errors are raised all the same.
os.environ.setdefault("GLOG_minloglevel", "2")
_level = logging.getLogger().level
with warnings.catch_warnings():  # what others have to say later is not touched
    warnings.simplefilter("ignore")
    import paddle  # noqa: F401
logging.getLogger().setLevel(_level)

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
if _waits:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
