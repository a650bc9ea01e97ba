"""CPU settings: cores, MKL and malloc."""

import ctypes
import math
import os
from contextlib import suppress
from pathlib import Path

from support import OMP_NUM_THREADS

import paddle

core = paddle.base.core


def use_all_cores(threads=None):
    """Let Paddle's CPU operators use all cores, or `threads` of them.

    Call it before the first operator. Paddle starts with one thread unless OMP_NUM_THREADS is set. The MKL that it
    bundles takes its slow, generic path on AMD processors unless MKL_DEBUG_CPU_TYPE is set: to 7 for AVX-512, to 5 for
    AVX2. A value set by the user is kept.
    """
    processor = _read("/proc/cpuinfo") or os.environ.get("PROCESSOR_IDENTIFIER", "")  # on Linux; on Windows
    if "AuthenticAMD" in processor and core.supports_int8():  # oneDNN's int8 needs AVX2, its bfloat16 AVX-512
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if core.supports_bfloat16() else "5")
    core.set_num_threads(threads or available_cores())


def computes_bf16():
    """Return whether the processor multiplies bfloat16 in hardware and Paddle's inference engine uses it (3.x)."""
    return core.supports_bfloat16_fast_performance() and paddle.__version__ >= "3"


def available_cores():
    """Return the number of cores for this process: an equal share for each of those that a launcher started here.

    The operating system, a container's quota and the variable OMP_NUM_THREADS (per process) may limit it.
    """
    processes = int(os.environ.get("PADDLE_LOCAL_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, min(cores, _quota()) // processes)
    threads = (OMP_NUM_THREADS or "").split(",")[0].strip()
    return min(cores, int(threads)) if threads.isdecimal() and int(threads) else cores


def _quota():
    """Return how many cores a container may use, rounded up; infinity without a limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")  # "200000 100000" or "max 100000", microseconds
    return math.ceil(int(quota) / int(period)) if quota.isdecimal() else math.inf


def _read(path):
    """Return the content of a file of the system, or "" where there is none."""
    with suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def lower_priority():
    """Let this thread give way to the others, where threads have priorities of their own (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # a sandbox may forbid it
            os.nice(10)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # of glibc's malloc.h


def keep_freed_memory():
    """Make malloc keep freed memory, for a program that allocates the same tensors again and again; call it early.

    glibc would return every large block to the system and get it back page by page, which takes up to a third of a
    small training step.
    """
    _set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1})


def return_freed_memory():
    """Make malloc return large blocks when they are freed, for a program that runs for weeks in many threads.

    glibc would keep, for each thread, as much memory as that thread ever used at a time.
    """
    _set_malloc({M_MMAP_THRESHOLD: 2**20, M_ARENA_MAX: 2})


def _set_malloc(parameters):
    libc = ctypes.CDLL(None) if hasattr(os, "sched_setaffinity") else None  # Linux
    if hasattr(libc, "mallopt"):  # glibc
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
