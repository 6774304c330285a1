"""Build the loop of a loaded model from the settings and the artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_adainfer.artifact.artifact import Artifact, all_parts, digest_of
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.engine.compat.requests import request_group
from vllm_adainfer.engine.runner.ranks import (
    RANKS_DIFFER,
    read_from_rank0,
    same_on_all_ranks,
    send_from_rank0,
)
from vllm_adainfer.engine.segments.segments import Stack
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.kv.policies import ExactKV, RecurrentKV
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.forward_pass import COMPACTION_COST
from vllm_adainfer.exits.loop.loop import Loop
from vllm_adainfer.exits.loop.schedule import DecodeTimes
from vllm_adainfer.exits.recording.moments import TunedLensSums
from vllm_adainfer.exits.recording.recorder import Recorder, StateFiles
from vllm_adainfer.exits.recording.recording_loop import RecordingLoop
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.policy.script import ScriptedPolicy
from vllm_adainfer.promise.promise import Unit
from vllm_adainfer.settings.engine import DEFAULT_POLICY, Settings
from vllm_adainfer.watch.units import Grouping
from vllm_adainfer.watch.watch import Watch

# What a GPU multiplies in the time that it takes to compact a batch: by the data sheet and the
# budgets of `benchmarks/gpu_model.py`, an H100 takes some 160 us for it, and in these multiplies
# rows with 5e10 parameters.
COMPACTION_PRODUCTS = 50_000_000_000
# Of an H100, likewise: bytes of memory that it reads in a second; rows that are multiplied with a
# layer's weights in the time that these are read; a question's launches and the wait for it; and
# what vLLM's scheduler and runner do between two steps of some 64 requests.
READ_BYTES, READ_ROWS = 2.7e12, 240
QUESTION_SECONDS, BETWEEN_SECONDS = 60e-6, 1.2e-3


def build_loop(model: Any, vllm_config: VllmConfig) -> Loop:
    """The loop of a model, an `EarlyExit` whose weights are loaded."""
    settings, load_format = model.settings, vllm_config.load_config.load_format
    reads_weights = model.artifacts or settings.calibrates_itself
    if reads_weights and model.fingerprint is None and load_format != "dummy":
        raise AdaInferError(
            f"vllm-adainfer: --load-format {load_format} does not pass the weights through the "
            "model, so they cannot be compared with those of the calibration: set it to auto, or "
            'drop "adainfer" from additional_config'
        )
    if settings.record is not None:
        recorder = _recorder(settings.record, settings)
        shape = model.cut_stack(recorder.layers, vllm_config)
        return RecordingLoop(
            shape,
            recorder,
            keeps_states=vllm_config.model_config.is_hybrid,
            reads_prompts=settings.record_pooled_from is not None,
        )
    if not same_on_all_ranks(digest_of(model.artifacts)):
        raise AdaInferError(RANKS_DIFFER)
    return ExitLoop(
        model.cut_stack(model.exit_points, vllm_config),
        policies_of(model, model.exit_points),
        kv_policy_of(vllm_config),
        monitors_of(model),
        max_rows=vllm_config.scheduler_config.max_num_batched_tokens,
        min_rows_saved=settings.min_rows_saved,
        compaction_cost=compaction_cost_of(model.stack, model.device),
        read=read_from_rank0,
        send=send_from_rank0,
        decode_times=decode_times_of(model.stack, model.device),
    )


def compaction_cost_of(stack: Stack, device: torch.device) -> int:
    """The token-layers that a compacted batch must save, see `ExitLoop`.

    On a GPU an estimate from the layers' size; of a mixture all experts count.
    """
    if device.type == "cpu":
        return COMPACTION_COST
    parameters = sum(p.numel() for segment in stack.segments for p in segment.layers.parameters())
    return max(1, COMPACTION_PRODUCTS * stack.shape.depth // max(parameters, 1))


def decode_times_of(stack: Stack, device: torch.device) -> DecodeTimes | None:
    """What decode steps take on a GPU, see `ExitLoop`; None on a CPU, where no question waits."""
    if device.type == "cpu":
        return None
    size = sum(p.nbytes for segment in stack.segments for p in segment.layers.parameters())
    layer = size / stack.shape.depth / READ_BYTES
    return DecodeTimes(layer, READ_ROWS, QUESTION_SECONDS, BETWEEN_SECONDS)


def kv_policy_of(vllm_config: VllmConfig) -> ExactKV:
    """The KV policy that the model's layers need."""
    return RecurrentKV() if vllm_config.model_config.is_hybrid else ExactKV()


def policies_of(model: Any, cuts: tuple[int, ...]) -> PolicySet:
    """The policies of a model whose stack is cut after `cuts`."""
    exit_script = model.settings.exit_script
    if exit_script is not None:
        script = ScriptedPolicy(exit_script, model.hidden_size, model.device)
        return PolicySet({DEFAULT_POLICY: script}, cuts)
    return PolicySet(policies_of_artifacts(model.artifacts, model), cuts)


def policies_of_artifacts(artifacts: Mapping[str, Artifact], model: Any) -> dict[str, Policy]:
    """The policies of all parts of `artifacts`, by name."""
    return {
        name: Policy(artifact, model.device, model.logit_lens)
        for name, artifact in all_parts(artifacts).items()
    }


def monitors_of(model: Any) -> dict[str, Watch]:
    """The monitor of each policy, by name; empty without a shadow rate."""
    if not model.settings.compares:
        return {}
    parts = all_parts({name: artifact.config for name, artifact in model.artifacts.items()})
    return {name: monitor_of(config, model.settings) for name, config in parts.items()}


def monitor_of(config: ArtifactConfig, settings: Settings) -> Watch:
    """The watch of an artifact's promises, which a ledger judges where there is one."""
    epsilons = [level.epsilon for level in config.levels]
    if settings.calibrates_itself:  # each miss counts in its own step
        return Watch(epsilons, config.delta, closes=False)
    closes = not settings.compare
    watch = Watch(epsilons, config.delta, grouping_of(config), config.promise, closes)
    columns = {label.name: column for column, label in enumerate(config.labels)}
    watch.watch_labels({one: columns[one.label] for one in config.label_bounds})
    return watch


def grouping_of(config: ArtifactConfig) -> Grouping:
    """What counts once in the bounds of an artifact: an answer, a group of them, or a query."""
    promise = config.promise
    if promise.unit is Unit.QUERY:
        return Grouping(group_of=request_group, loses=promise.breaks)
    most = config.max_tokens * config.most_together
    if config.most_together == 1:
        return Grouping(most)
    return Grouping(most, request_group)


def _recorder(layers: tuple[int, ...], settings: Settings) -> Recorder:
    """The recorder for ``record``, which is `layers`, and what goes with it."""
    lens, states = settings.record_lens, settings.record_states
    sums = None if lens is None else TunedLensSums(layers[:-1], lens.folds, lens.prompts)
    files = None if states is None else StateFiles(states.directory, states.layers)
    return Recorder(layers, sums, files)
