"""What is added up to choose exit points is timed by one clock, on the device that serves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from adainfer_kernels import Head, Lens, Norm

from tests.calibrations import PROMPTS, calibration_of, recording_of
from tests.unit.test_exit_loop import DEPTH, FULL_DEPTH, Toy
from vllm_adainfer.exits.accounting import clock
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.recording.recorder import Recorder
from vllm_adainfer.exits.recording.recording_loop import RecordingLoop
from vllm_adainfer.offline.calibration.fit import cost
from vllm_adainfer.offline.calibration.fit.cost import Costs
from vllm_adainfer.offline.calibration.fit_policy import make_policy
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.promise import Outcome

GPU = torch.device("meta")  # any device that is not the host


def ticking(patch: pytest.MonkeyPatch, tick: float) -> None:
    """All times are multiples of `tick`, whatever runs meanwhile."""
    ticks = iter(range(1_000_000))
    for name in "perf_counter", "thread_time":
        patch.setattr(clock.time, name, lambda: tick * next(ticks))


def timings() -> dict[str, object]:
    """The times of a recording."""
    layers = (2, 4, DEPTH)
    toy = Toy(requests=4)
    toy.shape = StackShape(np.diff([0, *layers, DEPTH]).tolist(), head_size=1)
    toy.loop = RecordingLoop(toy.shape, Recorder(layers, lens=None))
    for _ in range(2):
        toy.step([[3], [7], [1], [2]], [FULL_DEPTH] * 4, record_rows=np.arange(4))
    # Here each run of layers takes a tick, however few its rows.
    return {**toy.loop.timings.as_dict(), "fewer": ()}


def chosen(patch: pytest.MonkeyPatch, of_layers: float, of_probes: float) -> list[int]:
    """The exit points, where clocks tick so fast while layers and probes are timed."""
    recording = recording_of(labels=True)
    ticking(patch, of_layers)
    recording = replace(recording, model=replace(recording.model, **timings()))
    ticking(patch, of_probes)
    return [exit.layer for exit in make_policy(calibration_of(recording)).exits]


def test_a_device_that_is_a_thousand_times_as_fast_gets_the_same_exit_points(monkeypatch):
    slow = chosen(monkeypatch, 1.0, 1.0)
    assert slow, "some exit points pay"
    assert chosen(monkeypatch, 1e-3, 1e-3) == slow
    assert chosen(monkeypatch, 1e-3, 1.0) != slow, "clocks of two machines: the test can fail"


def test_probes_are_timed_on_the_device_that_serves_until_the_host_knows(monkeypatch):
    recording = recording_of(labels=True)
    seen = set()

    def answers(probe: Probe, states: torch.Tensor) -> tuple[torch.Tensor, Outcome]:
        seen.update((probe.head.weight.device.type, states.device.type))
        return torch.zeros(1), Outcome(torch.zeros(1))

    calibration = calibration_of(recording)
    exits = make_policy(calibration).exits
    on_gpu = replace(recording, model=replace(recording.model, device=GPU.type))
    monkeypatch.setattr(cost, "answers_of_probe", answers)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    cost.measured_costs(replace(calibration, rows=on_gpu), exits)
    assert seen == {GPU.type}


def test_a_trainer_beside_a_server_takes_the_times_of_the_servers_device(monkeypatch):
    recording = recording_of(labels=True)
    calibration = calibration_of(recording)
    exits = make_policy(calibration).exits
    timed = {"last_token": 3.0, "prompt": 5.0}
    served = replace(recording, model=replace(recording.model, label_head_seconds=timed))
    monkeypatch.delattr(cost, "probe_seconds")
    found = cost.measured_costs(replace(calibration, rows=served), exits)
    assert set(found.probe.values()) == {3.0}


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0.0), (GPU.type, 2.0 / PROMPTS)])
def test_the_time_between_steps_counts_where_a_device_runs_ahead_of_its_host(
    device, expected, monkeypatch
):
    recording = recording_of(labels=True)
    changes = {"device": device, "between_seconds": 2.0, "label_head_seconds": {"last_token": 1.0}}
    served = replace(
        recording, model=replace(recording.model, **changes), computed=np.ones(PROMPTS)
    )
    calibration = calibration_of(recording)
    found = cost.measured_costs(replace(calibration, rows=served), make_policy(calibration).exits)
    assert found.between == pytest.approx(expected)


def test_layers_behind_the_last_question_hide_the_host_as_far_as_they_take():
    costs = Costs(10, layer=1.0, cut=0.0, probe={}, own_kv_layers=10, between=50.0)
    tokens = np.full(4, 5.0)
    assert costs.exposed(4, left=1.0, tokens=tokens) == 50 - 6 * 5
    assert costs.exposed(4, left=0.5, tokens=tokens) == 50 - 6 * 5 / 2
    assert costs.exposed(4, left=0.0, tokens=tokens) == 50, "all leave there"
    assert replace(costs, between=10.0).exposed(4, left=1.0, tokens=tokens) == 0


def test_a_probe_moves_with_all_its_parts():
    probe = Probe(
        Head(torch.zeros(2, 4), torch.zeros(2)),
        token_ids=torch.arange(2),
        norm=Norm("rms", torch.ones(4)),
        lens=Lens(torch.zeros(4, 4)),
        encoder=StateEncoder(4),
    )
    there = probe.on(GPU)
    weight = next(there.encoder.parameters())
    tensors = [there.head.weight, there.head.bias, there.token_ids, there.norm.weight, weight]
    assert {one.device.type for one in [*tensors, there.lens.weight]} == {GPU.type}
    assert next(probe.encoder.parameters()).device.type == "cpu", "a copy"
    assert probe.on(torch.device("cpu")) is probe
