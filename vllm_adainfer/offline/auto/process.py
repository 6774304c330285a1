"""The trainer's process: one a directory, on one thread, and only where nobody else computes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.errors import AdaInferError

PAGE_SECONDS = 60.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def run(root: Path, with_parent: bool) -> None:
    """Train for the server of a directory until this process is ended.

    Args:
        root: the directory.
        with_parent: whether this process ends when the thread that started it does.

    Raises:
        AdaInferError: another trainer works there, or this user may not write there.

    """
    if with_parent:
        end_with_parent()
    give_way()
    os.umask(0o077)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    directory = AutoDirectory(root)
    directory.create()
    with only_one(root):
        import torch

        from vllm_adainfer.offline.auto.trainer import SECONDS, Trainer
        from vllm_adainfer.offline.reports.timeline import write_page

        torch.set_num_threads(1)
        trainer, next_page = Trainer(directory), 0.0
        while True:
            trainer.look()
            if time.monotonic() >= next_page:
                next_page = time.monotonic() + PAGE_SECONDS
                with suppress(AdaInferError):  # nothing is counted yet, or the disk is full
                    write_page(root)
            time.sleep(SECONDS)


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold the trainer's lock of a directory, which the system releases whenever it ends.

    Raises:
        AdaInferError: another trainer holds it.

    """
    file = os.open(root / "trainer.lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AdaInferError(
            f"another trainer works on {root} already: leave it to that one, or end it first"
        ) from None
    else:
        yield
    finally:
        os.close(file)


def end_with_parent() -> None:
    """Let the system end this process when its parent ends, which kill -9 may do."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def give_way() -> None:
    """Run only where no other process wants to, or with the least priority; on any core."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the server's threads are bound to some
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
