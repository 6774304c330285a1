"""Memory that has been freed comes back without faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from vllm_adainfer.engine.worker.freed_memory import ENVIRONMENT

FAULTS = """
import resource, torch
{before}
torch.zeros(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(1 << 24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from vllm_adainfer.engine.worker.freed_memory import keep_freed_memory; keep_freed_memory()"


def faults(before: str, **environment: str) -> int:
    """Page faults of ten allocations that follow a first one of the same size."""
    code = FAULTS.format(before=before)
    env = {**os.environ, **environment}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_is_kept_by_the_call_and_by_the_environment_alike():
    given_back = faults("")
    assert given_back > 1000  # else this test says nothing
    assert faults(KEEP) < given_back / 100
    assert faults("", **ENVIRONMENT) < given_back / 100
