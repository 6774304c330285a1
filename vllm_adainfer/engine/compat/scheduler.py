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
    """The running requests with a grammar that a step sampled tokens for, and those tokens.

    vLLM 0.32's `Scheduler.update_from_output` reads the tokens from these lists, so a token that is
    appended counts as sampled. Left out are requests whose output it drops, and those with
    speculative drafts, whose number it compares with the number of tokens.
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
    """Announce `count` more tokens to vLLM 0.32's `AsyncScheduler`, which counts those to come."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    if isinstance(scheduler, AsyncScheduler):
        request.num_output_placeholders += count


@contextmanager
def not_ahead(requests: Iterable[Request]) -> Iterator[None]:
    """Keep `Scheduler.schedule` from scheduling `requests` before their token in flight is known.

    vLLM 0.32 leaves out requests whose token in flight is their last by ``max_tokens``, and uses
    ``max_tokens`` for nothing else while it schedules.
    """
    originals = [(request, request.max_tokens) for request in requests]
    for request, _ in originals:
        request.max_tokens = request.num_output_tokens + 1
    try:
        yield
    finally:
        for request, max_tokens in originals:
            request.max_tokens = max_tokens


def has_stale_output(request: Request) -> bool:
    """Whether the step that has just ended began before a request was preempted.

    vLLM 0.32 preempts and reschedules in one step when ``reset_prefix_cache`` is called with
    running requests, and counts the tokens of older steps that are still to come.
    """
    return request.num_stale_output_tokens > 0


def pooled_output(runner_output: Any, request_id: str) -> list[float] | None:
    """What a step pooled for a request, as vLLM 0.32 gives it; None for one that generates."""
    outputs = runner_output.pooler_output
    if not outputs:
        return None
    found = outputs[runner_output.req_id_to_index[request_id]]
    return None if found is None else [round(one, 6) for one in found.float().flatten().tolist()]


def hash_block_size(kv_cache_manager: Any) -> int:
    """Tokens per entry of ``Request.block_hashes``; vLLM 0.32 keeps it in the block pool."""
    return int(kv_cache_manager.block_pool.hash_block_size)
