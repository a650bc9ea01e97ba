"""Run `train.py` with the tests' small network in a process of its own: one or two seconds per run."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from support.cli import run_script  # noqa: E402

import train  # noqa: E402

if __name__ == "__main__":
    from small_network import SmallNetwork  # after train.py, whose order of imports matters

    train.CIC = SmallNetwork
    sys.exit(run_script(train.main, train.parse_args))
