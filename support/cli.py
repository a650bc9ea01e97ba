"""The command line: messages, exit codes, flags and their ranges."""

import argparse
import gc
import math
import os
import signal
import sys
import warnings
from contextlib import contextmanager

from PIL import PngImagePlugin
from tqdm import tqdm

EXIT_SKIPPED = 3  # finished, but some files were skipped

# -------------------------------------------------------------------------------------------------
# Messages


class UserError(Exception):
    """An error that the user can fix. `run_script` prints its message, one line, and returns exit code 1."""

    def __init__(self, message):
        super().__init__(one_line(message))


@contextmanager
def report_os_errors(problem):
    """Raise an OSError in the block as a UserError: the problem, then the system's reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem}: {(error.strerror or str(error)).lower()}") from error


def one_line(text):
    """Escape line breaks, control characters and bytes that are not UTF-8, as file names may contain them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1].replace("\\udc", "\\x") for c in text)


def printable(path):
    """Return a path for standard output or a JSON file. `note` and `UserError` escape by themselves."""
    return one_line(os.fsdecode(path))


def printable_names(left_out):
    """Return {problem: names} with printable names, for a JSON file."""
    return {problem: [printable(name) for name in names] for problem, names in left_out.items()}


def counted(number, noun):
    """Return a number and its noun, e.g. "1 image" or "2 images"."""
    return f"{number} {noun}" + "s" * (number != 1)


def note_some(problem, names):
    """Print a note for each of the first ten names, and one for all others."""
    for name in names[:10]:
        note(f"{name}: {problem}")
    if others := len(names[10:]):
        note(f"… and {others} more: {problem}")


def note(message):
    """Print one line for the user on standard error, above any progress bar."""
    tqdm.write(one_line(message), file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# The end of a script


class Stopped(KeyboardInterrupt):
    """A stop signal, whose number is the only argument. It is raised in the main thread, so `finally` blocks run."""


REASONS = {  # by the names of the stop signals
    "SIGINT": "by Ctrl-C",
    "SIGTERM": "by SIGTERM",
    "SIGHUP": "because its terminal was closed",
    "SIGUSR1": "by SIGUSR1",  # batch systems send it before the time limit
    "SIGUSR2": "by SIGUSR2",
}
SIGNALS = {getattr(signal, name): reason for name, reason in REASONS.items() if hasattr(signal, name)}


def handle_signals(handler):
    """Set the handler of the stop signals, except for ignored ones, as after `nohup`. Return the previous handlers."""
    return {number: signal.signal(number, handler) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


class _StopHandler:
    """The handler of the stop signals in a script: raises Stopped, and remembers it for `check_stop`."""

    number = None

    def __call__(self, number, _):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the script immediately
        if self.number is None:  # service managers repeat the other signals
            self.number = number
            raise Stopped(number)


def check_stop():
    """Raise Stopped if a stop signal came, but its exception was lost: in C++ that calls Python, or in a `__del__`."""
    for handler in map(signal.getsignal, SIGNALS):
        if isinstance(handler, _StopHandler) and handler.number is not None:
            raise Stopped(handler.number)


def run_script(main, parse_args, after_stop=""):
    """Run a script and return its exit code. If it stops early, one line reports why.

    `after_stop` is added to that line when a signal stopped the script. Unexpected errors keep their traceback.
    """
    _set_up_pillow()
    _open_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, which also handles interrupts itself
        gc.freeze()  # all that was imported: Python would look for garbage in it again, at the end for 0.3 s
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot show
        handle_signals(_StopHandler())
    try:
        code = main(parse_args())
        sys.stdout.flush()
        return code
    except Stopped as stop:
        number = stop.args[0]
        note(f"stopped {SIGNALS[number]}; {after_stop}" if after_stop else f"stopped {SIGNALS[number]}")
        return 128 + number
    except UserError as error:
        note(str(error))
    except MemoryError:
        note("not enough memory: try a smaller --batch_size or --load_size, or fewer --num_workers")
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        note(f"{name}{(error.strerror or str(error)).lower()}")
    return 1


def _set_up_pillow():
    """Set what Pillow keeps for the whole process, and what only a script may decide."""
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20  # bytes of a text or a color profile
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about harmless damage and half the largest number of pixels


def _open_closed_streams():
    """Open the null device in place of closed standard streams. Otherwise the next files would get their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def progress(images, total, title=None):
    """Yield the images, or results of images, and show a progress bar on a terminal."""
    for image in tqdm(images, title, total, unit="image", disable=None):
        check_stop()
        yield image


AT_THE_END = "nothing was written"  # an `after_stop` for scripts that write their results at the end

# -------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults in its help, reports a usage error on one line and rejects empty texts."""

    def __init__(self, **settings):
        super().__init__(formatter_class=_HelpFormatter, **settings)

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if "" in (value if isinstance(value, list) else [value]):
                self.error(f"--{name} '': is empty (an unset variable?)")
        return args

    def given(self, argv=None):
        """Return the names of the flags that are given, whatever their values. The defaults are lost by that."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
        return set(vars(super().parse_args(argv)))

    def error(self, message):
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists the flags)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(least, most=math.inf, kind=float):
    """Return an argparse type for numbers in [least, most]; NaN is never in it."""

    def convert(text):
        value = kind(text)  # argparse reports a ValueError: "invalid int value: 'x'"
        if not least <= value <= most:
            limit = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {limit}")
        return value

    convert.__name__ = kind.__name__
    return convert


def whole(least=1, most=math.inf):
    """Return an argparse type for whole numbers in [least, most]."""
    return number(least, most, int)


SIDE = whole(1, 4096)  # type of --load_size and --crop_size, in pixels
WORKERS = whole(0, 1024)  # type of --num_workers
SEED = whole(0, 2**32 - 1)


def parse_bool(text):
    """Return whether a flag's text means true. Raises ArgumentTypeError if it means neither true nor false."""
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"neither true nor false: {text!r}")
    return text.lower() in ("true", "yes", "1")


def add_bool_flag(parser, name, default, help):
    """Add a flag that accepts `--name`, `--name True`, `--name false` and `--no-name`, in upper or lower case."""
    destination = name.lstrip("-")
    parser.add_argument(name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", help=help)
    negation = {"dest": destination, "action": "store_false", "default": argparse.SUPPRESS}
    parser.add_argument(f"--no-{destination}", **negation, help=f"{name} False")


def check_crop(args, multiple=1):
    """Raise UserError for a --crop_size that is not a multiple of `multiple` or exceeds --load_size."""
    crop = args.crop_size or 0
    if crop % multiple:
        raise UserError(f"--crop_size {args.crop_size}: must be a multiple of {multiple}")
    if crop > (args.load_size or math.inf):
        raise UserError(f"--crop_size {args.crop_size}: larger than --load_size {args.load_size}")
