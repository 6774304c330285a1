"""The locks of a server's own directory: who waits for whom, and who is named where one refuses."""

from __future__ import annotations

import os
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_adainfer.engine.worker import self_calibration
from vllm_adainfer.engine.worker.self_calibration import SelfCalibration
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Auto


def test_a_start_is_refused_with_the_id_of_the_process_that_has_the_directory(
    directory, monkeypatch
):
    monkeypatch.setattr(self_calibration, "LOCK_SECONDS", 0.01)
    served: Any = SimpleNamespace(model=None)  # what is needed once the directory is held
    with directory.held("server") as is_held:
        assert is_held
        with pytest.raises(AdaInferError, match=rf"^process {os.getpid()} is another server's "):
            SelfCalibration(Auto(directory=str(directory.root)), served, torch.empty(0))


def test_a_start_waits_for_a_server_that_is_ending(directory):
    holds, ends = Event(), Event()

    def server() -> None:
        with directory.held("server"):
            holds.set()
            ends.wait()

    ending = Thread(target=server)
    ending.start()
    holds.wait()
    with directory.held("server") as is_held:
        assert not is_held
    Thread(target=ends.set).start()
    with directory.held("server", 30) as is_held:
        assert is_held
    ending.join()
