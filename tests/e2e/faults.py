"""Faults that would give wrong answers, and the parts that the self-test finds them in.

Some are those that a desk check of the GPU path found in earlier versions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.e2e.asking import tokens
from tests.e2e.oracle import continuation, same
from tests.e2e.scripted import parts
from tests.tiny import LAYERS
from vllm_adainfer.engine.compat import attention as slots
from vllm_adainfer.engine.cuda_graphs.decode_buffers import DecodeBuffers
from vllm_adainfer.engine.model.batch import CompiledBatch
from vllm_adainfer.engine.segments import attention
from vllm_adainfer.engine.segments.attention import StepAttention
from vllm_adainfer.engine.self_test.self_test import self_test
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.forward_pass import ForwardPass

Patch = pytest.MonkeyPatch


def found(llm: Any) -> list[str]:
    """The parts that fail."""
    _, runner, _ = parts(llm)
    return [failure.part for failure in self_test(runner).failures]


def answers_are_right(llm: Any, reference: Any) -> bool:
    """Three tokens after each of three prompts are those of full depth in transformers."""
    generator = np.random.default_rng(5)
    prompts = [generator.integers(5, 1000, size).tolist() for size in (4, 9, 2)]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    found = tokens(llm, prompts, params)
    llm.reset_prefix_cache()
    return all(
        same(answer, continuation(reference, prompt, 3, LAYERS))
        for prompt, answer in zip(prompts, found, strict=True)
    )


def next_row(patch: Patch) -> None:
    """Those that stay are taken from the rows beside theirs."""
    regroup = RowLayout.regroup

    def shifted(self: RowLayout, *args: Any) -> tuple[RowLayout, Any]:
        layout, rows = regroup(self, *args)
        return layout, np.roll(rows, 1)

    patch.setattr(RowLayout, "regroup", shifted)


def next_slot(patch: Patch) -> None:
    """Keys and values of a compacted batch go to the slot beside theirs."""
    patch.setattr(attention, "slots_of", lambda *args: slots.slots_of(*args) + 1)


def nobody_rejoins(patch: Patch) -> None:
    """Rows that wait are forgotten."""
    patch.setattr(ExactKV, "waiting", lambda *_: None)


def rejoin_in_reverse(patch: Patch) -> None:
    """Rows that waited take each other's place."""
    rejoin = ExactKV.rejoin

    def reversed_rows(self: ExactKV, *args: Any) -> Any:
        states, policies = rejoin(self, *args)
        return states.rows(torch.arange(states.num_rows - 1, -1, -1)), policies

    patch.setattr(ExactKV, "rejoin", reversed_rows)


def no_last_kv(patch: Patch) -> None:
    """Tokens that yield nothing leave no keys and values in the last layer."""
    patch.setattr(CompiledBatch, "write_last_kv", lambda *_: None)


def short_sequences(patch: Patch) -> None:
    """A compacted batch does not attend to the last tokens."""
    metadata_of = attention.metadata_of

    def shortened(*groups: Any, seq_lens: Any, seq_lens_cpu: Any, **rest: Any) -> Any:
        lens = (seq_lens - 1).clamp(min=1)
        return metadata_of(*groups, seq_lens=lens, seq_lens_cpu=lens, **rest)

    patch.setattr(attention, "metadata_of", shortened)


def metadata_of_the_step(patch: Patch) -> None:
    """A compacted batch attends as the step's first rows do."""
    metadata = StepAttention.metadata

    def of_first_rows(self: StepAttention, layout: RowLayout) -> Any:
        first = np.arange(len(layout.present))
        lens = np.zeros_like(layout.query_lens)
        lens[first] = layout.query_lens[layout.present]
        last = layout.last_positions.copy()
        last[first] = layout.last_positions[layout.present]
        return metadata(self, RowLayout(lens, last))

    patch.setattr(StepAttention, "metadata", of_first_rows)


def not_a_number(patch: Patch) -> None:
    """A compacted batch runs into a NaN."""
    select = ForwardPass._select

    def with_nan(self: ForwardPass, *args: Any) -> None:
        select(self, *args)
        if self.states.hidden.is_floating_point():
            self.states = replace(self.states, hidden=self.states.hidden * torch.nan)

    patch.setattr(ForwardPass, "_select", with_nan)


def no_backend(patch: Patch) -> None:
    """The backend cannot build metadata of a compacted batch."""

    def refused(*_: Any) -> Any:
        raise RuntimeError("no such shape")

    patch.setattr(StepAttention, "metadata", refused)


FAULTS_OF_EXITS = (
    next_row,
    next_slot,
    nobody_rejoins,
    rejoin_in_reverse,
    no_last_kv,
    short_sequences,
    metadata_of_the_step,
    not_a_number,
    no_backend,
)


def unstaged(name: str) -> Callable[[Patch], None]:
    """A batch does not put this into the graphs' buffers."""

    def put_back(patch: Patch) -> None:
        stage = DecodeBuffers.stage

        def without(self: DecodeBuffers, *args: Any) -> None:
            part = getattr(self, name)
            before = [one.clone() for one in part] if isinstance(part, list) else part.clone()
            stage(self, *args)
            for one, was in zip(part, before, strict=True):
                one.copy_(was)

        patch.setattr(DecodeBuffers, "stage", without)

    put_back.__name__ = f"unstaged{name}"
    return put_back


def padding_has_a_slot(patch: Patch) -> None:
    """Padded rows write keys and values where the first row has its own."""
    stage = DecodeBuffers.stage

    def with_slots(self: DecodeBuffers, layout: RowLayout, attention: Any, padded: int) -> None:
        stage(self, layout, attention, padded)
        self._slots[:, layout.num_rows : padded] = self._slots[:, :1]

    patch.setattr(DecodeBuffers, "stage", with_slots)


def captured_over_its_input(patch: Patch) -> None:
    """A segment's graph was captured on top of the memory that it reads."""
    load = DecodeBuffers.load

    def overwritten(self: DecodeBuffers, segment: int, states: HiddenStates) -> None:
        load(self, segment, states)
        if segment:
            self._after[segment - 1].hidden.mul_(0.5)

    patch.setattr(DecodeBuffers, "load", overwritten)


FAULTS_OF_GRAPHS = (
    *map(unstaged, ("positions", "_seq_lens", "_slots", "_tables")),
    padding_has_a_slot,
    captured_over_its_input,
)
