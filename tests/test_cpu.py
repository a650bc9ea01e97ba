"""CPU settings."""

import os
from pathlib import Path

from support.cpu import use_all_cores

import paddle
import pytest


@pytest.mark.parametrize(
    ("processor", "avx2", "avx512", "kind"),
    [
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True, True, "7"),
        ("AMD64 Family 23 Model 1 Stepping 2, AuthenticAMD", True, False, "5"),
        ("AMD64 Family 21 Model 1 Stepping 2, AuthenticAMD", False, False, None),
        ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True, True, None),
    ],
)
def test_mkl_gets_the_instructions_of_amd_processors_without_cpuinfo(monkeypatch, processor, avx2, avx512, kind):
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", processor)  # as on Windows
    monkeypatch.setattr(paddle.base.core, "supports_int8", lambda: avx2)
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16", lambda: avx512)
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "")  # removed after the test
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    use_all_cores()
    assert os.environ.get("MKL_DEBUG_CPU_TYPE") == kind
