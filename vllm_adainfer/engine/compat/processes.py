"""vLLM's processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

from vllm_adainfer.engine.compat.logs import get_logger

logger = get_logger(__name__)

STARTED_BY_VLLM = "EngineCore", "VllmWorker", "ApiServer"  # how vLLM 0.32 names them
GRACE_SECONDS = 25.0  # for an engine, and then for its workers


def end_with_starter() -> None:
    """End this process once the one that started it has ended, if vLLM started it for a server.

    vLLM 0.32's front process ends its engines and API servers, but if it is killed, engines go on
    without clients, and API servers without engines.
    """
    starter = multiprocessing.parent_process()
    if starter is not None and multiprocessing.current_process().name.startswith(STARTED_BY_VLLM):
        Thread(target=_end_after, args=(starter,), name="adainfer-starter", daemon=True).start()


def _end_after(starter: BaseProcess) -> None:
    """End as vLLM does when it is told to, but after `GRACE_SECONDS` whatever hangs."""
    ends: list[Any] = [starter.sentinel]  # which processes keep open that it forked later
    with suppress(AttributeError, OSError):  # this system has no such call, or it has ended
        ends.append(os.pidfd_open(starter.pid or 0))
    wait(ends)
    logger.warning("process %s, which started this one, has ended: this one ends, too", starter.pid)
    signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)  # of the kernel, as Python itself may hang
    os.kill(os.getpid(), signal.SIGTERM)
