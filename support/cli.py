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
        super().__init__(printable(message))


@contextmanager
def report_os_errors(problem):
    """Raise an OSError in the block as a UserError: the problem, then the system's reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem}: {explain(error)}") from error


def explain(error):
    """Return why something failed: in the system's words, in the error's own, or its kind."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    return (getattr(error, "strerror", None) or "").lower() or str(error) or type(error).__name__


def printable(text):
    """Escape line breaks, control characters and bytes that are not UTF-8 in a text or a path, for standard output.

    `note` and `UserError` escape by themselves.
    """
    text = os.fsdecode(text)
    return "".join(c if c.isprintable() else repr(c)[1:-1].replace("\\udc", "\\x") for c in text)


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
    tqdm.write(printable(message), file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# The end of a script


class Stopped(KeyboardInterrupt):
    """A stop signal, whose number is the only argument. It is raised in the main thread, so `finally` blocks run."""


# Ctrl-C, a request to end, a closed terminal, and what batch systems send before the time limit
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]


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
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _StopHandler) and handler.number:
        raise Stopped(handler.number)


def run_script(main, parse_args, after_stop=""):
    """Run a script and return its exit code. If it stops early, one line reports why.

    `after_stop` is added to that line when a signal stopped the script. Unexpected errors keep their traceback.
    """
    _set_up_process()
    try:
        code = main(parse_args())
        sys.stdout.flush()
        return code
    except Stopped as stop:
        number = stop.args[0]
        reason = f"stopped by {signal.Signals(number).name}"
        note(f"{reason}; {after_stop}" if after_stop else reason)
        return 128 + number
    except MemoryError:
        note("not enough memory: try a smaller --batch_size or --load_size, or fewer --num_workers")
    except BrokenPipeError:  # as by `| head`
        return 141  # 128 + SIGPIPE
    except (UserError, OSError) as error:
        note(str(error))
    return 1


def _set_up_process():
    """Set what holds for the whole process, so that only a script may decide it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file would get its number, and messages of C++ code
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20  # bytes of a text or a color profile
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about harmless damage and half the largest number of pixels
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, which also handles interrupts itself
        gc.freeze()  # all that was imported: Python would look for garbage in it again, at the end for 0.3 s
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot show
        handle_signals(_StopHandler())


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

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)} (--help lists the flags)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(least, most=math.inf, kind=float):
    """Return an argparse type for numbers in [least, most]; NaN is never in it."""

    def convert(text):
        value = kind(text)  # argparse reports a ValueError: "invalid int value: 'x'"
        if not least <= value <= most:
            limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
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
    parser.add_argument(name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", help=help)
    negated, dest = name.replace("--", "--no-"), name[2:]
    parser.add_argument(negated, action="store_false", dest=dest, default=argparse.SUPPRESS, help=f"{name} False")


def check_crop(args, multiple=1):
    """Raise UserError for a --crop_size that is not a multiple of `multiple` or exceeds --load_size."""
    crop = args.crop_size or 0
    if crop % multiple:
        raise UserError(f"--crop_size {args.crop_size}: must be a multiple of {multiple}")
    if crop > (args.load_size or math.inf):
        raise UserError(f"--crop_size {args.crop_size}: larger than --load_size {args.load_size}")
