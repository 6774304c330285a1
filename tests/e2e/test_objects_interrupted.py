"""Clients that hang up and resets of the prefix cache, while guesses are in flight.

Answers are those of the heads or stock vLLM's, and nothing is left behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.adapters import save_adapter
from tests.byte_model import save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.drafted_traffic import Ask, Got, assert_same, place_of, scheduler_of, served
from tests.e2e.object_traffic import Engine, Traffic, engine_with, run, texts, traffic
from tests.e2e.objects import ENGINE, THRESHOLDS, params
from tests.e2e.scripted import parts, running_of
from tests.e2e.test_async_scheduling import asynchronous_scheduling
from tests.full import full_on_v2, needed
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.engine.compat.runner import attached_note

SMALL = {
    "max_num_batched_tokens": 128,
    "num_gpu_blocks_override": 13,
    "kv_cache_memory_bytes": 8 << 20,
}
# Random weights would go on with white space.
WHOLE = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
REQUESTS = 40 if IS_V2 else 60
# Which steps a reset meets depends on the clock where steps overlap: now and then no object of the
# first part of the traffic is early.
PARTS = 5
# Where tokens are in flight, a request that a reset has met is not decided for some steps.
RESETS = 0.03 if IS_V2 else 0.05


@dataclass
class Interruptions:
    """The places of this traffic's requests that were given up, and what has been in flight so far.

    `deciding` of those given up had their object decided in the step that ran; resets preempted
    `reset` running requests.
    """

    aborted: set[int] = field(default_factory=set)
    deciding: int = 0
    reset: int = 0
    in_flight: int = 0


@contextmanager
def interrupted(llm: Any, seed: int, found: Interruptions) -> Iterator[None]:
    """As EngineCore hears of them: of aborts while a step runs, of resets before the next."""
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    schedule, update = scheduler.schedule, scheduler.update_from_output
    generator = np.random.default_rng(seed)
    found.aborted.clear()

    def resetting(*args: Any, **kwargs: Any) -> Any:
        if generator.random() < RESETS:
            found.reset += len(scheduler.running)
            found.in_flight += sum(one.num_in_flight_tokens > 0 for one in scheduler.running)
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    def aborting(scheduled: Any, output: Any) -> Any:
        note = attached_note(output)
        decided = [] if note is None else list(note.objects)
        running = decided or list(scheduled.num_scheduled_tokens)
        is_first = bool(decided) and not found.deciding
        if running and (is_first or generator.random() < (0.15 if decided else 0.01)):
            place = place_of(running[generator.integers(len(running))])
            found.deciding += bool(decided) and place not in found.aborted
            found.aborted.add(place)
            engine.abort_request([f"place {place}."])
        return update(scheduled, output)

    scheduler.schedule, scheduler.update_from_output = resetting, aborting
    try:
        yield
    finally:
        del scheduler.schedule, scheduler.update_from_output


def left_behind(llm: Any) -> dict[str, int]:
    """What an engine without requests still keeps of some."""
    for _ in range(3):  # as a server does once its last request has ended
        llm.llm_engine.step()
    model, runner, scheduler = parts(llm)
    loop, running = model.loop, running_of(runner)
    pool = scheduler.kv_cache_manager.block_pool
    kept = {
        "requests": scheduler.requests,
        "steps": scheduler._running,
        "leaving": scheduler._leaving,
        "drafted": scheduler.drafts._requests,
        "probable": scheduler._objects._probable,
        "read": scheduler._objects._read,
        "withheld": scheduler._guard._unfinished,
        "admitted": running._requests,
        "numbers": running._table._places,
        "carried": loop.carried.ends,
        "shadows": loop.shadow_objects,
    }
    counts = {name: len(one) for name, one in kept.items()}
    counts["deferred rows"] = loop.kv.taken
    counts["blocks"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    return {name: count for name, count in counts.items() if count}


def assert_cached_states_are_complete(engine: Engine, stock: Any, made: Traffic) -> None:
    """Prompts that hit what the traffic has left in the prefix cache are stock's at full depth."""
    wanted = SamplingParams(temperature=0, max_tokens=3, logprobs=3)
    asks = [Ask(prompt, wanted) for prompt in sorted({ask.prompt for ask in made.asks})]
    found = engine.llm.generate([ask.prompt for ask in asks], wanted, use_tqdm=False)
    assert sum(one.num_cached_tokens for one in found) > 0
    ours = [Got() for _ in asks]
    for own, output in zip(ours, found, strict=True):
        own.add(output, is_streamed=False)
    assert_same(ours, served(stock, asks), asks)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return tiny_engine(model, None, **ENGINE | WHOLE)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory) -> Engine:
    """Steps are scheduled while the one before runs, where vLLM can."""
    folder = tmp_path_factory.mktemp("artifacts")
    with asynchronous_scheduling() if IS_V2 else nullcontext():
        return engine_with(
            model,
            folder,
            space="",
            finish_choices=False,
            thresholds=THRESHOLDS / 2,  # most objects settle
            **SMALL,
            **WHOLE,
        )


@full_on_v2
@pytest.mark.parametrize("seed", needed(1, of=range(2 if IS_V2 else 4)))
def test_interrupted_traffic_gets_the_heads_objects_or_stocks_and_leaves_nothing(
    engine, stock, seed
):
    core = engine.llm.llm_engine.engine_core.engine_core
    assert core.batch_queue_size == (2 if IS_V2 else 1)
    early = 0
    met = Interruptions()
    for part in range(PARTS):
        made = traffic(engine.label_ids, 40 + seed + 100 * part, REQUESTS)
        theirs = served(stock, deepcopy(made.asks))
        with interrupted(engine.llm, seed, met):
            found = served(engine.llm, deepcopy(made.asks))
        early += engine.judge(made, found, theirs, met.aborted).early
        assert left_behind(engine.llm) == {}
        assert_cached_states_are_complete(engine, stock, made)
        if early > 0 and met.deciding > 0 and met.reset > 10:
            break
    assert early > 0
    assert met.deciding > 0
    assert met.reset > 10
    assert (met.in_flight > 3) == IS_V2


@full_on_v2
def test_an_object_that_might_not_fit_into_the_context_is_stocks(engine, stock):
    """Whether the guess fits or not: the heads' object may be longer."""
    room = ENGINE["max_model_len"] - engine.oracle.objects.longest
    prompts = texts(6, 12, 60)
    fitting = []
    for place, prompt in enumerate(prompts):
        while len(engine.oracle.tokenizer.encode(prompt)) < room - 6 + place:
            prompt += "ab"[place % 2]
        fitting.append(prompt)
    lens = [len(engine.oracle.tokenizer.encode(one)) for one in fitting]
    asks = [Ask(one, params(), step=place) for place, one in enumerate(fitting)]
    found, theirs = served(engine.llm, deepcopy(asks)), served(stock, deepcopy(asks))
    early = Counter[bool]()
    for ask, length, own, other in zip(asks, lens, found, theirs, strict=True):
        expected = engine.early_tokens(ask) if length < room else None
        assert own.tokens[0] in (expected, other.tokens[0]), (length, room, ask)
        early[own.tokens[0] == expected] += 1
    assert early[True] > 2
    assert min(lens) < room < max(lens)


@pytest.mark.full
def test_requests_with_an_adapter_beside_run_at_full_depth(model, tmp_path):
    """The policies are for the base model."""
    settings = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    stock = tiny_engine(model, None, **ENGINE | WHOLE, **settings)
    engine = engine_with(
        model, tmp_path / "artifacts", space="", finish_choices=False, **settings, **WHOLE
    )
    saved = save_adapter(engine.oracle.model, tmp_path / "adapter", 1)
    adapter = LoRARequest("other", 1, str(saved))
    made = traffic(engine.label_ids, 50, 60)
    for place in range(0, 60, 2):
        ask = made.asks[place]
        made.asks[place] = Ask(ask.prompt, ask.params, ask.step, None, ask.is_streamed, adapter)
    for ask in made.asks:  # which end the engine of vLLM 0.32 on a CPU with LoRA
        ask.params.prompt_logprobs = None
    without = {*range(1, 60, 2)}
    judged, _ = run(
        engine, stock, Traffic(made.asks, made.of_objects & without, made.of_labels & without)
    )
    assert judged.early > 0
    assert left_behind(engine.llm) == {}
