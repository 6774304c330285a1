from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.utils import AttentionGroup

from vllm_adainfer.engine.compat import attention
from vllm_adainfer.engine.compat.attention import share_workspace
from vllm_adainfer.engine.segments.attention import StepAttention, with_own_builders
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.batch.layout import RowLayout


def cache_of(*names: list[str]) -> SimpleNamespace:
    """A KV cache with these layers in its groups."""
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=each) for each in names])


def test_a_backend_that_writes_keys_only_where_it_attends_is_refused():
    backend = SimpleNamespace(
        forward_includes_kv_cache_update=True, is_ssm=lambda: False, get_name=lambda: "HPC_ATTN"
    )
    group = SimpleNamespace(backend=backend, layer_names=["0"])
    with pytest.raises(AdaInferError, match="HPC_ATTN cannot write keys and values of rows"):
        with_own_builders([[group]], cache_of(["0"]), None, torch.device("cpu"))


@pytest.mark.parametrize("lacking", ["1", "2"])
def test_metadata_without_a_layer_of_the_cache_are_never_built(lacking):
    cached = [["0"], ["1", "2"]]
    groups = [
        [SimpleNamespace(layer_names=[name]) for name in names if name != lacking]
        for names in cached
    ]
    with pytest.raises(AssertionError, match=rf"no metadata would be built for \['{lacking}'\]"):
        with_own_builders(groups, cache_of(*cached), None, torch.device("cpu"))


class Builder:
    """Of FlashInfer's kind."""

    workspace = None

    def _get_workspace_buffer(self):
        self.workspace = self.workspace or object()
        return self.workspace

    def set_workspace_buffer(self, workspace):
        self.workspace = workspace


def groups_of(*builders: object) -> list[list[SimpleNamespace]]:
    return [[SimpleNamespace(metadata_builders=[builder])] for builder in builders]


def test_our_builders_use_the_workspace_of_the_runners():
    theirs, ours, plain = Builder(), [Builder(), Builder()], object()
    share_workspace(groups_of(plain, theirs), groups_of(ours[0], plain, ours[1]))
    assert {builder.workspace for builder in (theirs, *ours)} == {theirs.workspace}


@pytest.mark.parametrize("theirs", [(), (SimpleNamespace(),)], ids=["no builder", "no workspace"])
def test_ours_keep_to_themselves_where_the_runner_has_no_workspace(theirs):
    ours = Builder()
    share_workspace(groups_of(*theirs), groups_of(ours))
    assert ours.workspace is None


class Device:
    """Runs what is enqueued, in order, only when the host waits for it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.waits = 0

    def run_until(self, length: int) -> None:
        """Until so many are left."""
        while len(self.queue) > length:
            self.queue.pop(0)()

    def event(self, _: torch.device) -> Any:
        """In place of ``torch.Event``."""
        behind: list[Callable[[], object]] = []

        def synchronize() -> None:
            while any(entry is mark for mark in behind for entry in self.queue):
                self.waits += 1
                self.queue.pop(0)()

        def record() -> None:
            behind[:] = [lambda: None]
            self.queue.extend(behind)

        return SimpleNamespace(synchronize=synchronize, record=record)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch, "Event", device.event)
    return device


def attention_of(device: Device, backend: str) -> StepAttention:
    """Of two requests, with a builder that copies lengths from memory which it uses again."""

    class PlanningBuilder:
        requires_block_table_width = False

        def __init__(self, *_: Any) -> None:
            self.pinned = torch.zeros(2, dtype=torch.int32)

        def build(self, _: int, common: Any) -> torch.Tensor:
            lens = common.seq_lens_cpu_upper_bound
            self.pinned[: len(lens)] = lens
            planned = torch.zeros(len(lens), dtype=torch.int32)
            device.queue.append(lambda: planned.copy_(self.pinned[: len(planned)]))
            return planned

    kind = SimpleNamespace(
        forward_includes_kv_cache_update=False,
        is_ssm=lambda: False,
        get_name=lambda: backend,
        get_builder_cls=lambda: PlanningBuilder,
    )
    groups: Any = [[AttentionGroup(kind, ["0"], None, 0)]]  # type: ignore[arg-type]
    cpu, cache = torch.device("cpu"), cache_of(["0"])
    own = with_own_builders(groups, cache, None, cpu)  # type: ignore[arg-type]
    return StepAttention(own, [torch.zeros(2, 4, dtype=torch.int32)], [16], cpu)


def planned(step: StepAttention, *last_positions: int) -> Any:
    """What is built for a row of each request, at these positions."""
    rows = np.ones(len(last_positions), dtype=np.int64)
    return step.metadata(RowLayout(rows, np.array(last_positions)))[2]["0"]


def test_two_batches_that_are_built_in_a_row_each_get_their_own_numbers(device):
    """As where rows catch up in parts, or rejoin twice without a question between."""
    step = attention_of(device, "FLASHINFER")
    both = planned(step, 4, 8), planned(step, 3, 9)
    device.run_until(0)
    assert [each.tolist() for each in both] == [[5, 9], [4, 10]]


def test_the_second_is_not_waited_for_once_the_first_has_run(device):
    step = attention_of(device, "FLASHINFER")
    planned(step, 4, 8)
    device.run_until(0)  # as a question does
    planned(step, 3, 9)
    assert device.waits == 0


def test_other_backends_never_wait(device):
    step = attention_of(device, "FLASH_ATTN")
    planned(step, 4, 8)
    planned(step, 3, 9)
    assert (device.waits, len(device.queue)) == (0, 2)


def test_without_the_wait_the_first_gets_the_numbers_of_the_second(device, monkeypatch):
    """The stand-in shows what the wait is for."""
    monkeypatch.setattr(attention, "PINNED_MEMORY_REUSED", ())
    step = attention_of(device, "FLASHINFER")
    first, _ = planned(step, 4, 8), planned(step, 3, 9)
    device.run_until(0)
    assert first.tolist() == [4, 10]
