"""What a request is told of log-probabilities does not depend on who else is in its step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.e2e.asking import greedy, outputs
from tests.e2e.oracle import head_inputs
from tests.e2e.scripted import parts
from tests.tiny import EXIT_POINTS, LAYERS
from vllm_adainfer import stats
from vllm_adainfer.artifact.files import load_artifact

# Together in one step of the shared engine: at most 16 requests and 128 rows.
_GENERATOR = np.random.default_rng(0)
PROMPTS = [_GENERATOR.integers(5, 1000, 1 + 3 * i % 8).tolist() for i in range(16)]
CLOSE = 1e-4  # fp32 sums in another order
LEAVES = 4  # how many requests of a step leave early


def drawn(seed: int, **more: Any) -> SamplingParams:
    return greedy(temperature=1, seed=seed, **more)


def reads(*token_ids: int) -> SamplingParams:
    return greedy(logprob_token_ids=list(token_ids))


OTHERS = {
    "the best three": [greedy(logprobs=3)] * 4,
    "the best none to twenty": [greedy(logprobs=k) for k in (0, 1, 2, 7, 20)],
    "the best of drawn tokens": [drawn(seed, logprobs=seed % 4) for seed in range(6)],
    "the best of several tokens": [greedy(logprobs=3, max_tokens=3), drawn(7, logprobs=2)] * 2,
    "the best of allowed tokens": [greedy(logprobs=3, allowed_token_ids=[50, 60])] * 4,
    "the best and those of the prompt": [greedy(logprobs=2, prompt_logprobs=3)] * 4,
    "the best beside reads that go on": [
        greedy(logprob_token_ids=[0, 9], max_tokens=3),
        greedy(logprobs=4, max_tokens=3),
    ],
    "the best beside a read of as many": [
        greedy(logprobs=2, logprob_token_ids=[8, 9]),
        greedy(logprobs=2),
    ],
    "the best beside a read of none": [greedy(logprob_token_ids=[]), greedy(logprobs=2)],
    "nothing": [],
}


@pytest.fixture(params=OTHERS.values(), ids=OTHERS)
def step(request, tiny_policy) -> list[SamplingParams]:
    """Requests, as many as `PROMPTS`: some leave early, read labels, want more or nothing."""
    labels = list(load_artifact(str(tiny_policy)).config.label_ids)
    leaving = [greedy(allowed_token_ids=labels)] * LEAVES
    reading = [reads(*labels), reads(7), reads(0, 3, 11, 500, 999)]
    found = [*leaving, *reading, *request.param]
    found += [greedy()] * (len(PROMPTS) - len(found))
    return [found[place] for place in np.random.default_rng(1).permutation(len(found))]


def told(output: Any) -> dict[tuple[str, int, int], Any]:
    """What an output says of log-probabilities, by part, place and token."""
    said = ("answer", output.outputs[0].logprobs), ("prompt", output.prompt_logprobs)
    return {
        (part, place, token): entry
        for part, places in said
        for place, entries in enumerate(places or [])
        for token, entry in (entries or {}).items()
    }


def test_requests_of_a_mixed_step_are_told_what_each_is_told_alone(engine, step):
    alone = [outputs(engine, [p], [asked])[0] for p, asked in zip(PROMPTS, step, strict=True)]
    loop, widths = parts(engine)[0].loop, []
    forward = loop.run

    def noting(batch: Any, input_ids: Any, context: Any) -> Any:
        widths.append(len(context.request_ids))
        return forward(batch, input_ids, context)

    left = stats(engine)["exit_histogram"].get(EXIT_POINTS[0], 0)
    with mock.patch.object(loop, "run", noting):
        together = outputs(engine, PROMPTS, step)
    assert widths[0] == len(PROMPTS), "all share a step"
    assert stats(engine)["exit_histogram"][EXIT_POINTS[0]] == left + LEAVES
    for single, mixed in zip(alone, together, strict=True):
        assert mixed.outputs[0].token_ids == single.outputs[0].token_ids
        found, expected = told(mixed), told(single)
        assert {k: e.rank for k, e in found.items()} == {k: e.rank for k, e in expected.items()}
        assert {k: e.logprob for k, e in found.items()} == pytest.approx(
            {k: e.logprob for k, e in expected.items()}, abs=CLOSE
        )


@torch.inference_mode()
def test_log_probabilities_in_a_mixed_step_are_those_of_transformers(engine, reference, step):
    for prompt, asked, output in zip(PROMPTS, step, outputs(engine, PROMPTS, step), strict=True):
        answer = output.outputs[0]
        assert len(answer.logprobs or []) == (
            asked.max_tokens if asked.num_logprobs is not None else 0
        )
        for place, found in enumerate(answer.logprobs or []):
            token = answer.token_ids[place]
            hidden = head_inputs(reference, [*prompt, *answer.token_ids[:place]], LAYERS)[-1]
            expected = reference.lm_head(hidden).log_softmax(-1)
            given = {name: entry.logprob for name, entry in found.items()}
            assert given == pytest.approx({n: float(expected[n]) for n in given}, abs=CLOSE)
            if asked.logprob_token_ids is not None:
                assert set(given) == {token, *asked.logprob_token_ids}
            else:  # by value, for a tie is in any order
                best = expected.topk(asked.logprobs).values.tolist()
                others = sorted(given.values(), reverse=True)[: asked.logprobs]
                assert others == pytest.approx(best, abs=CLOSE)
                assert len(given) in (asked.logprobs, asked.logprobs + 1)
                assert token in given
