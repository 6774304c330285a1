"""Under a policy for their choices, requests leave early and end in the same step."""

from __future__ import annotations

import copy
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput

from tests.byte_model import byte_tokenizer, save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.asking import ask, ask_and_count, outputs
from tests.e2e.oracle import last_states
from tests.e2e.scripted import parts
from tests.e2e.test_choices import choosing
from tests.full import FULL_ON_V2
from tests.tiny import EXIT_POINTS, LAYERS, tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer import stats
from vllm_adainfer.artifact.outputs import UNDECIDED, Choices
from vllm_adainfer.engine.scheduler.rest_of_answer import RestOfAnswer
from vllm_adainfer.engine.scheduler.scheduler import AdaInferAsyncScheduler, build_scheduler
from vllm_adainfer.offline.calibration.data.choices import find_choices

pytestmark = FULL_ON_V2

TOKENIZER = byte_tokenizer()
SETS = {
    "mood": ["positive", "negative", "neutral"],  # some first tokens leave two of them open
    "word": ["film", "plot"],
    "answer": ["yes", "no", "yes, but"],
}
GAP, TIE = 0.2, 1e-3
_GENERATOR = np.random.default_rng(7)
LETTERS = TOKENIZER.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"])
PROMPTS = [_GENERATOR.choice(LETTERS, 1 + 7 * i % 40).tolist() for i in range(40)]


def choices_of(name: str) -> Choices:
    return find_choices(SETS[name], TOKENIZER, len(TOKENIZER))


def config_of(name: str) -> dict[str, Any]:
    found = choices_of(name)
    return {"choices": found.choices, "undecided": found.undecided, "labels": found.labels}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def artifacts(model, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("choices")
    thresholds = torch.full((2, len(EXIT_POINTS)), GAP)
    return {
        name: str(tiny_artifact(model, folder / name, thresholds, **config_of(name)))
        for name in SETS
    }


def engine_of(model: Path, switch: dict[str, Any] | None) -> Any:
    return tiny_engine(model, switch, max_model_len=256, kv_cache_memory_bytes=64 << 20)


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return engine_of(model, None)


@pytest.fixture(scope="module")
def engine(model, artifacts) -> Any:
    return engine_of(model, {"artifact": artifacts, "min_rows_saved": 1})


@pytest.fixture(scope="module")
def decisions(model) -> dict[str, list[tuple[int, str] | None]]:
    """By policy, for each prompt: where it leaves and with which text; None if that is close.

    The depth of those that stay is that of the model, and the text then ``""``.
    """
    reference = LlamaForCausalLM.from_pretrained(model)
    states = last_states(reference, PROMPTS)
    return {name: [decided(model, name, after) for after in states] for name in SETS}


@torch.inference_mode()
def decided(model: Path, name: str, after: list[Tensor]) -> tuple[int, str] | None:
    config = tiny_config(model, **config_of(name))
    tensors = tiny_tensors(config)
    for layer in EXIT_POINTS:
        scores = tensors[f"exit.{layer}.head_weight"] @ after[layer][0]
        best = scores.softmax(0).sort(descending=True)
        gap = float(best.values[0] - best.values[1])
        text = config.labels[int(best.indices[0])].name
        if abs(gap - GAP) < TIE or gap < TIE:
            return None
        if gap > GAP and text != UNDECIDED:
            return layer, text
    return LAYERS, ""


def run(llm: Any, params: list[SamplingParams]) -> tuple[list[Any], Counter[int], dict[str, Any]]:
    """Outputs of all prompts at once, where tokens were decided, and the engine's counters.

    From an empty prefix cache: prompts that come again would run at full depth to fill it.
    """
    llm.reset_prefix_cache()
    return *ask_and_count(llm, PROMPTS, params), stats(llm)


def test_settled_requests_get_the_choice_of_their_exit_and_others_that_of_stock(
    engine, stock, decisions
):
    names = [list(SETS)[place % len(SETS)] for place in range(len(PROMPTS))]
    params = [choosing(SETS[name]) for name in names]
    theirs = ask(stock, PROMPTS, params)
    ours, left, counted = run(engine, params)
    wanted: Counter[int] = Counter()
    unsure = 0
    for place, (name, one, full) in enumerate(zip(names, ours, theirs, strict=True)):
        found = decisions[name][place]
        assert one.text in SETS[name], (one.text, one.token_ids, place)
        assert one.finish_reason == "stop"
        assert one.token_ids[-1] == TOKENIZER.eos_token_id
        if found is None:
            unsure += 1
            continue
        depth, text = found
        assert one.text == (text or full.text)
        wanted[depth] += 1
    assert unsure < len(PROMPTS) / 4
    early = {depth: count for depth, count in wanted.items() if depth < LAYERS}
    assert len(early) > 1, "some leave here and some there"
    assert wanted[LAYERS] > 0
    assert all(0 <= left[depth] - count <= unsure for depth, count in early.items())
    assert counted["layers_run"] < counted["layers_possible"]


FULL_DEPTH: dict[str, dict[str, Any]] = {
    "log-probabilities": {"logprobs": 1},
    "a stop string": {"stop": ["it"]},
    "no room for the longest": {"max_tokens": 2},
    "drawn": {"temperature": 1, "top_k": 1},
    "asked for": {"extra_args": {"adainfer": 0}},
}


@pytest.mark.parametrize("kind", FULL_DEPTH)
def test_a_request_that_asks_for_more_than_the_choice_runs_all_layers(engine, stock, kind):
    params = [choosing(SETS["mood"], **FULL_DEPTH[kind]) for _ in PROMPTS]
    theirs = [one.text for one in ask(stock, PROMPTS, params)]
    ours, left, _ = run(engine, params)
    assert [one.text for one in ours] == theirs
    assert set(left) == {LAYERS}


def test_a_settled_choice_takes_one_step_and_leaves_nothing_behind(engine, decisions):
    places = [i for i, found in enumerate(decisions["word"]) if found and found[0] < LAYERS]
    engine.reset_prefix_cache()
    before = stats(engine)
    found = outputs(engine, [PROMPTS[place] for place in places], choosing(SETS["word"]))
    after = stats(engine)
    assert after["tokens_decided"] - before["tokens_decided"] == len(found)
    rows = sum(len(PROMPTS[place]) for place in places)
    assert after["layers_possible"] - before["layers_possible"] == rows * LAYERS
    loop = parts(engine)[0].loop
    engine.generate("x", SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert not any(loop.kv.missing(out.request_id, 1 << 20) for out in found)


def test_a_choice_whose_rest_is_not_appended_goes_on_to_the_same_text(
    engine, decisions, monkeypatch
):
    """Which should not happen: then its rows catch up, and the grammar forces what is left."""
    monkeypatch.setattr(RestOfAnswer, "after", lambda *_: [])
    ours, left, _ = run(engine, [choosing(SETS["mood"])] * len(PROMPTS))
    for one, found in zip(ours, decisions["mood"], strict=True):
        assert one.text in SETS["mood"]
        assert found is None or one.text == found[1] or not found[1]
    assert left[LAYERS] > len(PROMPTS), "later tokens run all layers"


@pytest.fixture
def asynchronous(engine) -> Any:
    """A scheduler as on a GPU, beside that of the engine."""
    core = engine.llm_engine.engine_core.engine_core
    config = copy.deepcopy(core.vllm_config)
    config.scheduler_config.async_scheduling = True
    scheduler = build_scheduler(
        config,
        kv_cache_config=core.scheduler.kv_cache_config,
        structured_output_manager=core.structured_output_manager,
        block_size=core.scheduler.block_size,
    )
    assert isinstance(scheduler, AdaInferAsyncScheduler)
    return scheduler


def add(engine: Any, scheduler: Any, name: str, params: SamplingParams) -> None:
    asked = engine.llm_engine.input_processor.process_inputs(
        name, {"prompt_token_ids": PROMPTS[0]}, params, supported_tasks=("generate",)
    )
    request, _ = engine.llm_engine.engine_core.engine_core.preprocess_add_request(asked)
    while request.structured_output_request and not request.structured_output_request.grammar:
        time.sleep(0.01)
    scheduler.add_request(request)


def sampled(scheduled: Any, tokens: dict[str, int]) -> ModelRunnerOutput:
    names = list(scheduled.num_scheduled_tokens)
    places = {name: place for place, name in enumerate(names)}
    return ModelRunnerOutput(names, places, [[tokens[name]] for name in names])


def test_of_a_request_that_its_first_token_may_end_no_step_is_scheduled_ahead(engine, asynchronous):
    free = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    asks = {
        "ends": choosing(SETS["mood"]),
        "goes on": choosing(SETS["mood"]),
        "no policy": choosing(["film", "review"]),
        "free": free,
    }
    for name, params in asks.items():
        add(engine, asynchronous, name, params)
    tokens = dict.fromkeys(asks, TOKENIZER.convert_tokens_to_ids("f"))
    tokens["ends"] = TOKENIZER.convert_tokens_to_ids("p")
    tokens["goes on"] = TOKENIZER.convert_tokens_to_ids("ne")
    first = asynchronous.schedule()
    assert set(first.num_scheduled_tokens) == set(asks)
    ahead = asynchronous.schedule()
    assert set(ahead.num_scheduled_tokens) == {"no policy", "free"}
    asynchronous.update_from_output(first, sampled(first, tokens))
    assert "ends" not in asynchronous.requests
    later = asynchronous.schedule()
    assert set(later.num_scheduled_tokens) == {"goes on", "free"}, "the other choice has ended"
    assert asynchronous.requests["goes on"].max_tokens == asks["goes on"].max_tokens


def test_shadow_requests_are_compared_by_the_choice(model, artifacts, stock, decisions):
    llm = engine_of(model, {"artifact": artifacts["mood"], "min_rows_saved": 1, "shadow_rate": 1})
    params = [choosing(SETS["mood"]) for _ in PROMPTS]
    theirs = [one.text for one in ask(stock, PROMPTS, params)]
    ours, left, counted = run(llm, params)
    assert [one.text for one in ours] == theirs
    assert set(left) == {LAYERS}
    reading = counted["shadow"][0.05]
    sure = [(found, text) for found, text in zip(decisions["mood"], theirs, strict=True) if found]
    differ = sum(bool(found[1]) and found[1] != text for found, text in sure)
    assert reading["checked"] == len(PROMPTS)
    assert 0 <= reading["disagreed"] - differ <= len(PROMPTS) - len(sure)
    assert differ > 0


def test_free_texts_and_choices_of_one_step_are_each_what_they_are_alone(engine):
    free = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    params = [free if place % 2 else choosing(SETS["answer"]) for place in range(len(PROMPTS))]
    together, _, _ = run(engine, params)
    for prompt, asked, answer in zip(PROMPTS, params, together, strict=True):
        engine.reset_prefix_cache()
        [alone] = ask(engine, [prompt], asked)
        assert alone.text == answer.text
