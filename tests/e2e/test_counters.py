"""Whatever requests do, no counter ever falls, and every row that came is accounted for."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.worker.gpu_worker import Worker

from tests.e2e.patterns import Request, drive, random_requests, wrong
from tests.e2e.scripted import FULL, ScriptedPolicy, drawn, parts, scripted
from tests.full import needed
from tests.tiny import EXIT_POINTS, LAYERS
from tests.triton_on_cpu import IS_V2
from tests.unit.test_accounting import waiting_of
from vllm_adainfer import stats
from vllm_adainfer.engine.runner.build_loop import monitors_of
from vllm_adainfer.engine.segments.segments import Stack
from vllm_adainfer.engine.worker.gpu_worker import AdaInferGPUWorker
from vllm_adainfer.exits.accounting.counters import PolicyStats
from vllm_adainfer.exits.accounting.report import snapshot_of
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.settings.engine import NO_POLICY

NAMES = ("a", "b", NO_POLICY)
BUDGET = 128  # rows of a step, see `tiny_engine`


class CountingStack(Stack):
    """Counts token-layers as they are run; `largest` is the most rows of a segment."""

    executed = 0
    largest = 0

    def run(self, index: int, positions: Tensor, states: HiddenStates) -> HiddenStates:
        self._count(states.num_rows, len(self.segments[index].layers))
        return super().run(index, positions, states)

    def write_last_kv(
        self, positions: Tensor, states: HiddenStates, slots: dict[str, Tensor]
    ) -> None:
        self._count(states.num_rows, 1)
        super().write_last_kv(positions, states, slots)

    def _count(self, rows: int, layers: int) -> None:
        cls = type(self)
        cls.executed += rows * layers
        cls.largest = max(cls.largest, rows)


@contextmanager
def counting(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[CountingStack]]:
    """The model's stack, counted; each row runs the last layer in one piece."""
    monkeypatch.setattr(model.loop, "_compaction_cost", 1 << 30)
    stack, cls = model.stack, type("FreshStack", (CountingStack,), {})
    model.stack = cls(**{field.name: getattr(stack, field.name) for field in fields(stack)})
    try:
        yield cls
    finally:
        model.stack = stack


def waiting_rows(kv: Any) -> int:
    """Token-layers that the KV policy holds back."""
    return sum(
        chunk.shape[1] * (LAYERS - EXIT_POINTS[exit_index])
        for below in kv._waiting.values()
        for exit_index, chunks in below.items()
        for chunk in chunks
    )


@contextmanager
def two_policies(
    llm: Any, capacity: int, check: Callable[[Counter[str]], None], reload_share: float
) -> Iterator[None]:
    """Each token draws one of two policies and an exit point, or full depth.

    After each step `check` gets token-layers that came by policy. Artifacts are read again now and
    then.
    """
    model, _, _ = parts(llm)
    loop = model.loop
    came: Counter[str] = Counter()
    dice = np.random.default_rng(capacity)
    with scripted(llm):
        points, run = loop.policies.exit_points, loop.run
        policy = ScriptedPolicy(points, model.logit_lens())
        policies = PolicySet({"a": policy, "b": policy})
        loop.policies = policies
        loop.reset_counters()
        loop.kv = ExactKV(capacity)

        def drawing(batch: Any, input_ids: Tensor, step: Any) -> Any:
            if dice.random() < reload_share:
                loop.use_policies(policies, monitors_of(model))
            seeds = step.threshold_rows.copy()
            step.threshold_rows[:] = FULL
            for place in step.undecided():
                position = int(step.layout.last_positions[place])
                drawn_tag = zlib.crc32(f"{seeds[place]} {position}".encode())
                step.threshold_rows[place] = drawn_tag % (2 * len(points) + 1) - 1
            for owner, rows in zip(
                policies.owners(step.threshold_rows), step.layout.query_lens, strict=True
            ):
                came[NAMES[owner]] += int(rows) * LAYERS
            output = run(batch, input_ids, step)
            check(came)
            return output

        loop.run = drawing
        try:
            yield
        finally:
            del loop.run


@pytest.mark.parametrize("seed", needed(1, of=range(2)) if IS_V2 else needed(3, of=range(12)))
def test_after_every_step_no_counter_has_fallen_and_all_that_came_is_run_skipped_or_waits(
    small, monkeypatch, seed
):
    """Random exits under two policies, with rejoins, preemptions, aborts, next turns, reloads."""
    generator = np.random.default_rng(3000 + seed)
    requests = random_requests(generator, int(generator.integers(3, 15)), within=8)
    capacity = int(generator.choice([5, 50, 10_000]))
    loop, received = parts(small)[0].loop, Counter[Any]()
    steps = 0

    def check(came: Counter[str]) -> None:
        nonlocal steps
        steps += 1
        for key, count in snapshot_of(loop.stats)["counts"].items():
            assert count >= received[key], key
            received[key] = count
        waiting = waiting_of(loop)
        for name in NAMES:
            run, skipped, _ = (received[kind, name] for kind in PolicyStats().work)
            assert run + skipped + waiting[name] == came[name]
        assert loop.stats.layers_run == stack.executed
        assert stack.largest <= BUDGET

    with (
        counting(parts(small)[0], monkeypatch) as stack,
        two_policies(small, capacity, check, reload_share=0.1),
    ):
        pattern = drive(small, requests)
        small.llm_engine.step()  # the worker hears of the last ones that ended
        assert waiting_of(loop) == dict.fromkeys(NAMES, 0)
    assert steps > 10
    assert pattern.produced
    assert received["layers_deferred", "a"] > 0


@pytest.mark.parametrize(
    ("tokens", "rejoin_at"),
    [
        pytest.param([140] * 10, 60, id="of ten requests, at once"),
        pytest.param([200], 150, id="of one request, more than a step takes"),
    ],
)
def test_rows_that_rejoin_never_make_a_batch_larger_than_a_step(
    engine, reference, monkeypatch, tokens, rejoin_at
):
    """All wait at two exit points, until at one position all go to the end."""
    prompts = [np.random.default_rng(n).integers(5, 1000, 9).tolist() for n in range(len(tokens))]
    requests = [
        Request(prompt, max_tokens=min(count, rejoin_at + 10), seed=number)
        for number, (prompt, count) in enumerate(zip(prompts, tokens, strict=True))
    ]
    model, held = parts(engine)[0], []
    loop = model.loop

    def draw(seed: int, position: int, exit_points: int) -> int:
        held.append(waiting_rows(loop.kv))
        return FULL if position >= rejoin_at else int(position > rejoin_at // 2) ^ 1

    with counting(model, monkeypatch) as stack, drawn(engine, draw=draw) as ran:
        pattern = drive(engine, requests)
        assert loop.stats.layers_run == stack.executed
    assert max(held) > BUDGET * (LAYERS - EXIT_POINTS[0]), "the case must be beyond the limit"
    assert stack.largest <= BUDGET
    assert wrong(reference, pattern, ran) == []


def test_requests_that_warm_up_a_gpu_are_not_counted(engine, monkeypatch):
    _, runner, _ = parts(engine)
    prompt, params = {"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=4)

    watched = []
    monkeypatch.setattr(Worker, "_maybe_activate_jit_monitor", lambda self: watched.append(self))
    worker = object.__new__(AdaInferGPUWorker)
    worker.model_runner = runner
    engine.generate([prompt] * 3, params, use_tqdm=False)
    worker._maybe_activate_jit_monitor()
    assert watched == [worker]
    engine.generate([prompt], params, use_tqdm=False)
    assert (stats(engine)["tokens_decided"], stats(engine)["layers_run"]) == (4, 6 * LAYERS)
