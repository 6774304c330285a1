"""Mixin for the head of a vLLM model: how probes read it, and how early answers pass it by."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from adainfer_kernels import Head
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.interfaces import supports_multimodal

from vllm_adainfer.arrays import Ints
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.pooler import is_classifier
from vllm_adainfer.engine.model.score_head import head_of
from vllm_adainfer.engine.runner.adapters import StepAdapters
from vllm_adainfer.engine.runner.ranks import broadcast_from_rank0, is_rank0, rows_of_all_ranks
from vllm_adainfer.engine.segments.decoder import Decoder, norm_of
from vllm_adainfer.exits.loop.loop import Loop, StepOutput
from vllm_adainfer.exits.loop.shadow import Judgement
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.transfers import upload

if TYPE_CHECKING:
    from vllm.model_executor.models.llama import LlamaForCausalLM as _Model
else:
    _Model = object

logger = get_logger(__name__)


class ModelHead(_Model):
    """The LM head, or the score head of a classifier. Must precede the vLLM class in the MRO.

    `decoder` has the conventions of the model's family.
    """

    decoder: ClassVar[type[Decoder]]
    _dtype: torch.dtype
    _text_config: Any
    loop: Loop
    _output: StepOutput | None = None
    _adapters: StepAdapters | None = None

    @property
    def text_model(self) -> Any:
        """The model that has the layers: this one, or the language model of a multimodal one."""
        return self.get_language_model() if supports_multimodal(self) else self

    @property
    def _body(self) -> Any:
        return self.decoder.body(self.text_model)

    @property
    def _is_classifier(self) -> bool:
        return is_classifier(self)

    @property
    def _lm_head(self) -> Any:
        return self.decoder.head(self.text_model)

    @property
    def device(self) -> torch.device:
        """The device of the head and of the policies."""
        head = self.score if self._is_classifier else self._lm_head
        device: torch.device = next(head.parameters()).device
        return device

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, head size] of the LM head, without vLLM's padding rows.

        With tensor parallelism these are the rows of this rank.
        """
        head = self._lm_head
        if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            weight: Tensor = head.weight.data
        else:
            eye = torch.eye(head.embedding_dim, dtype=self._dtype, device=self.device)
            weight = head.quant_method.apply(head, eye).T.contiguous()
            logger.warning(
                "the LM head is quantised (%s): probes read a dequantised copy, which takes "
                "%.0f MiB",
                type(head.quant_method).__name__,
                weight.nbytes / (1 << 20),
            )
        return weight[: head.shard_indices.num_org_elements]

    def logit_lens(self, head_rows: Tensor | None = None) -> Probe:
        """The model's final norm and head, or `head_rows` [n, head size], as a probe."""
        norm = self.decoder.final_norm(self._body)
        if head_rows is not None:
            head = Head(head_rows)
        else:
            head = head_of(self.score) if self._is_classifier else Head(self.head_weight)
        lens = Probe(
            head=head,
            norm=None if norm is None else norm_of(norm),
            projection=self.decoder.projection(self._body),
        )
        ranks = get_tp_group()
        if head_rows is not None or self._is_classifier or ranks.world_size == 1:
            return lens
        first = self._lm_head.shard_indices.org_vocab_start_index
        return replace(
            lens,
            token_ids=first + torch.arange(lens.head.size, device=self.device),
            gather=lambda part: ranks.all_gather(part, dim=0).unflatten(0, (-1, part.shape[0])),
        )

    def whole_head(self) -> Tensor | None:
        """[vocabulary, head size], the whole head on the host of the first rank; else None.

        A classifier's has a row for each label. A collective.
        """
        if self._is_classifier:
            return head_of(self.score).weight.cpu() if is_rank0() else None
        head, rows = self._lm_head, self.head_weight
        padding = head.num_embeddings_per_partition - len(rows)  # vLLM's, behind the last row
        if padding and get_tp_group().world_size > 1:  # all ranks have as many
            rows = torch.cat([rows, rows.new_zeros(padding, rows.shape[1])])
        whole = rows_of_all_ranks(rows)
        return None if whole is None else whole[: head.org_vocab_size]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [sampled rows, vocabulary]; early scores of some tokens mask all others."""
        output = self._take_output()
        if output is None:
            return super().compute_logits(hidden_states)
        logits = self._logits(hidden_states, output)
        for shadow in output.shadows:
            head = partial(self._head, requests=shadow.requests)
            self._judge_later(shadow.compare(self._by_request(logits, output), head))
        return logits

    def _by_request(self, logits: Tensor, output: StepOutput) -> Tensor:
        """[requests, vocabulary], the logits of the last sampled row of each."""
        if output.sampled_lens is None:
            return logits
        everyone = np.arange(len(output.sampled_lens))
        [rows] = upload([output.sampled_row_of(everyone)], logits.device)
        return logits[rows]

    def _judge_later(self, judgement: Judgement) -> None:
        self.loop.judge_later(judgement)

    def _take_output(self) -> StepOutput | None:
        """The output of the last step, once."""
        output, self._output = self._output, None
        return output

    def _head(self, states: Tensor, requests: Ints | Tensor) -> Tensor:
        """Logits [requests, vocabulary] of vLLM's LM head, from its input for `requests`."""
        if self._adapters is not None:
            places = requests.cpu().numpy() if isinstance(requests, Tensor) else requests
            self._adapters.use_for_logits(places)
        return super().compute_logits(states)

    def _logits(self, hidden_states: Tensor, output: StepOutput) -> Tensor:
        count, device = hidden_states.shape[0], hidden_states.device
        requests, scored = output.requests_of(count), output.scored
        if not scored and not output.objects.size:
            return self._head(hidden_states, requests)
        early = [output.sampled_row_of(places) for places, _ in scored]
        of_objects = np.flatnonzero(np.isin(requests, output.objects))
        at_full_depth = np.setdiff1d(np.arange(count), np.concatenate([of_objects, *early]))
        deep, unread, *places = upload([at_full_depth, of_objects, *early], device)
        # bfloat16 is too coarse for probabilities; vLLM's sampler reads logits in fp32 anyway.
        exact = any(answers.has_rest for _, answers in scored)
        size, dtype = self._text_config.vocab_size, torch.float32 if exact else hidden_states.dtype
        deep_logits = None
        if at_full_depth.size:
            deep_logits = self._head(hidden_states[deep], requests[at_full_depth])
            size, dtype = deep_logits.shape[1], torch.float32 if exact else deep_logits.dtype
        # Samplers would make NaN of rows without a token.
        fill = -torch.inf if scored else 0
        logits = hidden_states.new_full((count, size), fill, dtype=dtype)
        if of_objects.size and scored:
            logits[unread] = 0
        if deep_logits is not None:
            logits[deep] = deep_logits.to(dtype)
        for (_, answers), place in zip(scored, places, strict=True):
            answers = replace(answers, values=broadcast_from_rank0(answers.values))
            if answers.has_rest:
                logits[place] = answers.rest.expand(-1, size)
                # A label that the request does not name counts among its other tokens.
                scores = torch.where(answers.scores.isneginf(), answers.rest, answers.scores)
            else:
                scores = self._scaled(answers.scores)
                # Relative to the best: in bfloat16, large scores would tie with the certified.
                scores = scores - scores.max(dim=1, keepdim=True).values
            logits[place.unsqueeze(1), answers.token_ids] = scores.to(dtype)
        return logits

    @property
    def soft_cap_and_scale(self) -> tuple[float | None, float]:
        """The soft cap (as in Gemma 2) and the scale of scores in vLLM's `LogitsProcessor`."""
        if self._is_classifier:
            return None, 1.0
        processor = self.text_model.logits_processor
        return processor.soft_cap, processor.scale

    def _scaled(self, scores: Tensor) -> Tensor:
        soft_cap, scale = self.soft_cap_and_scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        return scores * scale
