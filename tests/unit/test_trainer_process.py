"""The trainer's process is kept running, whatever ends it, and ends with its worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.waiting import wait_for
from vllm_adainfer.auto.cores import note_cores
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.engine.worker import trainer_process
from vllm_adainfer.engine.worker.trainer_process import TrainerProcess


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainerProcess:
    """One whose trainer says how it was started, and then waits."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" $OMP_NUM_THREADS $GOMP_CPU_AFFINITY\nexec sleep 60\n')
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0")
    note_cores()
    python.chmod(0o700)
    monkeypatch.setattr(trainer_process.sys, "executable", str(python))
    directory = AutoDirectory(tmp_path / "auto")
    directory.create()
    return TrainerProcess(directory)


def test_it_works_on_one_thread_in_the_directory_and_its_log_is_private(process):
    process.keep_running()
    root = process._directory.root
    command = f"-m vllm_adainfer.cli autopilot {root} --parent {os.getpid()} 1\n"
    assert wait_for(Path(process._log).read_text) == command
    assert os.stat(process._log).st_mode & 0o077 == 0
    process.close()


@pytest.mark.parametrize("cores", ["all", "one"])
def test_it_runs_where_the_server_may_and_not_only_where_vllm_has_bound_its_worker(
    process, cores, all_cores
):
    allowed = set(all_cores if cores == "all" else all_cores[-1:])
    os.sched_setaffinity(0, allowed)  # as `taskset` does
    note_cores()
    os.sched_setaffinity(0, all_cores[:1])
    process.keep_running()
    assert os.sched_getaffinity(process._process.pid) == allowed
    process.close()


def test_it_gives_way_to_every_other_process_and_dies_first():
    """In a process of its own, because nobody can take that back."""
    code = """
import os
from vllm_adainfer.offline.auto.process import give_way
give_way()
print(os.sched_getscheduler(0) == os.SCHED_IDLE, open("/proc/self/oom_score_adj").read().strip())
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "True 1000\n"


def test_one_that_a_person_has_started_is_left_to_its_work(process, caplog_vllm):
    with process._directory.held("trainer"):
        for _ in range(3):
            process.keep_running()
    assert process._process is None
    assert not caplog_vllm.text, "there is nothing to warn of"
    process.keep_running()
    assert process._process is not None
    process.close()


def test_one_that_dies_again_and_again_is_started_ever_later(process, monkeypatch, caplog_vllm):
    now = 1000.0
    monkeypatch.setattr(trainer_process.time, "monotonic", lambda: now)
    monkeypatch.setattr(trainer_process.sys, "executable", "/bin/false")
    starts = []
    while len(starts) < 10:
        process.keep_running()
        if process._process is not None:
            starts.append(now)
            process._process.wait()
        now += 1
    pauses = [later - sooner - 1 for sooner, later in pairwise(starts)]
    assert pauses == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert caplog_vllm.text.count("the trainer ended with 1") == len(pauses)
    now += trainer_process.SOUND_SECONDS  # the last one ran for so long
    process.keep_running()
    assert process._next_start == now + trainer_process.PAUSE_SECONDS


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
