"""CPU settings: cores, MKL and malloc."""

import ctypes
import os
from pathlib import Path

import paddle


def use_all_cores(threads=None):
    """Lets Paddle's CPU operators use the machine's cores; call it before the first operator. Returns their number.

    Paddle starts with one thread unless OMP_NUM_THREADS is set, and the MKL that it bundles takes its slow, generic
    path on AMD processors unless it is told what they can do. What the user has set is left alone.
    """
    if kind := _mkl_kind():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", kind)
    threads = threads or available_cores()
    paddle.base.core.set_num_threads(threads)
    return threads


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # of glibc's malloc.h


def keep_freed_memory():
    """Makes malloc keep what is freed, for a program that asks for the same tensors again and again; call it early.

    glibc would give every large block back and be given it anew, page by page: up to a third of a small training step.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)


def return_freed_memory():
    """Makes malloc give large blocks back when they are freed, for a program that runs for weeks in many threads.

    glibc would keep for every thread what that has ever used at once.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, 2**20), (M_ARENA_MAX, 2)):
            libc.mallopt(parameter, value)


def available_cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def computes_bf16():
    """Whether the processor multiplies bfloat16 in hardware, and this Paddle's engine makes it do so (3.x)."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_processor().split()) and paddle.__version__ >= "3"


def _processor():
    """What Linux says of the processor; "" elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _mkl_kind():
    """What MKL calls the instructions of this AMD processor: "7" for AVX-512, "5" for AVX2; None elsewhere."""
    if "AuthenticAMD" not in (processor := _processor()):
        return None
    return "7" if " avx512f " in processor else "5" if " avx2 " in processor else None


def cores_each():
    """The cores of this machine for each of the processes that train on it."""
    return max(1, available_cores() // int(os.environ.get("PADDLE_LOCAL_SIZE", 1)))
