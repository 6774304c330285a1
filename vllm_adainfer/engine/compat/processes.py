"""vLLM's processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from threading import Thread

from vllm_adainfer.engine.compat.logs import get_logger

logger = get_logger(__name__)

STARTED_BY_VLLM = "EngineCore", "VllmWorker", "ApiServer"  # how vLLM 0.32 names them
GRACE_SECONDS = 25.0  # for an engine, and then for its workers


def end_with_starter() -> None:
    """End this process once the one that started it has ended, if vLLM started it for a server.

    vLLM 0.32's front process ends its engines, but they go on, without clients, if it is killed.
    """
    starter = multiprocessing.parent_process()
    if starter is not None and multiprocessing.current_process().name.startswith(STARTED_BY_VLLM):
        Thread(target=_end_after, args=(starter,), name="adainfer-starter", daemon=True).start()


def _end_after(starter: BaseProcess) -> None:
    """End as vLLM does when it is told to, or at once after `GRACE_SECONDS`."""
    starter.join()
    logger.warning("process %s, which started this one, has ended: this one ends, too", starter.pid)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
