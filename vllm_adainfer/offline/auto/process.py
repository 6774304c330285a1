"""The trainer: one process per directory, single-threaded, scheduled only on idle cores."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.errors import AdaInferError

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def run(root: Path, parent: int | None) -> None:
    """Train for the server of a directory until this process ends, or `parent`, if that is given.

    An AdaInferError if another trainer works there, or this user may not write there.
    """
    if parent is not None:
        end_with_parent(parent)
    os.umask(0o077)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    directory = AutoDirectory(root)
    directory.create()
    with directory.held("trainer") as is_held:
        if not is_held:
            raise AdaInferError(
                f"another trainer works on {directory.root} already: leave it to that one, or end "
                "it first"
            )
        give_way()
        import torch

        from vllm_adainfer.offline.auto.trainer import SECONDS, Trainer

        torch.set_num_threads(1)
        trainer = Trainer(directory)
        while True:
            trainer.look()
            time.sleep(SECONDS)


def end_with_parent(parent: int) -> None:
    """Let the system end this process when the process `parent` ends, which kill -9 may do."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def give_way() -> None:
    """Use idle priority (or nice 19), and be the first process that the OOM killer ends."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
    with suppress(OSError):  # where memory is short, the kernel ends this process
        Path("/proc/self/oom_score_adj").write_text("1000")
