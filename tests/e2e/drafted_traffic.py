"""Random traffic of structured answers, and what an engine makes of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

LETTERS = [*"abcdefghijklmnopqrstuvwxyz .,"]


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SENTIMENT = {"enum": ["positive", "negative"]}
YES_OR_NO = {"type": "boolean"}
TAG = {
    "triggers": ["<tool"],
    "structures": [
        {"begin": "<tool=sum>", "schema": an_object(a=SENTIMENT, b=YES_OR_NO), "end": "</tool>"}
    ],
}
IMPOSSIBLE = -1e30  # what the grammar rules out: which of them come first is chance
# Each as vLLM's `StructuredOutputsParams` takes it.
GRAMMARS: dict[str, dict[str, Any]] = {
    "enums": {"json": an_object(mood=SENTIMENT, plot={"enum": ["good", "bad", "none"]})},
    "booleans": {"json": an_object(seen=YES_OR_NO, liked=YES_OR_NO)},
    "free text": {"json": an_object(why={"type": "string", "maxLength": 6}, seen=YES_OR_NO)},
    "nested": {"json": an_object(film=an_object(plot=an_object(mood=SENTIMENT)), seen=YES_OR_NO)},
    "array": {"json": {"type": "array", "items": SENTIMENT, "minItems": 1, "maxItems": 3}},
    "regex": {"regex": "the (film|plot) is (good|bad), [0-9]{2} of 100"},
    "ebnf": {"grammar": 'root ::= "Answer: " ("yes" | "no") ", because " [a-d]{1,4} "."'},
    "choice": {"choice": ["a good film", "a good plot", "neither of them"]},
    "tag": {"structural_tag": json.dumps(TAG)},
    "any object": {"json_object": True},
}
# What else requests ask for, and how often.
EXTRAS: list[tuple[int, dict[str, Any]]] = [
    (8, {}),
    (3, {"temperature": 0.8, "seed": None}),
    (1, {"temperature": 1.3, "seed": None, "top_p": 0.9, "top_k": 20, "n": 3}),
    (2, {"logprobs": 3}),
    (1, {"logprobs": 0, "temperature": 0.7, "seed": None}),
    (1, {"prompt_logprobs": 1}),
    (1, {"stop": ["ood", "ega", "e, "]}),
    (1, {"stop": ["al"], "include_stop_str_in_output": True}),
    (1, {"stop_token_ids": list(range(130, 200))}),  # where the grammar may end, too
    (1, {"min_tokens": 3}),
    (1, {"presence_penalty": 0.5, "frequency_penalty": 0.1}),
    (1, {"repetition_penalty": 1.2}),
    (1, {"logit_bias": {40: 2.0}}),
    (1, {"min_p": 0.1, "temperature": 0.9, "seed": None}),
    (1, {"bad_words": ["good"]}),
    (1, {"ignore_eos": True}),
    (1, {"structured_outputs": None}),
]


@dataclass(frozen=True)
class Ask:
    """A request, and when it comes.

    Attributes:
        prompt: its text, or as vLLM takes it.
        params: as a client sends them.
        step: how many steps have run when it comes.
        aborted_after: with so many tokens its client hangs up.
        is_streamed: whether the client asks for what is new alone.
        lora: its adapter.

    """

    prompt: Any
    params: SamplingParams
    step: int = 0
    aborted_after: int | None = None
    is_streamed: bool = False
    lora: Any = None


@dataclass
class Got:
    """What the client of a request gets, by the number of the sample."""

    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, tuple[str | None, int | str | None]] = field(default_factory=dict)
    logprobs: dict[int, list[Mapping[int, Any]]] = field(default_factory=dict)
    prompt_logprobs: list[Any] | None = None

    def add(self, output: Any, is_streamed: bool) -> None:
        for one in output.outputs:
            new = one.text, list(one.token_ids), list(one.logprobs or ())
            if is_streamed:
                new = (
                    self.texts.get(one.index, "") + new[0],
                    self.tokens.get(one.index, []) + new[1],
                    self.logprobs.get(one.index, []) + new[2],
                )
            self.texts[one.index], self.tokens[one.index], self.logprobs[one.index] = new
            self.ends[one.index] = one.finish_reason, one.stop_reason
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs


def place_of(request_id: str) -> int:
    """The place of a request of `served`, of which vLLM makes ids of its own."""
    found = re.search(r"place (\d+)\.", request_id)
    assert found is not None
    return int(found[1])


def prompts(seed: int, count: int, longest: int = 150) -> list[str]:
    generator = np.random.default_rng(seed)
    lens = generator.integers(1, longest, count).tolist()
    return ["".join(generator.choice(LETTERS, one)) for one in lens]


def traffic(
    seed: int, count: int, grammars: Sequence[str] = tuple(GRAMMARS), longest: int = 150
) -> list[Ask]:
    """Requests of all kinds; the same few texts are asked about again and again."""
    generator = np.random.default_rng(seed)
    texts = prompts(seed, 8, longest)
    often = np.array([one for one, _ in EXTRAS], dtype=float)
    asks, step = [], 0
    for _ in range(count):
        extra = dict(EXTRAS[generator.choice(len(EXTRAS), p=often / often.sum())][1])
        if "seed" in extra:
            extra["seed"] = int(generator.integers(3))
        structured = GRAMMARS[grammars[generator.integers(len(grammars))]]
        is_streamed = bool(generator.random() < 0.3)
        asks.append(
            Ask(
                texts[generator.integers(len(texts))],
                SamplingParams(
                    **{
                        "temperature": 0,
                        "max_tokens": int(generator.choice([3, 17, 30, 60, 60, 60])),
                        "structured_outputs": StructuredOutputsParams(**structured),
                        "output_kind": RequestOutputKind.DELTA
                        if is_streamed
                        else RequestOutputKind.FINAL_ONLY,
                        **extra,
                    }
                ),
                step,
                int(generator.integers(1, 30)) if generator.random() < 0.1 else None,
                is_streamed,
            )
        )
        step += int(generator.choice([0, 0, 0, 1, 5]))
    return asks


def served(llm: Any, asks: Sequence[Ask]) -> list[Got]:
    """What each request gets, in an engine that nobody else asks."""
    engine, found = llm.llm_engine, [Got() for _ in asks]
    waiting = dict(sorted(enumerate(asks), key=lambda one: one[1].step))
    step = 0
    while waiting or engine.has_unfinished_requests():
        for place in [one for one, ask in waiting.items() if ask.step <= step]:
            ask = waiting.pop(place)
            engine.add_request(f"place {place}.", ask.prompt, ask.params, lora_request=ask.lora)
        for output in engine.step():
            place = place_of(output.request_id)
            ask, got = asks[place], found[place]
            got.add(output, ask.is_streamed)
            longest = max(map(len, got.tokens.values()))
            if ask.aborted_after is not None and longest >= ask.aborted_after:
                engine.abort_request([output.request_id])
        step += 1
    return found


def assert_same(ours: Sequence[Got], theirs: Sequence[Got], asks: Sequence[Ask]) -> None:
    """Ours are stock's: tokens, texts and ends exactly, log-probabilities up to rounding."""
    for place, (own, stock, ask) in enumerate(zip(ours, theirs, asks, strict=True)):
        told = f"request {place}: {ask}"
        if ask.aborted_after is not None and ask.is_streamed:
            for index, tokens in own.tokens.items():  # both were cut somewhere
                other = stock.tokens[index]
                least = min(len(tokens), len(other))
                assert tokens[:least] == other[:least], told
            continue
        assert own.tokens == stock.tokens, told
        assert own.texts == stock.texts, told
        assert own.ends == stock.ends, told
        for index, logprobs in own.logprobs.items():
            _assert_close(logprobs, stock.logprobs[index], told)
        _assert_close(own.prompt_logprobs or [], stock.prompt_logprobs or [], told)


def _assert_close(ours: Sequence[Any], theirs: Sequence[Any], told: str) -> None:
    assert len(ours) == len(theirs), told
    for own, stock in zip(ours, theirs, strict=True):
        if own is None or stock is None:
            assert own is stock, told
            continue
        possible = [
            {one for one in each if each[one].logprob > IMPOSSIBLE} for each in (own, stock)
        ]
        assert possible[0] == possible[1], told
        for token in possible[0]:
            one, other = own[token], stock[token]
            assert (one.rank, one.decoded_token) == (other.rank, other.decoded_token), told
            assert abs(one.logprob - other.logprob) < 1e-4, told


def _possible(logprobs: Mapping[int, Any]) -> set[int]:
    return {token for token, one in logprobs.items() if one.logprob > IMPOSSIBLE}


def scheduler_of(llm: Any) -> Any:
    """Also where several workers run in processes of their own."""
    return llm.llm_engine.engine_core.engine_core.scheduler


@dataclass
class Drafted:
    """What was drafted and kept, in tokens, by the place of the request; and the steps."""

    drafted: Counter[int] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    steps: int = 0
    preempted: int = 0


@contextmanager
def counted_drafts(llm: Any) -> Iterator[Drafted]:
    """What is drafted meanwhile for the requests of `served`."""
    counted = Drafted()
    scheduler = scheduler_of(llm)
    update = scheduler.update_from_output

    def counting(scheduled: Any, output: Any) -> Any:
        counted.steps += 1
        counted.preempted += len(scheduled.preempted_req_ids or ())
        for request_id, draft in scheduled.scheduled_spec_decode_tokens.items():
            sampled = output.sampled_token_ids[output.req_id_to_index[request_id]]
            place = place_of(request_id)
            counted.drafted[place] += len(draft)
            counted.kept[place] += max(0, len(sampled) - 1)
        return update(scheduled, output)

    scheduler.update_from_output = counting
    try:
        yield counted
    finally:
        del scheduler.update_from_output
