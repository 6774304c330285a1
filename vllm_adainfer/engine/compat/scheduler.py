"""The scheduler and its KV cache manager."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.request import Request


def sampled_tokens(
    scheduler_output: Any,
    runner_output: Any,
    requests: Mapping[str, Request],
    with_drafts: bool = False,
    with_preempted: bool = False,
) -> Iterator[tuple[Request, list[int]]]:
    """The requests with a grammar that a step sampled tokens for, and those tokens.

    Those that run, and `with_preempted` all whose output vLLM does not drop.

    vLLM 0.32's `Scheduler.update_from_output` reads the tokens from these lists, so a token that is
    appended counts as sampled. Left out are requests whose output it drops, and those with drafts
    that vLLM's own statistics compare with the tokens, unless all drafts are ours (`with_drafts`).
    """
    if not scheduler_output.has_structured_output_requests:
        return
    for request_id, tokens in zip(
        runner_output.req_ids, runner_output.sampled_token_ids, strict=False
    ):
        request = requests.get(request_id)
        if (
            tokens
            and request is not None
            and request.use_structured_output
            and not request.is_finished()
            and not (is_output_dropped if with_preempted else has_stale_output)(request)
            and (with_drafts or request_id not in scheduler_output.scheduled_spec_decode_tokens)
        ):
            yield request, tokens


def append_tokens(
    scheduler: Any, scheduled: Any, request: Request, sampled: list[int], more: list[int]
) -> None:
    """Let `more` count as sampled, too; vLLM 0.32's `AsyncScheduler` counts the tokens to come.

    Of a request with drafts, all sampled tokens but one count as drafts that were kept, so as
    computed. Those of `more` never were: their blocks must not enter the prefix cache.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    sampled += more
    if request.request_id in scheduled.scheduled_spec_decode_tokens:
        request.num_computed_tokens -= len(more)
    elif isinstance(scheduler, AsyncScheduler):
        request.num_output_placeholders += len(more)


@contextmanager
def fewer_tokens(scheduler: Any, count: int) -> Iterator[None]:
    """Let `schedule` of vLLM 0.32 leave room for so many tokens in a step."""
    most = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = most - count
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = most


def replace_tokens(
    scheduled: Any,
    runner_output: Any,
    request: Request,
    sampled: list[int],
    tokens: Sequence[int],
    logprobs: Sequence[Mapping[int, float]] | None = None,
) -> None:
    """Let `tokens` count as sampled for a request with a draft, in place of what was.

    All but one count as drafts that were kept, so as computed; see `append_tokens`. Of one that was
    preempted meanwhile, nothing counts as computed. `logprobs` have what may stand in the place of
    each, that of the token itself first; None if the request reads none.
    """
    if logprobs is not None:
        _replace_logprobs(runner_output, request.request_id, logprobs)
    if not has_stale_output(request):
        drafted = len(scheduled.scheduled_spec_decode_tokens[request.request_id])
        request.num_computed_tokens -= max(0, len(tokens) - 1 - drafted)
    sampled[:] = tokens


def _replace_logprobs(
    runner_output: Any, request_id: str, logprobs: Sequence[Mapping[int, float]]
) -> None:
    """Give a request other log-probabilities, one row for each token.

    vLLM 0.32's `LogprobsLists` has the rows of all requests, and where those of each begin; the new
    ones stand behind them. A row has the token, then the likeliest tokens; where there are fewer
    than the request asks for, others stand there with a probability of 0, as under a grammar.
    """
    lists = runner_output.logprobs
    width, count = lists.logprobs.shape[1], len(lists.logprobs)
    starts = [*(lists.cu_num_generated_tokens or range(len(runner_output.req_ids)))]
    starts[runner_output.req_id_to_index[request_id]] = count
    ids = np.empty((len(logprobs), width), lists.logprob_token_ids.dtype)
    values = np.full((len(logprobs), width), -np.inf, lists.logprobs.dtype)
    ranks = np.empty(len(logprobs), lists.sampled_token_ranks.dtype)
    for row, shares in enumerate(logprobs):
        token = next(iter(shares))
        best = sorted(shares, key=lambda one: -shares[one])[: width - 1]
        fill = (one for one in range(width + len(shares)) if one not in shares)
        ids[row] = [token, *best, *islice(fill, width - 1 - len(best))]
        values[row, : 1 + len(best)] = [shares[one] for one in (token, *best)]
        ranks[row] = sum(share >= shares[token] for share in shares.values())
    runner_output.logprobs = lists._replace(
        logprob_token_ids=np.concatenate([lists.logprob_token_ids, ids]),
        logprobs=np.concatenate([lists.logprobs, values]),
        sampled_token_ranks=np.concatenate([lists.sampled_token_ranks, ranks]),
        cu_num_generated_tokens=starts,
    )


def attach_written_objects(scheduled: Any, codes: dict[str, int]) -> None:
    """Tell the workers of all ranks, with a step, which objects ended requests have written.

    vLLM 0.32 has no field for plugins in a `SchedulerOutput`, but pickles the object with any extra
    attribute. It sends the ids of ended requests in the next one, which it makes for these alone
    where nothing is left to run.
    """
    scheduled.adainfer_objects = codes


def written_objects(scheduled: Any) -> dict[str, int]:
    """The codes that `attach_written_objects` sent, by request; of vLLM's own steps none."""
    found: dict[str, int] = getattr(scheduled, "adainfer_objects", {})
    return found


def wait_for_token(scheduler: Any, request: Request) -> None:
    """Keep the next `schedule` from scheduling `request`, whose token in flight is not yet known.

    vLLM 0.32 numbers its steps, and each request says from which on it may run; its own
    `DiffusionScheduler` lets a request wait for its last step in the same way.
    """
    soonest = scheduler.current_step + 2
    request.next_decode_eligible_step = max(request.next_decode_eligible_step, soonest)


def has_stale_output(request: Request) -> bool:
    """Whether the step that has just ended began before a request was preempted.

    vLLM 0.32 preempts and reschedules in one step when ``reset_prefix_cache`` is called with
    running requests, and counts the tokens of older steps that are still to come.
    """
    return request.num_stale_output_tokens > 0


def is_output_dropped(request: Request) -> bool:
    """Whether vLLM drops what the step that has just ended gave a request.

    vLLM 0.32 delivers a token that was in flight when memory ran out and its request was preempted.
    It drops one that was in flight when the prefix cache was reset.
    """
    return has_stale_output(request) and request.drop_stale_output


def pooled_output(runner_output: Any, request_id: str) -> list[float] | None:
    """What a step pooled for a request, as vLLM 0.32 gives it; None for one that generates."""
    outputs = runner_output.pooler_output
    if not outputs:
        return None
    found = outputs[runner_output.req_id_to_index[request_id]]
    return None if found is None else [round(one, 6) for one in found.float().flatten().tolist()]


def sampled_logprobs(runner_output: Any, request_id: str) -> Any:
    """The log-probabilities of the tokens that a step sampled for a request; None without any.

    As vLLM 0.32's `LogprobsLists`, of which the sampled token comes first in each row.
    """
    lists = runner_output.logprobs
    if lists is None:
        return None
    place = runner_output.req_id_to_index[request_id]
    return lists.slice_request(place, len(runner_output.sampled_token_ids[place]))


def hash_block_size(kv_cache_manager: Any) -> int:
    """Tokens per entry of ``Request.block_hashes``; vLLM 0.32 keeps it in the block pool."""
    return int(kv_cache_manager.block_pool.hash_block_size)


def tell_scheduler_of_arrivals() -> None:
    """Let `EngineCore` call ``request_arrived`` of a scheduler that has it, with each new request.

    vLLM 0.32 builds a request in the thread that receives it (`EngineCore.preprocess_add_request`),
    beside the running step. The scheduler has no hook there: it gets requests between steps, where
    others wait.
    """
    from vllm.v1.engine.core import EngineCore

    stock = EngineCore.preprocess_add_request
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def preprocess_add_request(core: Any, *args: Any, **kwargs: Any) -> tuple[Request, int]:
        request, wave = stock(core, *args, **kwargs)
        arrived = getattr(core.scheduler, "request_arrived", None)
        if arrived is not None:
            arrived(request)
        return request, wave

    EngineCore.preprocess_add_request = preprocess_add_request
