"""What our GPU worker adds to vLLM's, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

from vllm.v1.worker.gpu_worker import Worker

from vllm_adainfer.runtime.gpu_worker import AdaInferGPUWorker
from vllm_adainfer.stats import ExitStats


def worker_with(**runner: object) -> AdaInferGPUWorker:
    worker = object.__new__(AdaInferGPUWorker)
    worker.model_runner = SimpleNamespace(**runner)
    return worker


def test_graphs_captured_to_measure_them_are_dropped(monkeypatch):
    dropped: list[bool] = []
    state = SimpleNamespace(drop_graphs=lambda: dropped.append(True))
    monkeypatch.setattr(Worker, "determine_available_memory", lambda _: 7)
    assert worker_with(model_state=state).determine_available_memory() == 7
    assert dropped == [True]


def test_requests_that_warm_up_are_not_counted(monkeypatch):
    watched = object()
    loop = SimpleNamespace(stats=ExitStats(tokens_decided=3, shadow=watched))
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda _: "times")
    worker = worker_with(model=SimpleNamespace(exit_loop=loop))
    assert worker.compile_or_warm_up_model() == "times"
    assert (loop.stats.tokens_decided, loop.stats.shadow) == (0, watched)
