"""Mixin that adds exit points to a vLLM causal LM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from adainfer_kernels import Head
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.interfaces import is_hybrid, supports_multimodal
from vllm.model_executor.models.interfaces_base import is_pooling_model

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.fingerprints import WeightsFingerprint
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.cuda_graphs.segment_graphs import SegmentGraphs
from vllm_adainfer.engine.model.batch import CompiledBatch
from vllm_adainfer.engine.model.score_head import check_scores, head_of, use_early_scores
from vllm_adainfer.engine.pinned_artifacts import served_artifacts
from vllm_adainfer.engine.runner.adapters import StepAdapters
from vllm_adainfer.engine.runner.ranks import broadcast_from_rank0
from vllm_adainfer.engine.segments.attention import StepAttention
from vllm_adainfer.engine.segments.decoder import Decoder, norm_of
from vllm_adainfer.engine.segments.kv_fill import KVFill, kv_fill_of
from vllm_adainfer.engine.segments.segments import Stack, build_stack
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.batch.upload import upload
from vllm_adainfer.exits.loop.loop import Loop, ScoredRequests, StepOutput
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.policy.answers import LabelLogits
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.shards import VocabularyShards
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.model_executor.models.llama import LlamaForCausalLM as _Model
    from vllm.v1.worker.gpu.model_states.interface import ModelState
else:
    _Model = object

logger = get_logger(__name__)


class EarlyExit(_Model):
    """Replaces the model's stack by a loop. Must precede the vLLM class in the MRO.

    Attributes:
        decoder: the conventions of the model's family.
        settings: the engine switch.
        artifacts: the artifact of each policy, by name.
        stack: the model's layers in segments.
        loop: the loop that runs the stack; the model runner builds it once the weights are loaded.
        graphs: the CUDA graphs of the segments; None if the runner has captured none.
        prepared: the step that the next `forward` runs, the builder of its attention metadata, and
            its adapters with LoRA. The model runner sets it. None for a pass without requests.
        fingerprint: the fingerprint of the weights at start-up, which the policies were calibrated
            for; None if they did not pass `load_weights`.

    """

    decoder: ClassVar[type[Decoder]]
    artifacts: dict[str, Artifact]
    stack: Stack
    loop: Loop
    graphs: SegmentGraphs | None = None
    fingerprint: str | None = None
    prepared: tuple[StepContext, StepAttention, StepAdapters | None] | None = None
    _replaced: frozenset[str] = frozenset()  # tensors that differ from those at start-up
    _output: StepOutput | None = None
    _adapters: StepAdapters | None = None
    _kv_fill: KVFill | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = read_settings(vllm_config.additional_config)
        assert settings is not None, "the config hook selects this class only where it is set"
        self.settings = settings
        self.artifacts = served_artifacts(vllm_config, settings)
        self._dtype = vllm_config.model_config.dtype
        self._started_with = WeightsFingerprint(self._dtype)
        self._text_config = vllm_config.model_config.hf_text_config

    @classmethod
    def get_model_state_cls(cls) -> type[ModelState]:
        """The `ModelState` with which Model Runner V2 prepares steps."""
        from vllm_adainfer.engine.runner.v2_state import (
            AdaInferHybridModelState,
            AdaInferModelState,
        )

        return AdaInferHybridModelState if is_hybrid(cls) else AdaInferModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load, then check that the artifacts were calibrated for these weights.

        A running engine may be given other weights, at once or in parts. Its policies then stay
        inactive until the weights of start-up are back, so whatever policies and `_kv_fill` copied
        from the weights is right whenever it is used.
        """
        fingerprint = WeightsFingerprint(self._dtype)
        if hasattr(self, "loop"):
            try:
                return super().load_weights(fingerprint.passing(weights))
            finally:
                unlike = fingerprint.unlike(self._started_with)
                self._note_replaced(self._replaced - fingerprint.names | unlike)
        loaded: set[str] = super().load_weights(fingerprint.passing(weights))
        self._started_with, self.fingerprint = fingerprint, fingerprint.hexdigest
        for artifact in self.artifacts.values():
            artifact.config.check_weights(self.fingerprint)
        if self.settings.kv == "propagate":
            writing = self.decoder.layers(self._body)[: self.decoder.own_kv_layers(self._body)]
            layers = list(map(self.decoder.kv_projection, writing))
            self._kv_fill = kv_fill_of(layers, self.exit_points)
        return loaded

    def mark_all_weights_replaced(self) -> None:
        """Treat all weights as replaced until they pass `load_weights` again."""
        self._note_replaced(frozenset(self._started_with.names or {"all"}))

    def _note_replaced(self, names: frozenset[str]) -> None:
        were_replaced, self._replaced = bool(self._replaced), names
        if self.settings.record is not None or were_replaced == bool(names):
            return
        self.loop.stats.weights_differ = bool(names)
        if names:
            logger.warning(
                "the policies were not calibrated for these weights: they are inactive, and "
                "requests run at full depth, until the weights of start-up are back"
            )
        else:
            logger.info("the weights of start-up are back: the policies are active again")

    def cut_stack(self, cuts: tuple[int, ...], vllm_config: VllmConfig) -> StackShape:
        """Build `stack`, cut after each of `cuts` (counts of layers run)."""
        if self._is_classifier:
            use_early_scores(self, self._take_output)
            for name, artifact in self.artifacts.items():
                check_scores(self, name, artifact.config)
        head_size = self.score.input_size if self._is_classifier else self._lm_head.embedding_dim
        self.stack = build_stack(self.decoder, self._body, head_size, cuts, vllm_config)
        return self.stack.shape

    @property
    def text_model(self) -> Any:
        """The model that has the layers: this one, or the language model of a multimodal one."""
        return self.get_language_model() if supports_multimodal(self) else self

    @property
    def _body(self) -> Any:
        return self.decoder.body(self.text_model)

    @property
    def _is_classifier(self) -> bool:
        return bool(is_pooling_model(self))

    @property
    def _lm_head(self) -> Any:
        return self.decoder.head(self.text_model)

    @property
    def exit_points(self) -> tuple[int, ...]:
        """The exit points of all policies, of policies that adapters may bring, or of the script.

        Also the layer after which keys and values are shared, where unsampled tokens stop.
        """
        points = [artifact.config.all_exit_points for artifact in self.artifacts.values()]
        named = self.settings.fixed_exit_points
        own, depth = self.num_own_kv_layers, len(self.decoder.layers(self._body))
        return tuple(sorted({*named, *((own,) if own < depth else ())}.union(*points)))

    @property
    def num_own_kv_layers(self) -> int:
        """The number of layers that write keys and values; later layers share them."""
        own = self.decoder.own_kv_layers(self._body)
        return len(self.decoder.layers(self._body)) if own is None else own

    @property
    def hidden_size(self) -> int:
        """The width of the states that probes read."""
        size: int = self._text_config.hidden_size
        return size

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
            shards=VocabularyShards(
                lambda part: ranks.all_gather(part, dim=0).unflatten(0, (-1, part.shape[0]))
            ),
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The LM head's input, [rows, head size]."""
        assert input_ids is not None
        if positions.dim() == 2:  # M-RoPE: time, height and width are the same for text
            positions = positions[0]
        prepared, self.prepared = self.prepared, None
        if prepared is None:
            return self.stack.profile(positions, input_ids)
        step, attention, self._adapters = prepared
        compiled = CompiledBatch(
            self.stack,
            positions,
            get_forward_context(),
            attention,
            self.graphs,
            self._kv_fill,
            None if self._adapters is None else self._adapters.of_rows(step.layout),
        )
        batch = compiled.replayed(step.layout) or compiled
        self._output = self.loop.run(batch, input_ids, step)
        return self._output.hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [requests, vocabulary]; early scores of some tokens mask all others."""
        output = self._take_output()
        if output is None:
            return super().compute_logits(hidden_states)
        logits = self._logits(hidden_states, output.scored)
        for shadow in output.shadows:
            shadow.compare(logits, partial(self._head, requests=shadow.requests))
        return logits

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

    def _logits(self, hidden_states: Tensor, scored: tuple[ScoredRequests, ...]) -> Tensor:
        count, device = hidden_states.shape[0], hidden_states.device
        if not scored:
            return self._head(hidden_states, np.arange(count))
        early = [one.requests for one in scored]
        at_full_depth = np.setdiff1d(np.arange(count), np.concatenate(early))
        deep, *places = upload([at_full_depth, *early], device)
        # bfloat16 is too coarse for probabilities; vLLM's sampler reads logits in fp32 anyway.
        exact = any(isinstance(one.answers, LabelLogits) for one in scored)
        size, dtype = self._text_config.vocab_size, torch.float32 if exact else hidden_states.dtype
        deep_logits = None
        if at_full_depth.size:
            deep_logits = self._head(hidden_states[deep], at_full_depth)
            size, dtype = deep_logits.shape[1], torch.float32 if exact else deep_logits.dtype
        logits = hidden_states.new_full((count, size), -torch.inf, dtype=dtype)
        if deep_logits is not None:
            logits[deep] = deep_logits.to(dtype)
        for one, place in zip(scored, places, strict=True):
            answers = replace(one.answers, values=broadcast_from_rank0(one.answers.values))
            if isinstance(answers, LabelLogits):
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
        """What vLLM's `LogitsProcessor` applies to the head's scores; a soft cap in Gemma 2."""
        if self._is_classifier:
            return None, 1.0
        processor = self.text_model.logits_processor
        return processor.soft_cap, processor.scale

    def _scaled(self, scores: Tensor) -> Tensor:
        soft_cap, scale = self.soft_cap_and_scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        return scores * scale
