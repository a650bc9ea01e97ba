"""Helpers of the tests that read weight files: forged pickles, refusals, use of memory."""

import tracemalloc

from support.checkpoints import load_checkpoint
from support.cli import UserError

import pytest


class Call:
    """Pickles as a call of the function, then of `__setstate__` of its result: what an attacker puts into a file."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


def refusal(path, content=None):
    """Return the message with which a file is refused, one line, without the file's name at its beginning."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message[len(str(path)) + 2 :]


def peak_memory(function):
    """Return the most bytes that Python and NumPy held while the function ran."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
