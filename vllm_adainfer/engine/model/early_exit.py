"""Mixin that adds exit points to a vLLM causal LM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.models.interfaces import is_hybrid

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fingerprints import WeightsFingerprint
from vllm_adainfer.engine.compat.config import engine_options_of
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.cuda_graphs.segment_graphs import SegmentGraphs
from vllm_adainfer.engine.model.batch import CompiledBatch, Execution
from vllm_adainfer.engine.model.model_head import ModelHead
from vllm_adainfer.engine.model.score_head import check_scores, use_early_scores
from vllm_adainfer.engine.pinned_artifacts import served_artifacts
from vllm_adainfer.engine.runner.adapters import StepAdapters
from vllm_adainfer.engine.segments.attention import StepAttention
from vllm_adainfer.engine.segments.segments import Stack, build_stack
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.loop.loop import Loop
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_states.interface import ModelState

logger = get_logger(__name__)


class EarlyExit(ModelHead):
    """Replaces the model's stack by a loop. Must precede the vLLM class in the MRO.

    Attributes:
        settings: the engine switch.
        artifacts: the artifact of each policy, by name.
        stack: the model's layers in segments.
        loop: the loop that runs the stack; the model runner builds it once the weights are loaded.
        graphs: the CUDA graphs of the segments; None if the runner has captured none.
        execution: how segments run; the self-test changes it where the fastest way is wrong.
        compacts_in_graphs: whether what is left of a batch may replay vLLM's piecewise graphs. Not
            where these read more of the step than states and positions: adapters, and the mask by
            which routers of mixtures leave out padding.
        exits_off: whether all rows run all layers, as the self-test has found exits to be wrong.
        prepared: the step that the next `forward` runs, the builder of its attention metadata, and
            its adapters with LoRA. The model runner sets it. None for a pass without requests.
        fingerprint: the fingerprint of the weights at start-up, which the policies were calibrated
            for; None if they did not pass `load_weights`.
        engine_options: how this engine runs them, as far as they do not show it.

    """

    artifacts: dict[str, Artifact]
    stack: Stack
    loop: Loop
    graphs: SegmentGraphs | None = None
    execution: Execution = Execution.SEGMENT_GRAPHS
    compacts_in_graphs: bool
    exits_off: bool = False
    fingerprint: str | None = None
    prepared: tuple[StepContext, StepAttention, StepAdapters | None] | None = None
    _replaced: frozenset[str] = frozenset()  # tensors that differ from those at start-up

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        options = engine_options_of(vllm_config)  # as at config time: models change their config
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = read_settings(vllm_config.additional_config)
        assert settings is not None, "the config hook selects this class only where it is set"
        self.settings = settings
        self.artifacts = served_artifacts(vllm_config, settings)
        self.engine_options = options
        self._dtype = vllm_config.model_config.dtype
        is_moe, has_adapters = vllm_config.model_config.is_moe, vllm_config.lora_config is not None
        self.compacts_in_graphs = not (is_moe or has_adapters)
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
        inactive until the weights of start-up are back, so whatever policies copied from the
        weights is right whenever it is used.
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
            self.check_calibrated(artifact.config)
        return loaded

    def check_calibrated(self, config: ArtifactConfig) -> None:
        """Check that a policy was calibrated for these weights, as this engine runs them."""
        config.check_options(self.engine_options)
        config.check_weights(self.fingerprint)

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
            use_early_scores(self, self._take_output, self._judge_later)
            for name, artifact in self.artifacts.items():
                check_scores(self, name, artifact.config)
        head_size = self.score.input_size if self._is_classifier else self._lm_head.embedding_dim
        self.stack = build_stack(self.decoder, self._body, head_size, cuts, vllm_config)
        return self.stack.shape

    @property
    def exit_points(self) -> tuple[int, ...]:
        """The exit points of all policies, of policies that adapters may bring, or of the script.

        Also the layer after which keys and values are shared, where unsampled tokens stop.
        """
        points = [artifact.config.all_exit_points for artifact in self.artifacts.values()]
        own, depth = self.num_own_kv_layers, len(self.decoder.layers(self._body))
        named = self.settings.fixed_exit_points(depth)
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
            return self.stack.run_all(positions, input_ids, with_last_kv=True)
        context = self.execution.applied_to(get_forward_context())
        if self.exits_off:
            with override_forward_context(context):
                return self.stack.run_all(positions, input_ids)
        step, attention, self._adapters = prepared
        compiled = CompiledBatch(
            self.stack,
            positions,
            context,
            attention,
            self.graphs,
            self._adapters,
            None if self._adapters is None else self._adapters.of_rows(step.layout),
            replays_parts=self.execution.replays_parts and self.compacts_in_graphs,
        )
        batch = compiled.replayed(step.layout) or compiled
        self._output = self.loop.run(batch, input_ids, step)
        return self._output.hidden
