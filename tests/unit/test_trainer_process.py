"""The trainer's process is kept running, whatever ends it, and ends with its worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.engine.worker import trainer_process
from vllm_adainfer.engine.worker.trainer_process import TrainerProcess


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainerProcess:
    """One whose trainer says how it was started, and then waits."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" $OMP_NUM_THREADS $GOMP_CPU_AFFINITY\nexec sleep 60\n')
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0")
    python.chmod(0o700)
    monkeypatch.setattr(trainer_process.sys, "executable", str(python))
    directory = AutoDirectory(tmp_path / "auto")
    directory.create()
    return TrainerProcess(directory)


def all_cores() -> set[int]:
    """Those that this machine has, whatever this process is bound to."""
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, bound)
    return cores


def said(process: TrainerProcess) -> str:
    end = time.monotonic() + 10
    while not (text := Path(process._log).read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return text


def test_it_works_on_one_thread_in_the_directory_and_its_log_is_private(process):
    process.keep_running()
    root = process._directory.root
    assert os.sched_getaffinity(process._process.pid) == all_cores()
    command = f"-m vllm_adainfer.cli autopilot {root} --parent {os.getpid()} 1\n"
    assert said(process) == command
    assert os.stat(process._log).st_mode & 0o077 == 0
    process.close()


def test_one_that_runs_is_left_alone_and_one_that_was_killed_is_started_again_after_a_pause(
    process, monkeypatch
):
    process.keep_running()
    first = process._process
    process.keep_running()
    assert process._process is first
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    process.keep_running()
    assert process._process is None, "not at once"
    process._next_start = 0.0
    process.keep_running()
    assert process._process.poll() is None
    process.close()
    assert process._process.poll() is not None
