"""The command line: mistakes in one line, notes, flags."""

import argparse
import os
import sys

from tqdm import tqdm

EXIT_SKIPPED = 3  # the work was done, but for files that had to be left out


class UserError(SystemExit):
    """Something that the user can mend. Uncaught, it prints its one line and ends with exit code 1."""


def printable(path):
    """A file's name for a message: bytes that are no UTF-8 and line breaks are escaped."""
    return one_line(os.fsencode(path).decode("utf-8", "backslashreplace"))


def one_line(text):
    """Text from a file for a message: what would not print, or break the line, is escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def note_some(problem, names, limit=10):
    """A line for each of the first names, one for the others."""
    for name in names[:limit]:
        note(f"{printable(name)}: {problem}")
    if len(names) > limit:
        note(f"… and {len(names) - limit} more: {problem}")


def note(message):
    """One line for the user, on standard error, above any progress bar."""
    tqdm.write(message, file=sys.stderr)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds to each flag's help its default, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse_bool(text):
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(text)


def add_bool_flag(parser, name, default, help):
    """`--name`, `--name True`, `--name false` and `--no-name`, with or without capitals."""
    destination = name.lstrip("-")
    parser.add_argument(name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", help=help)
    negation = {"dest": destination, "action": "store_const", "const": False, "default": argparse.SUPPRESS}
    parser.add_argument(f"--no-{destination}", **negation, help=f"{name} False")


def check_at_least(args, **least):
    """Raises UserError for a flag that is given and smaller than it may be."""
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {value}")


def check_crop(args, multiple=1):
    """Raises UserError for a --crop_size, if given, that is no multiple of `multiple` or exceeds --load_size."""
    if args.crop_size and args.crop_size % multiple:
        raise UserError(f"--crop_size {args.crop_size}: must be a multiple of {multiple}")
    if args.crop_size and args.load_size and args.crop_size > args.load_size:
        raise UserError(f"--crop_size {args.crop_size}: larger than --load_size {args.load_size}")
