"""The command line: flags and their ranges, notes, how a script ends."""

import argparse
import math
import os
import signal
import sys
from contextlib import suppress

from tqdm import tqdm

EXIT_SKIPPED = 3  # the work was done, but for files that had to be left out

# -------------------------------------------------------------------------------------------------
# Messages


class UserError(SystemExit):
    """An error that the user can fix. Uncaught, it prints its message on one line and ends with exit code 1."""

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text):
    """Escape line breaks, control characters and bytes that are not UTF-8, as file names may contain them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1].replace("\\udc", "\\x") for c in text)


def printable(path):
    """Return a path for standard output or a JSON file. `note` and `UserError` escape by themselves."""
    return one_line(os.fsdecode(path))


def counted(number, noun):
    """E.g. "1 image", "2 images"."""
    return f"{number} {noun}" + "s" * (number != 1)


def note_some(problem, names, limit=10):
    """A line for each of the first names, one for the others."""
    for name in names[:limit]:
        note(f"{name}: {problem}")
    if len(names) > limit:
        note(f"… and {len(names) - limit} more: {problem}")


def note(message):
    """Print one line for the user on standard error, above any progress bar."""
    tqdm.write(one_line(message), file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# How a script ends


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C), SIGTERM or SIGHUP: raised in the main thread, so that `finally` cleans up."""

    def __init__(self, number):
        super().__init__()
        self.number = number


SIGNALS = {signal.SIGINT: "by Ctrl-C", signal.SIGTERM: "by SIGTERM"}
if hasattr(signal, "SIGHUP"):
    SIGNALS[signal.SIGHUP] = "as its terminal was closed"


def run_script(main, parse_args, after_stop=""):
    """Runs a script. Returns its exit code; however it ends, one line says why, how far it came and how to go on.

    after_stop: what to add to that line when it was stopped. Errors that nobody foresaw keep their traceback.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as after `nohup`
            signal.signal(number, _stop)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of any bytes, whatever the terminal knows
    try:
        code = main(parse_args())
        sys.stdout.flush()
        return code
    except Stopped as stop:
        note(f"stopped {SIGNALS[stop.number]}{reached()}" + (after_stop and f"; {after_stop}"))
        return 128 + stop.number
    except MemoryError:
        note(f"not enough memory{reached()}: try a smaller --batch_size or --load_size, or fewer --num_workers")
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        note(f"{name}{(error.strerror or str(error)).lower()}{reached()}")
    return 1


def _stop(number, _):
    for other in SIGNALS:
        with suppress(OSError, ValueError):  # a second Ctrl-C leaves at once; what stops services sends several others
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
    raise Stopped(number)


_progress = {}


def progress(items, total, title=None, unit="image", count=None):
    """The items behind a progress bar; how far they are is what the last line says of a script that did not end well.

    count: of an item, how many of the total it is (default: one).
    """
    _progress.update(done=0, total=total, unit=unit)
    with tqdm(desc=title, total=total, unit=unit, disable=None) as bar:
        for item in items:
            yield item
            step = count(item) if count else 1
            _progress["done"] += step
            bar.update(step)
    _progress.clear()


def reached():
    return " after {done} of {total} {unit}s".format(**_progress) if _progress else ""


# What `run_script` adds for a script that writes nothing before its end
AT_THE_END = "what it finds is written at its end alone"

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
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists the flags)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(least, most=math.inf, kind=float):
    """Return an argparse type for numbers in [least, most]; NaN is never in it."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not least <= value <= most:
            limit = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {limit}")
        return value

    return convert


def whole(least=1, most=math.inf):
    """Return an argparse type for whole numbers in [least, most]."""
    return number(least, most, int)


SIDE = whole(1, 4096)  # type of --load_size and --crop_size, in pixels
WORKERS = whole(0, 1024)  # type of --num_workers
SEED = whole(0, 2**32 - 1)


def parse_bool(text):
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"neither true nor false: {text!r}")


def add_bool_flag(parser, name, default, help):
    """`--name`, `--name True`, `--name false` and `--no-name`, with or without capitals."""
    destination = name.lstrip("-")
    parser.add_argument(name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", help=help)
    negation = {"dest": destination, "action": "store_const", "const": False, "default": argparse.SUPPRESS}
    parser.add_argument(f"--no-{destination}", **negation, help=f"{name} False")


def check_crop(args, multiple=1):
    """Raises UserError for a --crop_size, if given, that is no multiple of `multiple` or exceeds --load_size."""
    if args.crop_size and args.crop_size % multiple:
        raise UserError(f"--crop_size {args.crop_size}: must be a multiple of {multiple}")
    if args.crop_size and args.load_size and args.crop_size > args.load_size:
        raise UserError(f"--crop_size {args.crop_size}: larger than --load_size {args.load_size}")
