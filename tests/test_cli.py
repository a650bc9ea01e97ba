"""Flags, messages and exit codes of the scripts."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from support import cli
from support.cli import Parser, add_bool_flag, number, printable, progress, run_script, whole

import pytest
from conftest import ROOT
from processes import wait_for

SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "resources").glob("*.py")]
SCRIPTS = [path for path in SCRIPTS if "def parse_args" in path.read_text(encoding="utf-8")]


# Flags


def test_boolean_flag_accepts_true_false_and_no():
    parser = Parser()
    add_bool_flag(parser, "--rebalance", True, "help")
    for flags in ([], ["--rebalance"], ["--rebalance", "True"]):
        assert parser.parse_args(flags).rebalance is True
    for flags in (["--rebalance", "False"], ["--rebalance", "false"], ["--no-rebalance"]):
        assert parser.parse_args(flags).rebalance is False


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("--share 2", "argument --share: 2 must be from 0 to 1"),
        ("--share nan", "argument --share: nan must be from 0 to 1"),
        ("--count 0", "argument --count: 0 must be at least 1"),
        ("--count 1.5", "argument --count: invalid int value: '1.5'"),
        ("--file=", "--file '': is empty (an unset variable?)"),
        ("--draw maybe", "argument --draw: neither true nor false: 'maybe'"),
    ],
)
def test_flag_out_of_range_exits_with_2_and_one_line_that_names_it(capsys, given, problem):
    parser = Parser(prog="x.py")
    parser.add_argument("--share", type=number(0, 1))
    parser.add_argument("--count", type=whole())
    parser.add_argument("--file")
    add_bool_flag(parser, "--draw", False, "help")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([given] if given.endswith("=") else given.split())
    assert stop.value.code == 2 and capsys.readouterr().err == f"x.py: {problem} (--help lists the flags)\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_gives_its_numbers_a_range_and_ends_through_run_script(path):
    """A bare int or float would accept -1 and NaN."""
    code = path.read_text(encoding="utf-8")
    assert not re.search(r"type=(int|float)\b", code)
    assert re.search(r'__name__ == "__main__":\n    sys\.exit\((?:cli\.)?run_script\(main, parse_args', code)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_shows_each_default_once(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    script = pytest.importorskip(".".join(path.relative_to(ROOT).with_suffix("").parts))
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    flags = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  -")]
    assert flags and all(line.count("(default") <= 1 and "None" not in line for line in flags)


def test_names_with_any_bytes_are_printed_on_one_line():
    assert printable("a\nb") == "a\\nb"
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\\xe9"
    assert printable("é 猫") == "é 猫"


# Ends of scripts


@pytest.fixture
def end_of(handlers, capsys):
    """Run a main function as a script does. Return the exit code and the one line on standard error."""

    def run(main, after_stop=""):
        code = run_script(lambda _: main(), lambda: None, after_stop)
        (line,) = capsys.readouterr().err.strip().splitlines()
        return code, line

    return run


def test_stopped_script_reports_the_signal(end_of):
    code, line = end_of(lambda: os.kill(os.getpid(), signal.SIGTERM), "continue so")
    assert (code, line) == (143, "stopped by SIGTERM; continue so")


def test_stop_whose_exception_was_lost_stops_at_the_next_image(end_of):
    """Paddle's C++ makes another exception of it; Python ignores those of `__del__`."""

    done = []

    def main():
        for i in progress(range(9), 9):
            with suppress(cli.Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # as service managers repeat it
            done.append(i)

    assert end_of(main)[0] == 128 + signal.SIGTERM and done == [0]


def test_ignored_signals_stay_ignored(handlers):
    """`nohup` relies on it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert cli.handle_signals(print)[signal.SIGINT] == signal.SIG_DFL and signal.getsignal(signal.SIGINT) is print
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("error", "line"),
    [(MemoryError(), "not enough memory"), (OSError(24, "Too many open files"), "[Errno 24] Too many open files")],
)
def test_lack_of_memory_or_a_file_error_ends_the_script_with_one_line(end_of, error, line):
    def main():
        raise error

    code, printed = end_of(main)
    assert code == 1 and printed.startswith(line)


def test_closed_pipe_ends_the_script_silently():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from support.cli import run_script\n"
    code += "sys.exit(run_script(lambda _: [print('x' * 100) for _ in range(10**5)], lambda: None))"
    done = subprocess.run(f"{sys.executable} -W ignore -c \"$CODE\" | head -c 1", shell=True, capture_output=True,
                          env={**os.environ, "CODE": code})  # fmt: skip
    assert done.stdout == b"x" and done.stderr == b""


def test_script_runs_without_standard_streams(tmp_path):
    """No file gets the number of a closed stream, into which messages would be written."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from support.cli import note, run_script\n"
    code += (
        "def main(_):\n    print('out'); note('err'); file = open('file', 'w')\n    return 7 + (file.fileno() < 3)\n"
    )
    code += "sys.exit(run_script(main, lambda: None))"
    command = f'{sys.executable} -c "$CODE" <&- >&- 2>&-'
    code = subprocess.run(command, shell=True, cwd=tmp_path, env={**os.environ, "CODE": code}).returncode
    assert code == 7 and (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("script", ["train.py", "resources/estimate_prior.py"])
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_ctrl_c_during_the_imports_prints_no_traceback(script):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: "libpaddle" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(60)
    assert process.returncode == -signal.SIGINT and out == err == b""


class NotebookStream:
    """Like a notebook's standard output, has neither `reconfigure` nor `fileno`."""

    write = flush = lambda self, *_: None


def test_script_runs_in_a_notebook_and_leaves_its_interrupts_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", NotebookStream())
    before = signal.getsignal(signal.SIGINT)
    assert run_script(lambda _: 0, lambda: None) == 0
    assert signal.getsignal(signal.SIGINT) is before
