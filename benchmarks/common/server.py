"""Run ``vllm serve`` on a free local port for as long as a context lasts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.vllm_command import COMMAND
from vllm_adainfer.engine.worker.freed_memory import ENVIRONMENT

START_SECONDS = 600
POLLING_SECONDS = 1.5


@dataclass
class Server:
    """A running server: base URL, the API server (it leads its own process group), and its log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> str:
        """The body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return str(response.read().decode())

    def metrics(self, prefix: str = "adainfer:") -> dict[str, float]:
        """Values of ``/metrics``, by series name and labels as printed there."""
        lines = (line for line in self.get("/metrics").splitlines() if line.startswith(prefix))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextmanager
def serving(
    model: str,
    adainfer: Mapping[str, Any] | None,
    log: Path,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server, and stop it when the context ends.

    Requests name the model ``model``. `adainfer` is the value of ``additional_config["adainfer"]``;
    None starts stock vLLM. `log` gets its output.

    A RuntimeError if the server exited or did not answer in time; includes the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = (sys.executable, "-m", "vllm_adainfer.cli")
    command = [*(COMMAND if adainfer is None else ours), "serve", model]
    command += ["--served-model-name", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    if adainfer is not None:
        command += ["--additional-config", json.dumps({"adainfer": adainfer})]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_for(server)
        yield server
    finally:
        stop(server)


def _wait_for(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            server.get("/health")
        except OSError:
            time.sleep(0.5)
        else:
            return
    text = server.log.read_text(errors="replace")
    raise RuntimeError(f"the server does not answer; its log ends\n{text[-4000:]}")


def let_others_rest() -> None:
    """Wait until no idle server competes for a core with the one about to be timed.

    vLLM's workers poll for a second after each step (``SpinCondition`` in
    ``vllm/distributed/device_communicators/shm_broadcast.py``).
    """
    time.sleep(POLLING_SECONDS)


def stop(server: Server) -> None:
    """Stop a server and all its processes."""
    server.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(60)
    try:
        os.killpg(server.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    server.process.wait()
