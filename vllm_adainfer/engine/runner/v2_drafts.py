"""Verifies drafts on Model Runner V2: what vLLM 0.32 does only for its own speculative decoding.

Its inputs, masks and logits have room for several rows of a request already, and its sampler draws
the same at a position however many rows a step has. Missing are the drafts of the scheduler among
the inputs, and the comparison of samples with drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_adainfer.engine.compat.drafts import (
    LONGEST_DRAFT,
    make_room_for_drafts,
    sort_by_rows,
)


def verify_drafts(runner: Any) -> None:
    """Let a V2 `runner`, whose model is loaded, verify the drafts of our scheduler."""
    if runner.sampler is None or runner.speculative_config is not None:
        return
    sort_by_rows()
    make_room_for_drafts(runner)
    inputs = DraftedInputs(runner)
    runner.prepare_inputs = inputs.prepare
    runner.lora_state.make_lora_inputs = inputs.adapters
    runner.sampler = VerifyingSampler(runner.sampler)


class DraftedInputs:
    """Wraps what prepares the inputs of a step in a V2 runner."""

    def __init__(self, runner: Any) -> None:
        """Keep the stock methods of `runner`."""
        self._runner = runner
        self._prepare = runner.prepare_inputs
        self._adapters = runner.lora_state.make_lora_inputs
        self._drafts: Mapping[str, Sequence[int]] = {}

    def prepare(self, scheduler_output: Any, *args: Any) -> InputBatch:
        """The inputs, with the drafts of the scheduler behind the tokens of requests."""
        drafts = self._drafts = scheduler_output.scheduled_spec_decode_tokens
        if not drafts:
            inputs: InputBatch = self._prepare(scheduler_output, *args)
            return inputs
        runner = self._runner
        states, device = runner.req_states, runner.device
        slots = np.array([states.req_id_to_index[one] for one in drafts])
        padded = np.zeros((len(drafts), LONGEST_DRAFT), dtype=np.int64)
        for place, tokens in enumerate(drafts.values()):
            padded[place, : len(tokens)] = tokens
        states.draft_tokens[async_tensor_h2d(slots, device)] = async_tensor_h2d(padded, device)
        most, runner.decode_query_len = runner.decode_query_len, LONGEST_DRAFT + 1
        try:
            inputs = self._prepare(scheduler_output, *args)
        finally:
            runner.decode_query_len = most
        return inputs

    def adapters(self, request_ids: Sequence[str], *args: Any) -> tuple[Any, Any, Any]:
        """The adapters of sampled rows, of which vLLM 0.32 expects one a request; rows; all."""
        requests, rows, active = self._adapters(request_ids, *args)
        if not self._drafts:
            return requests, rows, active
        lens = [1 + len(self._drafts.get(one, ())) for one in request_ids]
        return tuple(np.repeat(requests, lens)), rows, active


class VerifyingSampler:
    """Wraps vLLM's sampler; keeps samples for as long as they are the drafted tokens."""

    def __init__(self, sampler: Any) -> None:
        """Everything but the call is passed on to `sampler`."""
        self._sampler = sampler

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on to the sampler."""
        return getattr(self._sampler, name)

    def __call__(self, logits: Tensor, batch: InputBatch) -> SamplerOutput:
        """Sample at every row, and say how many samples of each request count."""
        output: SamplerOutput = self._sampler(logits, batch)
        if batch.num_draft_tokens == 0:
            return output
        longest = int(batch.num_draft_tokens_per_req.max())
        starts, ends = batch.cu_num_logits[:-1, None], batch.cu_num_logits[1:, None]
        rows = starts + torch.arange(longest + 1, device=logits.device)
        exists = rows < ends
        rows = rows.clamp(max=len(logits) - 1)
        sampled = output.sampled_token_ids[:, 0][rows]
        given = batch.input_ids[batch.logits_indices][rows]  # the row after a sample has its draft
        agrees = (sampled[:, :-1] == given[:, 1:]) & exists[:, 1:]
        kept = torch.cumprod(agrees.to(torch.int32), 1).sum(1)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            (1 + kept).to(batch.seq_lens.dtype),
            batch.seq_lens,
            batch.cu_num_logits,
            batch.idx_mapping,
            self._sampler.req_states.prefill_len.gpu,
        )
        output.sampled_token_ids = sampled.contiguous()
        output.num_sampled, output.num_rejected = num_sampled, num_rejected
        return output
