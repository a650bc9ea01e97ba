"""CPU settings."""

import os

from support import cpu
from support.cpu import available_cores, lower_priority, use_all_cores

import paddle
import pytest


@pytest.mark.parametrize(
    ("maker", "avx2", "avx512", "kind"),
    [
        ("AuthenticAMD", 1, 1, "7"),
        ("AuthenticAMD", 1, 0, "5"),
        ("AuthenticAMD", 0, 0, None),
        ("GenuineIntel", 1, 1, None),
    ],
)
def test_mkl_gets_the_instructions_of_amd_processors_without_cpuinfo(monkeypatch, maker, avx2, avx512, kind):
    monkeypatch.setattr(cpu, "_read", lambda _: "")
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", f"AMD64 Family 25 Model 97 Stepping 2, {maker}")  # as on Windows
    monkeypatch.setattr(paddle.base.core, "supports_int8", lambda: avx2)
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16", lambda: avx512)
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "")  # removed after the test
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    use_all_cores()
    assert os.environ.get("MKL_DEBUG_CPU_TYPE") == kind


@pytest.mark.parametrize(
    ("quota", "threads", "processes", "cores"),
    [
        ("", "three", "1", 8),
        ("", "3,1", "1", 3),
        ("", "3", "4", 2),  # the variable applies to each process
        ("max 100000\n", "", "1", 8),
        ("250000 100000\n", "", "1", 3),
        ("10000 100000\n", "", "2", 1),
    ],
)
def test_cores_are_limited_by_a_quota_and_omp_num_threads(monkeypatch, quota, threads, processes, cores):
    monkeypatch.setattr(cpu, "_read", lambda _: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(cpu, "OMP_NUM_THREADS", threads)
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", processes)
    assert available_cores() == cores


def test_priority_that_a_sandbox_forbids_is_not_changed(monkeypatch):
    def refuse(_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "nice", refuse)
    lower_priority()
