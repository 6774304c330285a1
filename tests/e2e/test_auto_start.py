"""A server that calibrates itself starts again, on a device that captures graphs as it starts."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.conftest import tiny_engine
from tests.e2e.asking import greedy, tokens
from tests.e2e.scripted import parts, running_of
from tests.e2e.test_auto import CUTS, certify, kind_policy
from tests.tiny import tiny_artifact, tiny_config
from tests.waiting import wait_for
from vllm_adainfer.auto.admitted_kind import AdmittedKind, Recent
from vllm_adainfer.auto.directory import AutoDirectory, write_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.engine.worker import self_calibration
from vllm_adainfer.engine.worker.trainer_process import TrainerProcess
from vllm_adainfer.watch.ledger import Ledger

CAPTURE_SECONDS = 1.0
USES_DEVICE = "to", "cpu", "copy_", "contiguous"


class Capture:
    """Notes who uses the device while graphs are captured, which only the capturing thread may.

    Threads of engines that earlier tests left in this process do not count.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.is_capturing, self.others = False, set[str]()
        self.earlier = set(threading.enumerate())
        for name in USES_DEVICE:
            patch.setattr(torch.Tensor, name, self.watched(name, getattr(torch.Tensor, name)))

    def watched(self, name: str, call: Any) -> Any:
        def used(*args: Any, **kwargs: Any) -> Any:
            thread = threading.current_thread()
            if self.is_capturing and thread not in self.earlier:
                self.others.add(f"{thread.name}: {name}")
            return call(*args, **kwargs)

        return used


def left_behind(directory: AutoDirectory, model: Path, labels: list[int]) -> str:
    """A kind with a policy and rows, of the server before."""
    directory.create()
    kind = Kind("label", tuple(sorted(labels))).name(directory.salt)
    own = AdmittedKind(kind, Ledger(0.02, 0.1, 0.25), time.time(), Recent())
    own.note()
    own.save(directory.ledger(kind))
    tiny_artifact(model, directory.policy(kind, 1), exit_points=CUTS[1:3])
    certify(directory, kind, 1)
    directory.rows(kind).mkdir(parents=True)
    rows = {"computed": torch.ones(100, dtype=torch.int64)}
    save_file(rows, directory.rows(kind) / "000001.safetensors")
    return kind


def test_nothing_beside_the_steps_uses_the_device_until_graphs_are_captured(
    tiny_model, tmp_path, monkeypatch
):
    """As on a GPU, where vLLM runs real requests of its own before it captures."""
    directory, labels = AutoDirectory(tmp_path / "auto"), list(tiny_config(tiny_model).label_ids)
    kind = left_behind(directory, tiny_model, labels)
    monkeypatch.setattr(TrainerProcess, "keep_running", lambda self: None)
    monkeypatch.setattr(self_calibration, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(self_calibration, "TIMED_ROWS", 1)
    monkeypatch.setattr(self_calibration, "TIMED_STEPS", 1)
    monkeypatch.setattr(self_calibration, "forget_others", lambda *_: None)  # it is the same model
    write_json(directory.identity, {})
    capture, start = Capture(monkeypatch), CPUWorker.compile_or_warm_up_model

    def with_capture(worker: Any) -> Any:
        times = start(worker)
        if worker.use_v2_model_runner:
            from vllm.v1.worker.gpu.warmup import warmup_kernels

            warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
        capture.is_capturing = True
        time.sleep(CAPTURE_SECONDS)
        capture.is_capturing = False
        return times

    monkeypatch.setattr(CPUWorker, "compile_or_warm_up_model", with_capture)
    switch = {"auto": {"directory": str(directory.root)}}
    engine = tiny_engine(tiny_model, switch, max_model_len=512, kv_cache_memory_bytes=64 << 20)
    model, runner, _ = parts(engine)
    assert capture.others == set()
    assert model.loop.times.layers.steps == 0, "the warm-up says nothing about the speed of layers"
    assert not directory.model.exists()
    assert running_of(runner).kinds.kinds[kind].quarantined == {}
    wait_for(lambda: kind_policy(directory, kind) == 1)
    for _ in range(2):
        tokens(engine, [[7] * 20] * 8, greedy(allowed_token_ids=labels))
    wait_for(directory.model.exists)
    core = engine.llm_engine.engine_core.engine_core
    core.model_executor.driver_worker.worker._self_calibration.close()
