"""The trainer's process, which this worker starts and which ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress

from vllm_adainfer.auto.cores import noted_cores
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.files import private

logger = get_logger(__name__)

PAUSE_SECONDS, MOST_SECONDS = 30.0, 3600.0  # before a trainer that has died is started again
SOUND_SECONDS = 600.0  # one that has run for so long has not died of what ended the one before
CLOSE_SECONDS = 5.0
# vLLM binds its workers to cores that they keep busy, by affinity and by these variables
# (`vllm/utils/ompmultiprocessing.py`): the trainer needs the other cores.
BINDING = {"GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND"}


class TrainerProcess:
    """Keeps a trainer running."""

    def __init__(self, directory: AutoDirectory) -> None:
        """Nothing is started yet, see `keep_running`."""
        self._directory = directory
        self._root, self._log = str(directory.root), directory.root / "trainer.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._next_start = 0.0
        self._pause = PAUSE_SECONDS

    def keep_running(self) -> None:
        """Start the trainer if none runs; the more often it has died, the later.

        It must be called by one thread that lives as long as the worker: the kernel ends the
        trainer with the thread that started it.
        """
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            if now - self._started > SOUND_SECONDS:
                self._pause = PAUSE_SECONDS
            logger.warning(
                "the trainer ended with %s (see %s): requests are served as before, and it is "
                "started again in %g s",
                code,
                self._log,
                self._pause,
            )
            self._process, self._next_start = None, now + self._pause
            self._pause = min(2 * self._pause, MOST_SECONDS)
        if now < self._next_start:
            return
        with self._directory.held("trainer") as is_free:
            if not is_free:
                logger.info_once("another trainer works on %s: it is left to that one", self._root)
                return
        self._start()
        self._started = now

    def _start(self) -> None:
        command = [sys.executable, "-m", "vllm_adainfer.cli", "autopilot"]
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with open(self._log, "wb", opener=private) as log:
            self._process = subprocess.Popen(
                [*command, self._root, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**{k: v for k, v in os.environ.items() if k not in BINDING}, **quiet},
            )
        with suppress(OSError):
            os.sched_setaffinity(self._process.pid, noted_cores())

    def close(self) -> None:
        """End the trainer."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
