"""What gives one of vLLM's causal LMs exit points: the exit loop in place of its stack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_adainfer.config import DEFAULT_POLICY, LensRecord, read_settings
from vllm_adainfer.engine.compat import get_logger
from vllm_adainfer.engine.decoder import Decoder, norm_of
from vllm_adainfer.engine.kv_fill import KVFill
from vllm_adainfer.engine.ranks import agreed, same_on_all_ranks
from vllm_adainfer.engine.reload import NOT_THE_SAME, digest_of
from vllm_adainfer.engine.segments import Stack, build_stack
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.exit_loop import ExitLoop, ScoredAnswers
from vllm_adainfer.exits.kv import ExactKV, KVPolicy, PropagateKV
from vllm_adainfer.exits.recorder import LensSums, Recorder
from vllm_adainfer.exits.recording_loop import RecordingLoop
from vllm_adainfer.exits.shadow import ShadowAnswers, watch
from vllm_adainfer.exits.step import StepContext
from vllm_adainfer.exits.transfer import upload
from vllm_adainfer.policy.artifact import Artifact, ArtifactConfig
from vllm_adainfer.policy.artifact_files import load_artifacts
from vllm_adainfer.policy.exit_policy import CalibratedPolicy
from vllm_adainfer.policy.fingerprint import WeightsFingerprint
from vllm_adainfer.policy.monitor import AnswerMonitor, Monitor
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.script import ScriptedPolicy
from vllm_adainfer.policy.shards import VocabularyShards
from vllm_adainfer.policy.text_monitor import TextMonitor

if TYPE_CHECKING:
    from vllm.model_executor.models.llama import LlamaForCausalLM as _Model
    from vllm.v1.worker.gpu.model_states.interface import ModelState
else:
    _Model = object

logger = get_logger(__name__)


class EarlyExit(_Model):
    """Comes before vLLM's class among the bases of ours.

    Attributes:
        decoder: of the model's family.
        artifacts: that decide, by policy.
        exit_loop: runs instead of the model's own stack, or the recording loop does.
        step: whose rows the next `forward` runs; the model runner sets it.
        fingerprint: of the loaded weights.

    """

    decoder: ClassVar[type[Decoder]]
    artifacts: dict[str, Artifact]
    exit_loop: ExitLoop | RecordingLoop
    step: StepContext | None = None
    fingerprint: str | None = None
    _scored_answers: tuple[ScoredAnswers, ...] = ()
    _shadow_answers: tuple[ShadowAnswers, ...] = ()
    _kv_fill: KVFill | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = read_settings(vllm_config.additional_config)
        assert settings is not None, "the config hook selects this class only where it is set"
        self._settings = settings
        self.artifacts = load_artifacts(settings.artifacts)
        self._dtype = vllm_config.model_config.dtype

    @classmethod
    def get_model_state_cls(cls) -> type[ModelState]:
        """What Model Runner V2 is to prepare steps with."""
        from vllm_adainfer.engine.v2_state import AdaInferModelState

        return AdaInferModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load, then check that these are the weights the artifact was calibrated for."""
        fingerprint = WeightsFingerprint(self._dtype)
        loaded: set[str] = super().load_weights(fingerprint.passing(weights))
        self.fingerprint = fingerprint.hexdigest
        for artifact in self.artifacts.values():
            artifact.config.check_weights(self.fingerprint)
        if self._settings.kv == "propagate":
            layers = map(self.decoder.kv_projection, self.decoder.layers(self._body))
            self._kv_fill = KVFill(list(layers), self._exit_points)
        return loaded

    def build_exit_loop(self, vllm_config: VllmConfig) -> None:
        """Set `exit_loop`; the model runner calls this when the weights are loaded.

        Raises:
            AdaInferError: another rank has read other artifacts.

        """
        settings = self._settings
        if settings.record is not None:
            recorder = _recorder(settings.record, settings.record_lens)
            self.exit_loop = RecordingLoop(self._stack(recorder.layers, vllm_config), recorder)
            return
        if not same_on_all_ranks(digest_of(self.artifacts)):
            raise AdaInferError(NOT_THE_SAME)
        kv: KVPolicy = ExactKV() if self._kv_fill is None else PropagateKV(self._kv_fill)
        self.exit_loop = ExitLoop(
            self._stack(self._exit_points, vllm_config),
            self._policies(),
            kv,
            settings.min_rows_saved,
            self._monitors(),
            vllm_config.scheduler_config.max_num_batched_tokens,
        )

    def use_artifacts(self, artifacts: Mapping[str, Artifact]) -> None:
        """Serve with other artifacts of the same names, at exit points among those there are."""
        loop, cuts = self._exit_loop, self.cuts
        self.artifacts = dict(artifacts)
        loop.policies, loop.monitors = self._policies(cuts), self._monitors()
        loop.stats.shadow = loop.monitors
        self._shadow_answers = ()  # they are of the policies before

    @property
    def _body(self) -> Any:
        return self.decoder.body(self)

    @property
    def _exit_points(self) -> tuple[int, ...]:
        points = (artifact.config.exit_points for artifact in self.artifacts.values())
        return tuple(sorted(set().union(*points))) or self._settings.exit_script or ()

    def _policies(self, exit_points: tuple[int, ...] | None = None) -> PolicySet:
        """`exit_points` are where the stack is cut, None if where the policies want it."""
        if self._settings.exit_script is not None:
            script = ScriptedPolicy(self._exit_points, self.config.hidden_size, self.device)
            return PolicySet({DEFAULT_POLICY: script})
        return PolicySet(
            {name: self._policy(artifact) for name, artifact in self.artifacts.items()},
            exit_points,
        )

    def _policy(self, artifact: Artifact) -> CalibratedPolicy:
        lens = None
        if artifact.config.probe != "label-head":
            lens = self.logit_lens(artifact.tensors.get("head_rows"))
        return CalibratedPolicy(artifact, lens, self.device)

    def _monitors(self) -> dict[str, Monitor]:
        if not self._settings.shadow_rate:
            return {}
        return {name: monitor_of(artifact.config) for name, artifact in self.artifacts.items()}

    def _stack(self, cuts: tuple[int, ...], vllm_config: VllmConfig) -> Stack:
        width = self.decoder.head(self).embedding_dim
        return build_stack(self.decoder, self._body, width, cuts, vllm_config)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layers after which requests can leave."""
        return self._exit_loop.policies.exit_points

    @property
    def device(self) -> torch.device:
        """Of the LM head, and of policies."""
        device: torch.device = next(self.decoder.head(self).parameters()).device
        return device

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, head size] of the LM head, without vLLM's padding rows.

        With tensor parallelism they are this rank's rows of it.
        """
        head = self.decoder.head(self)
        if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            weight: Tensor = head.weight.data
        else:
            eye = torch.eye(head.embedding_dim, dtype=self._dtype, device=self.device)
            weight = head.quant_method.apply(head, eye).T.contiguous()
            logger.warning(
                "the LM head is quantised (%s): probes read a copy of what its method makes of it, "
                "which takes %.0f MiB",
                type(head.quant_method).__name__,
                weight.nbytes / (1 << 20),
            )
        return weight[: head.shard_indices.num_org_elements]

    def logit_lens(self, head_rows: Tensor | None = None) -> Probe:
        """How the model reads a state; with the whole LM head, or `head_rows` [n, head size]."""
        norm = self.decoder.final_norm(self._body)
        lens = Probe(
            head_weight=self.head_weight if head_rows is None else head_rows,
            norm=None if norm is None else norm_of(norm),
            projection=self.decoder.projection(self._body),
        )
        ranks = get_tp_group()
        if head_rows is not None or ranks.world_size == 1:
            return lens
        first = self.decoder.head(self).shard_indices.org_vocab_start_index
        return replace(
            lens,
            token_ids=first + torch.arange(len(lens.head_weight), device=self.device),
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
        """What the LM head reads, [rows, head size]; `step` tells whose rows these are."""
        assert input_ids is not None
        step, self.step = self.step, None
        if step is None:  # a profiling pass, which belongs to no request
            return self.exit_loop.stack.profile(positions, input_ids)
        output = self.exit_loop.run(positions, input_ids, step)
        self._scored_answers, self._shadow_answers = output.scored, output.shadows
        return output.hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [requests, vocabulary]; an answer given as scores masks the other tokens."""
        logits = self._answered_logits(hidden_states)
        shadows, self._shadow_answers = self._shadow_answers, ()
        for shadow in shadows:
            disagreed = shadow.disagreed(logits, super().compute_logits)
            loop = self._exit_loop
            stats = loop.stats.by_policy[shadow.name]
            watch(loop.monitors[shadow.name], stats, shadow, disagreed)
        return logits

    @property
    def _exit_loop(self) -> ExitLoop:
        assert isinstance(self.exit_loop, ExitLoop), "recording answers nothing early"
        return self.exit_loop

    def _answered_logits(self, hidden_states: Tensor) -> Tensor:
        scored, self._scored_answers = self._scored_answers, ()
        if not scored:
            return super().compute_logits(hidden_states)
        count, device = hidden_states.shape[0], hidden_states.device
        early = [answers.requests for answers in scored]
        at_full_depth = np.setdiff1d(np.arange(count), np.concatenate(early))
        deep, *places = upload([at_full_depth, *early], device)
        if at_full_depth.size:
            headed = super().compute_logits(hidden_states[deep])
            logits: Tensor = headed.new_full((count, headed.shape[1]), -torch.inf)
            logits[deep] = headed
        else:
            logits = hidden_states.new_full((count, self.config.vocab_size), -torch.inf)
        for answers, place in zip(scored, places, strict=True):
            scores = self._scaled(agreed(answers.scores))
            # Relative to the best: rounded to bfloat16, large scores would tie with the certified.
            scores = scores - scores.max(dim=1, keepdim=True).values
            logits[place.unsqueeze(1), answers.answer_ids] = scores.to(logits.dtype)
        return logits

    def _scaled(self, scores: Tensor) -> Tensor:
        """What vLLM's `LogitsProcessor` does with the head's scores: a cap (Gemma 2), a scale."""
        processor = self.logits_processor
        if processor.soft_cap is not None:
            scores = torch.tanh(scores / processor.soft_cap) * processor.soft_cap
        return scores * processor.scale


def monitor_of(config: ArtifactConfig) -> Monitor:
    """Who watches the risk that an artifact bounds, in the unit that its bound is over."""
    epsilons = [level.epsilon for level in config.levels]
    if config.max_tokens > 1:
        return TextMonitor(epsilons, config.delta, config.max_tokens)
    return AnswerMonitor(epsilons, config.delta, config.risk)


def _recorder(layers: tuple[int, ...], lens: LensRecord | None) -> Recorder:
    """What ``record`` and ``record_lens`` ask for."""
    sums = None if lens is None else LensSums(layers[:-1], lens.folds, lens.prompts)
    return Recorder(layers, sums)
