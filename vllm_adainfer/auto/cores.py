"""On which cores a server may run: its first process notes it, and its trainer runs there."""

from __future__ import annotations

import os

CORES = "VLLM_ADAINFER_CORES"  # the environment's variable, which all processes of a server inherit


def note_cores() -> None:
    """Note the cores of this process, before vLLM binds a worker to some of them."""
    os.environ[CORES] = ",".join(map(str, sorted(os.sched_getaffinity(0))))


def noted_cores() -> set[int]:
    """The cores that were noted."""
    return {int(core) for core in os.environ[CORES].split(",")}
