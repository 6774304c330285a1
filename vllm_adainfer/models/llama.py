"""Llama with exit points: vLLM's own layers, head and weight loading around the exit loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.compilation.decorators import ignore_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from vllm_adainfer.artifact import load_artifact, weights_fingerprint
from vllm_adainfer.config import LensRecord, Settings, read_settings
from vllm_adainfer.decision.monitor import DisagreementMonitor
from vllm_adainfer.decision.policy import CalibratedPolicy, ExitPolicy
from vllm_adainfer.decision.record import LensSums, Recorder
from vllm_adainfer.decision.script import ScriptedPolicy
from vllm_adainfer.models.exit_loop import ExitLoop, ScoredAnswers
from vllm_adainfer.models.kv_fill import KVFill
from vllm_adainfer.models.recording_loop import RecordingLoop
from vllm_adainfer.models.segments import Stack, build_stack
from vllm_adainfer.models.shadow import ShadowAnswers, watch
from vllm_adainfer.runtime.kv import ExactKV, KVPolicy, PropagateKV
from vllm_adainfer.runtime.step import StepContext


@ignore_torch_compile  # its segments are compiled instead
class SegmentedLlamaModel(LlamaModel):
    """vLLM's Llama stack; `forward` is the exit loop, or the recording loop."""

    exit_loop: ExitLoop | RecordingLoop
    step: StepContext | None = None
    scored_answers: ScoredAnswers | None = None
    shadow_answers: ShadowAnswers | None = None

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [rows, hidden size]; `step` tells whose rows these are."""
        assert input_ids is not None
        step, self.step = self.step, None
        if step is None:  # a profiling pass, which belongs to no request
            return self.exit_loop.stack.profile(positions, input_ids)
        hidden, self.scored_answers, self.shadow_answers = self.exit_loop.run(
            positions, input_ids, step
        )
        return hidden


class AdaInferLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's LlamaForCausalLM whose requests may leave the stack early."""

    model: SegmentedLlamaModel
    fingerprint: str | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        settings = read_settings(vllm_config.additional_config)
        assert settings is not None, "the config hook selects this class only where it is set"
        self._artifact = None if settings.artifact is None else load_artifact(settings.artifact)
        if settings.record is not None:
            recorder = _recorder(settings.record, settings.record_lens)
            stack = self._stack(recorder.layers, vllm_config)
            self.model.exit_loop = RecordingLoop(stack, recorder)
        else:
            policy = self._policy(settings)
            monitor: DisagreementMonitor | None = None
            if settings.shadow_rate > 0 and self._artifact is not None:
                config = self._artifact.config
                monitor = DisagreementMonitor([at.epsilon for at in config.levels], config.delta)
            stack = self._stack(policy.exit_points, vllm_config)
            kv: KVPolicy = ExactKV() if settings.kv == "exact" else PropagateKV()
            self.model.exit_loop = ExitLoop(stack, policy, kv, settings.min_rows_saved, monitor)

    def _policy(self, settings: Settings) -> ExitPolicy:
        norm_weight = self.model.norm.weight.data
        if self._artifact is not None:
            return CalibratedPolicy(self._artifact, norm_weight, self.head_weight)
        assert settings.exit_script is not None, "there is one source of decisions"
        return ScriptedPolicy(settings.exit_script, self.config.hidden_size, norm_weight.device)

    def _stack(self, cuts: tuple[int, ...], vllm_config: VllmConfig) -> Stack:
        model = self.model
        return build_stack(
            model.embed_tokens, model.layers, model.norm, cuts, layer_for_rows, vllm_config
        )

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any
    ) -> SegmentedLlamaModel:
        return SegmentedLlamaModel(vllm_config=vllm_config, prefix=prefix, **kwargs)

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, hidden size] of the LM head, without vLLM's padding rows."""
        return self.lm_head.weight.data[: self.config.vocab_size]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load, then check that these are the weights the artifact was calibrated for."""
        loaded: set[str] = super().load_weights(weights)
        self.fingerprint = weights_fingerprint(dict(self.named_parameters()))
        loop = self.model.exit_loop
        if isinstance(loop.kv, PropagateKV):
            loop.kv.fill = KVFill(self.model.layers, self._exit_loop.policy.exit_points)
        if self._artifact is not None:
            self._artifact.config.check_weights(self.fingerprint)
        return loaded

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [requests, vocabulary]; an answer given as scores masks the other tokens."""
        logits = self._answered_logits(hidden_states)
        shadow, self.model.shadow_answers = self.model.shadow_answers, None
        if shadow is not None:
            loop = self._exit_loop
            assert loop.monitor is not None, "it is what asks for shadow requests"
            disagreed = shadow.disagreed(logits, loop.policy, super().compute_logits)
            watch(loop.monitor, shadow.tags, disagreed)
        return logits

    @property
    def _exit_loop(self) -> ExitLoop:
        assert isinstance(self.model.exit_loop, ExitLoop), "recording answers nothing early"
        return self.model.exit_loop

    def _answered_logits(self, hidden_states: Tensor) -> Tensor:
        answers, self.model.scored_answers = self.model.scored_answers, None
        if answers is None:
            return super().compute_logits(hidden_states)
        answer_ids = self._exit_loop.policy.answer_ids
        assert answer_ids is not None
        deep = torch.ones(hidden_states.shape[0], dtype=torch.bool, device=hidden_states.device)
        deep[answers.requests] = False
        logits: Tensor | None = None
        if deep.any():
            at_full_depth = super().compute_logits(hidden_states[deep])
            logits = at_full_depth.new_full((deep.shape[0], at_full_depth.shape[1]), -torch.inf)
            logits[deep] = at_full_depth
        else:
            logits = hidden_states.new_full((deep.shape[0], self.config.vocab_size), -torch.inf)
        # Relative to the best: rounded to bfloat16, large scores would tie with the certified one.
        scores = answers.scores - answers.scores.max(dim=1, keepdim=True).values
        logits[answers.requests.unsqueeze(1), answer_ids] = scores.to(logits.dtype)
        return logits


def layer_for_rows(
    layer: LlamaDecoderLayer, positions: Tensor, hidden: Tensor, residual: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """vLLM's `LlamaDecoderLayer.forward`, but all rows get K and V, and only `rows` the rest.

    The attention metadata must be of queries in `rows`, and the slot mapping of all rows.
    """
    attention = layer.self_attn
    hidden, residual = layer.input_layernorm(hidden, residual)
    qkv, _ = attention.qkv_proj(hidden)
    q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    q, k = attention.rotary_emb(positions, q, k)
    output, _ = attention.o_proj(attention.attn(q[rows], k, v))
    hidden, residual = layer.post_attention_layernorm(output, residual[rows])
    return layer.mlp(hidden), residual


def _recorder(layers: tuple[int, ...], lens: LensRecord | None) -> Recorder:
    """What ``record`` and ``record_lens`` ask for."""
    sums = None if lens is None else LensSums(layers[:-1], lens.folds, lens.prompts)
    return Recorder(layers, sums)
