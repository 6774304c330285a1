"""Drafts in a step that vLLM has scheduled: what they take, what they leave, and who gets none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from vllm_adainfer.engine.admission.requested_output import only_grammar_decides
from vllm_adainfer.engine.compat.drafts import add_draft, masks_for_drafts
from vllm_adainfer.engine.compat.scheduler import fewer_tokens, replace_tokens

BLOCK = 16
DRAFT = (7, 8, 9, 7, 8, 9, 7, 8, 9)


class Blocks:
    """A KV cache manager with one group: the next numbers are the ids of new blocks."""

    def __init__(self, free: int) -> None:
        self.block_pool = SimpleNamespace(get_num_free_blocks=lambda: free)
        self.asked: list[tuple[int, int]] = []

    def allocate_slots(self, request: Any, tokens: int) -> Any:
        self.asked.append((request.num_computed_tokens, tokens))
        held, end = request.blocks, request.num_computed_tokens + tokens
        new = [90 + place for place in range(-(-end // BLOCK) - held)]
        return SimpleNamespace(get_block_ids=lambda allow_none: (new,) if new else None)


def scheduled_step(rows: int, is_new: bool, before: list[int] | None) -> Any:
    held = None if before is None else (before,)
    cached: Any = SimpleNamespace(req_ids=["a"], new_block_ids=[held])
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id="a", block_ids=(before,))] if is_new else [],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={"a": rows},
        total_num_scheduled_tokens=rows,
        scheduled_spec_decode_tokens={},
        new_block_ids_to_zero=None,
    )


def request_with(computed: int, placeholders: int = 0) -> Any:
    """After `schedule`: its rows count as computed, and it holds the blocks for them."""
    return SimpleNamespace(
        request_id="a",
        num_computed_tokens=computed,
        num_in_flight_tokens=5,
        num_output_placeholders=placeholders,
        blocks=-(-computed // BLOCK),
    )


def scheduler_with(free: int = 99, unclean: list[int] | None = None) -> Any:
    return SimpleNamespace(
        block_size=BLOCK,
        kv_cache_manager=Blocks(free),
        _get_new_block_ids_to_zero=lambda: unclean,
    )


@pytest.mark.parametrize("placeholders", [0, 1])
@pytest.mark.parametrize(
    ("computed", "rows", "is_new", "before", "after"),
    [
        (30, 30, True, [1, 2], [1, 2, 90]),
        (28, 28, True, [1, 2], [1, 2]),
        (30, 1, False, None, [90]),
        (33, 1, False, [3], [3]),
        (28, 1, False, None, None),
    ],
)
def test_a_draft_joins_the_rows_and_blocks_of_its_request(
    computed, rows, is_new, before, after, placeholders
):
    step, request = scheduled_step(rows, is_new, before), request_with(computed, placeholders)
    scheduler = scheduler_with()
    assert add_draft(scheduler, step, request, [7, 8, 9, 7], spare=2)
    assert scheduler.kv_cache_manager.asked == [(computed - rows, rows + 4)]
    assert step.num_scheduled_tokens == {"a": rows + 4}
    assert step.total_num_scheduled_tokens == rows + 4
    assert step.scheduled_spec_decode_tokens == {"a": [7, 8, 9, 7]}
    assert (request.num_computed_tokens, request.num_in_flight_tokens) == (computed + 4, 9)
    assert request.num_output_placeholders == (5 if placeholders else 0)
    if is_new:
        assert step.scheduled_new_reqs[0].block_ids == (after,)
    else:
        assert step.scheduled_cached_reqs.new_block_ids == [None if after is None else (after,)]


@pytest.mark.parametrize(
    ("computed", "free", "spare", "fits"),
    [(30, 2, 2, False), (30, 3, 2, True), (20, 0, 2, True), (30, 1, 0, True), (30, 0, 0, False)],
)
def test_a_draft_that_needs_a_block_leaves_as_many_free_as_are_to_be_spared(
    computed, free, spare, fits
):
    step, request = scheduled_step(1, False, None), request_with(computed)
    assert add_draft(scheduler_with(free), step, request, [7, 8, 9], spare) == fits
    if not fits:
        assert step.scheduled_spec_decode_tokens == {}
        assert request.num_computed_tokens == computed


def test_new_blocks_are_cleaned_in_the_step_that_writes_them():
    step = scheduled_step(1, False, None)
    step.new_block_ids_to_zero = [4]
    assert add_draft(scheduler_with(unclean=[90]), step, request_with(30), [7, 8, 9], spare=2)
    assert step.new_block_ids_to_zero == [4, 90]


@pytest.mark.parametrize(
    ("drafts", "rows"), [({}, 4), ({"a": [1] * 3}, 14), ({"a": [1] * 3, "b": [1] * 20}, 54)]
)
def test_there_is_a_mask_for_each_drafted_token_and_threads_fill_none_of_them(drafts, rows):
    allocated = [torch.zeros(4, 2)]
    manager: Any = SimpleNamespace(
        backend=SimpleNamespace(allocate_token_bitmask=lambda count: torch.zeros(count, 2)),
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4)),
        _grammar_bitmask=allocated[0],
        fill_bitmask_parallel_threshold=128,
    )
    step = SimpleNamespace(scheduled_spec_decode_tokens=drafts)
    with masks_for_drafts(manager, step):
        assert (manager.fill_bitmask_parallel_threshold > 1 << 30) == bool(drafts)
        assert len(manager._grammar_bitmask) == rows
    assert manager.fill_bitmask_parallel_threshold == 128


@pytest.mark.parametrize(
    ("settings", "decides"),
    [
        ({}, True),
        ({"temperature": 1.0, "seed": 1, "top_p": 0.5, "top_k": 5, "n": 3}, True),
        ({"logprobs": 5}, True),
        ({"stop": ["x"], "stop_token_ids": [5]}, True),
        ({"logprobs": -1}, False),
        ({"logprob_token_ids": [1]}, False),
        ({"prompt_logprobs": 1}, False),
        ({"min_p": 0.1}, False),
        ({"min_tokens": 2}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"bad_words": ["x"]}, False),
        ({"allowed_token_ids": [1]}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": 0.1, "max_tokens": 1}, False),
    ],
    ids=lambda one: ",".join(one) if isinstance(one, dict) else None,
)
def test_only_answers_that_the_grammar_and_the_sampling_alone_decide_are_drafted(settings, decides):
    assert only_grammar_decides(SamplingParams(**settings)) == decides


def test_vllm_schedules_with_fewer_tokens_for_that_step_alone():
    def schedule() -> None:
        with fewer_tokens(scheduler, 18):
            assert scheduler.max_num_scheduled_tokens == 82
            raise KeyError

    scheduler = SimpleNamespace(max_num_scheduled_tokens=100)
    with pytest.raises(KeyError):
        schedule()
    assert scheduler.max_num_scheduled_tokens == 100


@pytest.mark.parametrize("length", [1, 5, len(DRAFT), len(DRAFT) + 1, len(DRAFT) + 6])
def test_an_object_in_place_of_what_was_sampled_counts_no_row_that_never_ran(length):
    """vLLM takes back the drafted rows beyond the kept ones: it expects a token more than those."""
    request: Any = SimpleNamespace(
        request_id="a", num_computed_tokens=4 + len(DRAFT), num_stale_output_tokens=0
    )
    scheduled = SimpleNamespace(scheduled_spec_decode_tokens={"a": list(DRAFT)})
    sampled, written = [7, 8], list(range(length))
    replace_tokens(scheduled, None, request, sampled, written)
    assert sampled == written
    accepted = len(sampled) - 1
    request.num_computed_tokens -= len(DRAFT) - accepted  # `Scheduler.update_from_output`
    assert request.num_computed_tokens == 4 + min(len(DRAFT), accepted)


def test_of_an_object_whose_request_was_preempted_no_row_counts():
    request: Any = SimpleNamespace(
        request_id="a", num_computed_tokens=0, num_stale_output_tokens=1 + len(DRAFT)
    )
    scheduled = SimpleNamespace(scheduled_spec_decode_tokens={"a": list(DRAFT)})
    replace_tokens(scheduled, None, request, sampled := [7, 8], range(30))
    assert sampled == list(range(30))
    assert request.num_computed_tokens == 0
