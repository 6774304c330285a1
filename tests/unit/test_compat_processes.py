"""Processes that vLLM starts for a server end with the one that started them, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest

from vllm_adainfer.engine.compat import processes
from vllm_adainfer.engine.compat.processes import end_with_starter

FORK = multiprocessing.get_context("fork")
END_SECONDS = 10


def started(line: Connection, is_stubborn: bool) -> None:
    """End with the starter; the line is open as long as this process lives."""
    if is_stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_starter()
    line.send(os.getpid())
    time.sleep(10 * END_SECONDS)


def linger(line: Connection) -> None:
    """Live on, with all open files of the starter but the line."""
    line.send(os.getpid())
    line.close()
    time.sleep(10 * END_SECONDS)


def starter(name: str, line: Connection, is_stubborn: bool) -> None:
    """Start a process of vLLM, and then another one."""
    FORK.Process(target=started, name=name, args=(line, is_stubborn)).start()
    FORK.Process(target=linger, args=(line,)).start()
    line.close()
    time.sleep(10 * END_SECONDS)


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Start a process through another one: that other one, and the line to the process."""
    ids: list[int] = []

    def begin(name: str, is_stubborn: bool = False) -> Any:
        ours, theirs = FORK.Pipe()
        first = FORK.Process(target=starter, args=(name, theirs, is_stubborn))
        first.start()
        theirs.close()
        ids.extend([ours.recv(), ours.recv()])
        return first, ours

    yield begin
    for process in ids:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def has_ended(line: Connection, seconds: float) -> bool:
    if not line.poll(seconds):
        return False
    with pytest.raises(EOFError):
        line.recv()
    return True


@pytest.mark.parametrize("name", ["EngineCore", "EngineCore_DP1", "VllmWorker-0", "ApiServer_1"])
def test_a_process_of_vllm_ends_with_its_starter_that_is_killed_and_not_before(start, name):
    first, line = start(name)
    assert not has_ended(line, 0.1)
    first.kill()
    assert has_ended(line, END_SECONDS)


def test_one_that_does_not_end_when_told_to_is_killed(start, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.1)
    first, line = start("EngineCore", is_stubborn=True)
    first.kill()
    assert has_ended(line, END_SECONDS)


def test_an_engine_in_a_process_of_the_users_own_outlives_what_started_it(start):
    first, line = start("Process-1")
    first.kill()
    first.join()
    assert not has_ended(line, 0.3)
