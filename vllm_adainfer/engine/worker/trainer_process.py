"""The trainer's process, which this worker starts and which ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress

from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.engine.compat.logs import get_logger

logger = get_logger(__name__)

PAUSE_SECONDS = 30.0  # before a trainer that has died is started again
CLOSE_SECONDS = 5.0
# vLLM binds its workers to cores that they keep busy, by affinity and by these variables
# (`vllm/utils/ompmultiprocessing.py`): the trainer needs the other cores.
BINDING = {"GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND"}


class TrainerProcess:
    """Keeps a trainer running."""

    def __init__(self, directory: AutoDirectory) -> None:
        """Nothing is started yet, see `keep_running`."""
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0

    def keep_running(self) -> None:
        """Start the trainer if it does not run.

        It must be called by one thread that lives as long as the worker: the kernel ends the
        trainer with the thread that started it.
        """
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            logger.warning(
                "the trainer ended with %s (see %s): requests are served as before, and it is "
                "started again in %g s",
                code,
                self._log,
                PAUSE_SECONDS,
            )
            self._process, self._next_start = None, time.monotonic() + PAUSE_SECONDS
        if time.monotonic() < self._next_start:
            return
        command = [sys.executable, "-m", "vllm_adainfer.cli", "autopilot"]
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with open(self._log, "wb", opener=_private) as log:
            self._process = subprocess.Popen(
                [*command, str(self._directory.root), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**{k: v for k, v in os.environ.items() if k not in BINDING}, **quiet},
            )
        with suppress(OSError):
            os.sched_setaffinity(self._process.pid, range(os.cpu_count() or 1))

    @property
    def _log(self) -> str:
        return str(self._directory.root / "trainer.log")

    def close(self) -> None:
        """End the trainer."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
