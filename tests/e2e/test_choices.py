"""A request with a choice gets what stock vLLM's grammar gives it, and ends once it is decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast as Fast
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.byte_model import SETS, byte_tokenizer, save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.scripted import parts
from tests.full import full_on_v2
from vllm_adainfer.engine.scheduler.rest_of_answer import RestOfAnswer

_GENERATOR = np.random.default_rng(0)
LETTERS = [*"abcdefghijklmnopqrstuvwxyz .,"]
PROMPTS = ["".join(_GENERATOR.choice(LETTERS, length)) for length in (3, 40, 150, 1, 90, 17, 64)]


@pytest.fixture(scope="module")
def tokenizer() -> Fast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


ENGINE: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory_bytes": 64 << 20}


def engine_of(model: Path, adainfer: dict[str, Any] | None, backend: str = "xgrammar") -> Any:
    return tiny_engine(model, adainfer, structured_outputs_config={"backend": backend}, **ENGINE)


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return engine_of(model, None)


@pytest.fixture(scope="module")
def engine(model) -> Any:
    """Stock vLLM, but for the scheduler."""
    found = engine_of(model, {"finish_choices": True})
    assert [type(one) for one in parts(found)[2].observers] == [RestOfAnswer]
    return found


def choosing(choices: Sequence[str], **settings: Any) -> SamplingParams:
    return SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": 32,
            "structured_outputs": StructuredOutputsParams(choice=list(choices)),
            **settings,
        }
    )


@contextmanager
def counted_tokens(llm: Any) -> Iterator[list[int]]:
    """How many tokens the model samples for all requests, step by step."""
    scheduler, counts = parts(llm)[2], []
    update = scheduler.update_from_output

    def counting(scheduled: Any, output: Any) -> Any:
        counts.append(sum(map(len, output.sampled_token_ids)))
        return update(scheduled, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "update_from_output", counting)
        yield counts


@dataclass(frozen=True)
class Told:
    """What requests got: text and reasons to end of each, its tokens, and the tokens sampled."""

    ends: list[tuple[str, str | None, int | str | None]]
    tokens: list[list[int]]
    sampled: int


def told(llm: Any, params: Sequence[SamplingParams]) -> Told:
    inputs = [PROMPTS[place % len(PROMPTS)] for place in range(len(params))]
    with counted_tokens(llm) as counts:
        found = llm.generate(inputs, list(params), use_tqdm=False)
    outputs = [one for request in found for one in request.outputs]
    return Told(
        [(one.text, one.finish_reason, one.stop_reason) for one in outputs],
        [list(one.token_ids) for one in outputs],
        sum(counts),
    )


def decided_after(choices: Sequence[str], written: list[int], tokenizer: Fast) -> int:
    """How many of the tokens that stock has `written` leave one choice alone."""
    for count in range(1, len(written)):
        so_far = tokenizer.decode(written[:count])
        if sum(choice.startswith(so_far) for choice in choices) == 1:
            return count
    return len(written)


def test_each_choice_is_stocks_and_costs_no_token_once_it_is_decided(engine, stock, tokenizer):
    sets = [SETS[place % len(SETS)] for place in range(5 * len(SETS))]
    params = [choosing(choices) for choices in sets]
    theirs, ours = told(stock, params), told(engine, params)
    assert ours.ends == theirs.ends
    assert all(text in choices for (text, *_), choices in zip(ours.ends, sets, strict=True))
    assert {reason for _, reason, _ in ours.ends} == {"stop"}
    written = zip(sets, theirs.tokens, strict=True)
    assert ours.sampled == sum(decided_after(one, own, tokenizer) for one, own in written)
    assert ours.sampled < theirs.sampled / 2
    assert len({text for text, *_ in ours.ends}) > 8
    for tokens, (text, *_) in zip(ours.tokens, ours.ends, strict=True):
        assert tokens[-1] == tokenizer.eos_token_id, "usage counts it as stock does"
        assert tokenizer.decode(tokens[:-1]) == text


TAKES_EVERY_STEP: dict[str, dict[str, Any]] = {
    "log-probabilities": {"logprobs": 1},
    "a stop string": {"stop": ["it"]},
    "a stop string that does not come": {"stop": ["zzz"]},
    "fewer tokens than the choice has": {"max_tokens": 2},
    "a minimum of tokens": {"min_tokens": 2},
    "a bias": {"logit_bias": {65: 1.0}},
    "no end": {"ignore_eos": True, "max_tokens": 6},
}


@full_on_v2
@pytest.mark.parametrize("kind", TAKES_EVERY_STEP)
def test_a_request_that_asks_for_more_than_the_choice_takes_stocks_steps(engine, stock, kind):
    more = TAKES_EVERY_STEP[kind]
    params = [choosing(choices, **more) for choices in (SETS[4], ["a positive film", "a plot"])]
    theirs, ours = told(stock, params), told(engine, params)
    assert ours == theirs


@full_on_v2
def test_samples_of_one_request_end_each_by_itself(engine, stock):
    params = [choosing(choices, n=3, temperature=1, top_k=1) for choices in SETS]
    theirs, ours = told(stock, params), told(engine, params)
    assert ours.ends == theirs.ends
    assert ours.sampled < theirs.sampled / 2
    assert len(ours.ends) == 3 * len(SETS)


@full_on_v2
def test_other_grammars_and_free_texts_beside_choices_are_stocks(engine, stock):
    digits = StructuredOutputsParams(regex="[0-9]{3}")
    free = SamplingParams(temperature=0, max_tokens=7)
    params = [choosing(SETS[0]), choosing([], structured_outputs=digits), free, choosing(SETS[3])]
    theirs, ours = told(stock, params), told(engine, params)
    assert ours.ends == theirs.ends
    assert [ours.tokens[place] == theirs.tokens[place] for place in (1, 2)] == [True, True]


@full_on_v2
@pytest.mark.parametrize(("backend", "looks_ahead"), [("guidance", True), ("outlines", False)])
def test_other_backends_end_a_choice_at_once_if_they_can_look_ahead(
    model, stock, backend, looks_ahead
):
    """lm-format-enforcer cannot be imported beside vLLM 0.32."""
    other = engine_of(model, {"finish_choices": True}, backend)
    sets = SETS[0], SETS[1], SETS[4]
    theirs, ours = (told(llm, [choosing(choices) for choices in sets]) for llm in (stock, other))
    assert ours.ends == theirs.ends
    assert (ours.sampled < theirs.sampled) == looks_ahead
