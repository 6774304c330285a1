"""Launches, uploads and reads of the parts of a step, counted on a CPU: for tests and a model."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.launches import Launches, counted
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Label, Level
from vllm_adainfer.artifact.outputs import Labels
from vllm_adainfer.engine.cuda_graphs.decode_buffers import DecodeBuffers
from vllm_adainfer.engine.segments.attention import StepAttention
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.forward_pass import COMPACTION_COST
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.promise.changed import Changed

CPU = torch.device("cpu")
WIDTH, LAYERS = 64, 6
EXIT_POINTS = (2, 3, 5)
NEVER, ALWAYS = 9.0, -9.0  # thresholds of a gap
BLOCK = 16  # tokens


class Layers:
    """In place of the layers, which are not counted: two tensors of ones, the last time one."""

    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        """The states after a segment, with the residual apart."""
        hidden = torch.ones(len(states.hidden), WIDTH)
        return HiddenStates(hidden, None if segment == len(EXIT_POINTS) else hidden)

    def compact(self, layout: RowLayout, last_layer_only: bool = False) -> Layers:
        """Attention metadata and graphs are counted apart."""
        return self

    side_batch = compact

    def write_last_kv(self, states: HiddenStates) -> None:
        """Is the layers' work."""


def label_policy(threshold: float) -> Policy:
    """Label heads that settle a row where its gap reaches `threshold`."""
    labels = tuple(Label(name=name, token_id=token) for token, name in enumerate("ab"))
    config = ArtifactConfig(
        base_model="toy",
        architecture="LlamaForCausalLM",
        layers=LAYERS,
        hidden_size=WIDTH,
        vocab_size=99,
        weights_fingerprint="",
        exit_points=EXIT_POINTS,
        probe="label-head",
        output=Labels(labels=labels),
        promise=Changed(),
        features=("top_prob", "gap"),
        classifier="svm",
        epsilon=0.05,
        delta=0.1,
        levels=(Level(epsilon=0.05, disagreement=0, risk=0, bound=0.04, layers_saved=0.2),),
    )
    tensors = {"thresholds": torch.full((1, len(EXIT_POINTS)), threshold)}
    for layer in EXIT_POINTS:
        tensors[f"exit.{layer}.classifier"] = torch.tensor([0.0, 1.0, 0.0])
        tensors[f"exit.{layer}.head_weight"] = torch.eye(2, WIDTH)
        tensors[f"exit.{layer}.head_bias"] = torch.zeros(2)
    return Policy(Artifact(config, tensors), CPU)


def staging(groups: int) -> tuple[Launches, DecodeBuffers, list[Tensor]]:
    """Put three requests into the buffers of a graph for four, with so many KV cache groups."""
    tables = [torch.randint(0, 99, (8, 12), dtype=torch.int32) for _ in range(groups)]
    buffers = DecodeBuffers(8, tables, CPU)
    attention = StepAttention([], tables, [BLOCK] * groups, CPU)
    layout = RowLayout(np.array([1, 0, 1, 1, 0]), np.array([7, 8, 30, 100, 5]))
    with counted() as device:
        buffers.stage(layout, attention, 4)
    return device, buffers, tables


def compacted_batch(groups: int) -> Launches:
    """Slots and tables of a compacted batch; what each backend's builder launches comes on top."""
    tables = [torch.randint(0, 99, (8, 12), dtype=torch.int32) for _ in range(groups)]
    attention = StepAttention([[] for _ in tables], tables, [BLOCK] * groups, CPU)
    with counted() as device:
        attention.metadata(RowLayout(np.array([5, 0, 3]), np.array([7, 8, 30])))
    return device


def step_of(rows: int, full_depth: int = 0) -> StepContext:
    """A decode step of `rows` requests, of which the first `full_depth` may not exit."""
    threshold_rows = np.zeros(rows, dtype=np.int64)
    threshold_rows[:full_depth] = -1
    return StepContext(
        request_ids=list(map(str, range(rows))),
        layout=RowLayout(np.ones(rows, dtype=np.int64), np.full(rows, 30)),
        yields_token=np.ones(rows, dtype=bool),
        threshold_rows=threshold_rows,
        continues=np.zeros(rows, dtype=bool),
    )


def loop_of(threshold: float, rows: int, **changes: Any) -> ExitLoop:
    """A loop whose only policy has this threshold."""
    segments = np.diff([0, *EXIT_POINTS, LAYERS]).tolist()
    policies = PolicySet({"labels": label_policy(threshold)}, EXIT_POINTS)
    shape = StackShape(segments, WIDTH)
    return ExitLoop(shape, policies, ExactKV(), {}, max_rows=rows, **changes)


def decode_step(
    threshold: float, rows: int = 16, full_depth: int = 0, compaction_cost: int = COMPACTION_COST
) -> Launches:
    """The launches of a decode step beside its layers, see `step_of` and `loop_of`."""
    reading = Launches()
    loop = loop_of(threshold, rows, compaction_cost=compaction_cost, read=reading.read)
    step, ids = step_of(rows, full_depth), torch.zeros(rows, dtype=torch.int64)
    kernels = mock.patch("adainfer_kernels.backend.resolve_backend", return_value="triton")
    with kernels, counted() as device:
        loop.run(Layers(), ids, step)
    del device.kernels["aten::ones"]  # the layers
    device.reads += reading.reads
    return device
