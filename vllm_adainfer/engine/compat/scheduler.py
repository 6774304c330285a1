"""The scheduler and its KV cache manager."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request


def sampled_tokens(
    scheduler_output: Any, runner_output: Any, requests: Mapping[str, Request]
) -> Iterator[tuple[Request, list[int]]]:
    """The running requests with a grammar that have got tokens in a step, and those tokens.

    What is added to the tokens counts as sampled, too: 0.32's `Scheduler.update_from_output` reads
    them from there. Left out are requests whose output it drops, and drafts of speculation, whose
    number it compares with that of the tokens.
    """
    for request_id, tokens in zip(
        runner_output.req_ids, runner_output.sampled_token_ids, strict=False
    ):
        request = requests.get(request_id)
        if (
            tokens
            and request is not None
            and request.use_structured_output
            and not request.is_finished()
            and not has_stale_output(request)
            and request_id not in scheduler_output.scheduled_spec_decode_tokens
        ):
            yield request, tokens


def expect_more_tokens(scheduler: Any, request: Request, count: int) -> None:
    """Tell 0.32's `AsyncScheduler`, which counts the tokens it expects, of `count` more."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    if isinstance(scheduler, AsyncScheduler):
        request.num_output_placeholders += count


@contextmanager
def not_ahead(requests: Iterable[Request]) -> Iterator[None]:
    """Keep `Scheduler.schedule` from scheduling `requests` before their token in flight is known.

    0.32 leaves out those whose token in flight is their last by ``max_tokens``, and reads that for
    nothing else while it schedules.
    """
    asked = [(request, request.max_tokens) for request in requests]
    for request, _ in asked:
        request.max_tokens = request.num_output_tokens + 1
    try:
        yield
    finally:
        for request, max_tokens in asked:
            request.max_tokens = max_tokens


def has_stale_output(request: Request) -> bool:
    """Whether the step that has just ended began before a request was preempted.

    0.32 preempts and schedules anew in one step where ``reset_prefix_cache`` is called for running
    requests, and counts the tokens of older steps still to come before it updates a request.
    """
    return request.num_stale_output_tokens > 0


def hash_block_size(kv_cache_manager: Any) -> int:
    """Tokens per entry of ``Request.block_hashes`` (0.32: an attribute of the block pool)."""
    return int(kv_cache_manager.block_pool.hash_block_size)
