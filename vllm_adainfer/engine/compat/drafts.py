"""Drafts without a speculative config: the scheduler's side.

vLLM 0.32 verifies drafts of its own methods only, and none of these drafts behind a prompt. But its
scheduler takes any `SchedulerOutput` that says which of a request's rows are drafts: it advances a
grammar by what was kept, and takes the rest of the rows back (`Scheduler.update_from_output`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm_adainfer.engine.compat.config import packaged_logits_processors
from vllm_adainfer.engine.compat.structured_outputs import can_look_ahead

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

# vLLM's kernels for several rows of a request are compiled for the most that one may have, and its
# masks of all rows stay on the device.
LONGEST_DRAFT = 63
MOST_DRAFTED = 1024  # tokens in a step
# vLLM measures the memory of logits for one row of each request; those of drafts come on top.
MOST_BYTES_OF_LOGITS = 1 << 28


def why_nothing_is_drafted(vllm_config: VllmConfig) -> str | None:
    """What keeps an engine from drafting structured answers; None for nothing."""
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    observability = vllm_config.observability_config
    reasons = {
        "the model does not generate": model.runner_type != "generate" or model.is_diffusion,
        "the model's layers keep a recurrent state, which cannot be taken back": (
            model.has_inner_state or model.is_attention_free
        ),
        "the model has an encoder and a decoder": model.is_encoder_decoder,
        "vLLM's own speculative decoding is on": vllm_config.speculative_config is not None,
        "the layers are spread over a pipeline": parallel.pipeline_parallel_size > 1,
        "a context is spread over ranks": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "samples are drawn on several ranks": parallel.enable_batch_sharded_sampling,
        "a KV connector moves the keys and values": (
            vllm_config.kv_transfer_config is not None
            or vllm_config.cache_config.kv_offloading_size is not None
        ),
        "a custom worker runs the model": not parallel.worker_cls.startswith("vllm_adainfer."),
        "logits processors may change scores, and see one token of a request at a time": (
            any(not str(one).startswith("vllm_adainfer.") for one in model.logits_processors or ())
            or bool(packaged_logits_processors())
        ),
        "answers are watermarked": vllm_config.watermark_config is not None,
        "sampling masks are returned": model.return_sampling_mask,
        "traces are replayed": model.enable_trace_replay,
        "metrics of speculative decoding are asked for by request": (
            observability.per_request_spec_decode_metrics != "none"
        ),
        "Model Runner V1 verifies drafts on CPUs alone, and with steps one by one": (
            not vllm_config.use_v2_model_runner
            and not (
                current_platform.is_cpu() and not vllm_config.scheduler_config.async_scheduling
            )
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def most_drafted(vllm_config: VllmConfig) -> int:
    """How many tokens of a step may be drafted."""
    row = 4 * vllm_config.model_config.get_vocab_size()
    return max(1, min(MOST_DRAFTED, MOST_BYTES_OF_LOGITS // row))


def default_penalties(vllm_config: VllmConfig) -> dict[str, float]:
    """What every request gets by default that keeps its answer from being drafted.

    Many models bring such a setting in their ``generation_config.json``.
    """
    neutral = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "min_p": 0}
    given = vllm_config.model_config.get_diff_sampling_param()
    return {key: given[key] for key, none in neutral.items() if given.get(key, none) != none}


def reads_grammar(manager: StructuredOutputManager, request: Request) -> bool:
    """Whether the grammar of `request` is in force, and can take several tokens back."""
    structured = request.structured_output_request
    if structured is None:
        return False
    if manager.reasoner_cls is not None and not structured.reasoning_ended:
        return False
    return can_look_ahead(structured.grammar)


def add_draft(
    scheduler: Any, scheduled: Any, request: Request, draft: Sequence[int], spare: int
) -> bool:
    """Let a step that is scheduled verify `draft` behind the other rows of `request`.

    Nobody makes room for a draft: False if it needs a block, and less than `spare` free ones would
    be left. As in vLLM 0.32's own `schedule`, draft tokens count as computed
    until their verification takes them back, and never enter the prefix cache: `allocate_slots` of
    the `KVCacheManager` stops at the known tokens.
    """
    from vllm.utils.math_utils import cdiv

    request_id, count = request.request_id, len(draft)
    size, computed = scheduler.block_size, request.num_computed_tokens
    new = cdiv(computed + count, size) - cdiv(computed, size)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    if new and free < new + spare:
        return False
    rows = scheduled.num_scheduled_tokens[request_id]
    request.num_computed_tokens -= rows
    blocks = scheduler.kv_cache_manager.allocate_slots(request, rows + count)
    request.num_computed_tokens += rows
    if blocks is None:
        return False
    _add_blocks(scheduled, request_id, blocks.get_block_ids(allow_none=True))
    if unclean := scheduler._get_new_block_ids_to_zero():  # in this step, not when they are written
        scheduled.new_block_ids_to_zero = [*(scheduled.new_block_ids_to_zero or ()), *unclean]
    scheduled.num_scheduled_tokens[request_id] += count
    scheduled.total_num_scheduled_tokens += count
    scheduled.scheduled_spec_decode_tokens[request_id] = list(draft)
    request.num_computed_tokens += count
    request.num_in_flight_tokens += count
    if request.num_output_placeholders:  # only `AsyncScheduler` counts them
        request.num_output_placeholders += count
    return True


def _add_blocks(scheduled: Any, request_id: str, new: tuple[list[int], ...] | None) -> None:
    if new is None:
        return
    for one in scheduled.scheduled_new_reqs:
        if one.req_id == request_id:
            one.block_ids = tuple(map(_joined, one.block_ids, new))
            return
    cached = scheduled.scheduled_cached_reqs
    place = cached.req_ids.index(request_id)
    before = cached.new_block_ids[place]
    cached.new_block_ids[place] = new if before is None else tuple(map(_joined, before, new))


def _joined(before: list[int], new: list[int]) -> list[int]:
    return [*before, *new]


@contextmanager
def masks_for_drafts(manager: StructuredOutputManager, scheduled: Any) -> Iterator[None]:
    """While the manager fills a step's masks, let it fill one for each drafted token, too.

    vLLM 0.32 has room for as many as its own speculative decoding needs, and fills those of large
    batches on several threads, one for each request (`StructuredOutputManager.grammar_bitmask`).
    """
    drafted = sum(map(len, scheduled.scheduled_spec_decode_tokens.values()))
    if not drafted or manager.backend is None:
        yield
        return
    most = manager.vllm_config.scheduler_config.max_num_seqs
    if manager._grammar_bitmask is None or len(manager._grammar_bitmask) < most + drafted:
        manager._grammar_bitmask = manager.backend.allocate_token_bitmask(2 * (most + drafted))
    threshold = manager.fill_bitmask_parallel_threshold
    manager.fill_bitmask_parallel_threshold = sys.maxsize
    try:
        yield
    finally:
        manager.fill_bitmask_parallel_threshold = threshold


def mask_logits(logits: Tensor, masks: Tensor) -> None:
    """Forbid tokens in rows of logits as vLLM 0.32 does (`apply_grammar_bitmask`)."""
    import xgrammar

    xgrammar.apply_token_bitmask_inplace(logits, masks)


def make_room_for_drafts(runner: Any) -> None:
    """Give a Model Runner V2 buffers for `LONGEST_DRAFT` drafted tokens of each request.

    vLLM 0.32 sizes them by its own speculative decoding (`GPUModelRunner.load_model`).
    """
    import torch
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    requests = runner.max_num_reqs
    runner.req_states.draft_tokens = torch.zeros(
        (requests, LONGEST_DRAFT), dtype=torch.int64, device=runner.device
    )
    runner.structured_outputs_worker = StructuredOutputsWorker(
        max_num_logits=requests + MOST_DRAFTED,
        vocab_size=runner.vocab_size,
        device=runner.device,
        mask_stride=LONGEST_DRAFT + 1,
        num_bonus_tokens=runner.model_state.num_new_sampled_tokens_per_step,
    )


def sort_by_rows() -> None:
    """Let Model Runner V2 sort a step's requests by their rows alone, drafts or not.

    vLLM 0.32 puts requests with drafts first, as its own have equally many. Behind a prompt they
    would stand before requests with one row, which attention backends expect first.
    """
    from vllm.v1.worker.gpu import model_runner

    stock = model_runner.sort_batch_req_ids
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def sort_batch_req_ids(rows: Any, drafts: Any, decode_query_len: int) -> list[str]:
        ids: list[str] = stock(rows, drafts if decode_query_len > 1 else {}, decode_query_len)
        return ids

    model_runner.sort_batch_req_ids = sort_batch_req_ids
