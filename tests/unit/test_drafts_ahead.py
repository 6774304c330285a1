"""With steps scheduled ahead, a request waits for its token in flight only where a draft pays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from vllm_adainfer.drafts.answers import START, Answers
from vllm_adainfer.engine.scheduler.drafts import Drafting, Drafts
from vllm_adainfer.engine.scheduler.observer import Step

END = 0
OBJECTS = [[1, 2, value, 3, 4, 5, value + 10, 6, END] for value in (20, 21, 22) * 4]


def learnt(texts: list[list[int]]) -> Answers:
    answers = Answers()
    for text in texts:
        before: tuple[int, ...] = START
        for token in text:
            answers.add(before, token)
            before = (*before[1:], token)
    return answers


def after(*written: int) -> tuple[int, ...]:
    return (*START, *written)[-len(START) :]


@pytest.mark.parametrize(
    ("written", "pays"),
    [
        ((), True),  # 1 is in flight, and 2 follows; the value is a guess
        ((1, 2), True),  # a value is in flight: 3, 4 and 5 follow any
        ((1, 2, 20, 3), True),
        ((1, 2, 20, 3, 4), True),  # 5 is in flight, and the second value goes with the first
        ((1, 2, 20, 3, 4, 5, 30), False),  # 6 is in flight, and the end follows
        ((7, 8, 9), False),  # nothing like it was seen
    ],
)
def test_a_draft_behind_a_token_in_flight_is_expected_to_be_as_long_as_earlier_answers_agree(
    written, pays
):
    assert (learnt(OBJECTS).behind_next(after(*written), END) > 1) == pays


def test_free_text_is_not_expected_to_go_on_as_any_before():
    drawn = np.random.default_rng(0).zipf(1.3, (60, 30)) % 500 + 1
    answers, fresh = learnt(drawn[:40].tolist()), drawn[40:].tolist()
    expected = [
        answers.behind_next(after(*text[:count]), END) for text in fresh for count in range(30)
    ]
    assert sum(one > 1 for one in expected) < len(expected) / 50


def drafts_of(**changes: Any) -> tuple[Drafts, Any]:
    """Of a scheduler with one request, that has written (1, 2) and has a token in flight."""
    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 100))
    manager = SimpleNamespace(reasoner_cls=None)
    scheduler = SimpleNamespace(
        structured_output_manager=manager, vllm_config=config, running=[1], max_model_len=100
    )
    drafts = Drafts(scheduler, on_gpu=True)
    structured = SimpleNamespace(
        grammar=XgrammarGrammar.__new__(XgrammarGrammar), reasoning_ended=None
    )
    values = {
        "request_id": "a",
        "output_token_ids": [1, 2],
        "num_output_tokens": 2,
        "num_output_placeholders": 1,
        "max_tokens": 40,
        "structured_output_request": structured,
        **changes,
    }
    grammar: Any = SimpleNamespace(answers=learnt(OBJECTS), rest=0)
    one = Drafting(SimpleNamespace(**values), grammar, END)  # type: ignore[arg-type]
    drafts._requests["a"] = one
    return drafts, one


def test_a_request_waits_for_a_value_behind_which_all_answers_go_on_alike():
    drafts, one = drafts_of()
    assert list(drafts.waiting()) == [one.request]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_output_placeholders": 0},
        {"max_tokens": 4},
        {"structured_output_request": None},
        {"output_token_ids": [7, 8, 9], "num_output_tokens": 3},
    ],
    ids=["no token in flight", "no room", "no grammar", "an unknown answer"],
)
def test_it_does_not_wait_where_nothing_could_be_drafted(changes):
    drafts, _ = drafts_of(**changes)
    assert list(drafts.waiting()) == []


def test_nobody_waits_while_drafts_of_a_grammar_rest_or_its_reasoning_goes_on():
    drafts, one = drafts_of()
    one.grammar.rest = 5
    assert list(drafts.waiting()) == []
    one.grammar.rest = 0
    drafts._manager.reasoner_cls = object
    assert list(drafts.waiting()) == []


def test_behind_a_draft_in_flight_every_request_waits_until_it_is_verified():
    drafts, one = drafts_of(max_tokens=4)
    one.is_drafted = True

    def end_step(**values: Any) -> None:
        nothing: Any = {"requests": {}, "note": None, "choosing": list}
        drafts.stepped(Step(append=print, scores=print, **nothing, **values))

    assert list(drafts.waiting()) == [one.request]
    end_step(rows={"a": 64})  # an earlier chunk of its prompt, say
    assert list(drafts.waiting()) == [one.request]
    end_step(rows={"a": 4}, drafted={"a": [5, 6, 7]})
    assert list(drafts.waiting()) == []


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"num_output_placeholders": 2}, False),
        ({"num_stale_output_tokens": 3}, False),
        ({"is_prefill_chunk": True}, False),
    ],
    ids=["one token to come", "another in flight", "a draft in flight, cache reset", "a chunk"],
)
def test_nothing_is_drafted_behind_a_token_that_is_not_known(changes, may):
    """When a draft ends that a reset of the cache made stale, no other may be in flight."""
    request = {"num_stale_output_tokens": 0, "is_prefill_chunk": False, **changes}
    drafts, one = drafts_of(**request)
    assert drafts._may_draft(one) == may
