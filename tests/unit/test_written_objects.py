"""Objects that were decided early, and the room that steps leave for the guesses of others."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_adainfer.engine.compat.scheduler import replace_tokens, sampled_tokens
from vllm_adainfer.engine.scheduler.drafts import Drafting, Drafts

GUESS = (1,) * 20


def request_of(computed: int = 0, **changes: Any) -> Any:
    values = {
        "request_id": "a",
        "num_computed_tokens": computed,
        "num_tokens": 0,
        "num_output_tokens": 0,
        "num_output_placeholders": 0,
        "num_stale_output_tokens": 0,
        "drop_stale_output": False,
        "use_structured_output": True,
        "is_finished": lambda: False,
        **changes,
    }
    return SimpleNamespace(**values)


def drafts_of(
    prompts: Sequence[int], most: int, running: int = 0, in_chunks: bool = True, guess: Any = GUESS
) -> Drafts:
    """For waiting requests with prompts of so many tokens, and steps of `most`."""
    drafts: Any = object.__new__(Drafts)
    drafts._objects = object()
    drafts._most_drafted = 1024
    drafts._scheduler = SimpleNamespace(
        max_num_scheduled_tokens=most,
        running=[None] * running,
        scheduler_config=SimpleNamespace(enable_chunked_prefill=in_chunks),
    )
    drafts._requests = {
        str(place): Drafting(request_of(num_tokens=count), Any, 0, guess=guess)
        for place, count in enumerate(prompts)
    }
    found: Drafts = drafts
    return found


@pytest.mark.parametrize(
    ("prompts", "room"),
    [
        ([30], 20),
        ([30, 30], 40),
        ([30, 30, 90], 40),  # the last one ends in a later step anyway
        ([90], 20),  # it fits, but not with its guess, which the next step has room for
        ([30, 45], 40),
        ([200, 30], 0),
    ],
)
def test_a_step_leaves_room_for_the_guesses_of_the_prompts_that_end_in_it(prompts, room):
    assert drafts_of(prompts, most=100).tokens_of_guesses() == room


def test_requests_that_run_need_no_room_of_guesses():
    assert drafts_of([30, 30], most=100, running=60).tokens_of_guesses() == 20
    assert drafts_of([30, 30], most=100, running=80).tokens_of_guesses() == 0


def test_no_prompt_crawls_to_make_room_for_a_guess_of_most_of_a_step():
    assert drafts_of([90], most=100, guess=(1,) * 60).tokens_of_guesses() == 0


def test_prompts_in_one_piece_may_need_the_whole_step():
    """One of them might wait forever for a guess behind it."""
    assert drafts_of([30], most=100, in_chunks=False).tokens_of_guesses() == 0


def test_an_object_in_flight_is_written_although_its_request_was_preempted_meanwhile():
    request = request_of(computed=0, num_stale_output_tokens=5)
    scheduled: Any = SimpleNamespace(
        has_structured_output_requests=True, scheduled_spec_decode_tokens={"a": [1, 2]}
    )
    output: Any = SimpleNamespace(req_ids=["a"], sampled_token_ids=[[9]])
    of = scheduled, output, {"a": request}
    assert [*sampled_tokens(*of, with_drafts=True)] == []
    [(found, tokens)] = sampled_tokens(*of, with_drafts=True, with_preempted=True)
    replace_tokens(scheduled, output, found, tokens, [1, 2, 3, 4, 0])
    assert output.sampled_token_ids == [[1, 2, 3, 4, 0]]
    assert request.num_computed_tokens == 0, "its blocks are gone"
    request.drop_stale_output = True
    assert [*sampled_tokens(*of, with_drafts=True, with_preempted=True)] == []
