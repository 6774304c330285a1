"""Ranks that each hold a part of the LM head find what a rank with all of it finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from adainfer_kernels import Head
from torch import Tensor

from vllm_adainfer.engine.runner import ranks
from vllm_adainfer.policy.probe import Probe


@pytest.mark.parametrize("bounds", [[0, 50, 101], [0, 2, 40, 101]], ids=["two ranks", "three"])
def test_probes_of_shards_join_to_the_probe_of_all(bounds):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(101, 16, generator=generator)
    head[70] = head[3]  # a tie between two ranks: the lower id wins
    hidden = torch.randn(40, 16, generator=generator)
    hidden[0] = 3 * head[3]
    whole = Probe(Head(head)).score(hidden)
    spans = list(itertools.pairwise(bounds))
    parts: list[Tensor] = []

    def on_rank(gather: Callable[[Tensor], Tensor], first: int, end: int):
        return Probe(
            Head(head[first:end]), token_ids=torch.arange(first, end), gather=gather
        ).score(hidden)

    for first, end in spans:  # what each rank would send
        on_rank(lambda part: parts.append(part) or part[None], first, end)
    for first, end in spans:
        joined = on_rank(lambda _: torch.stack(parts), first, end)
        assert joined.top1_id.tolist() == whole.top1_id.tolist()
        torch.testing.assert_close(joined.features, whole.features)


NCCL = {
    "no NCCL": None,
    "NCCL": SimpleNamespace(disabled=False),
    "disabled NCCL": SimpleNamespace(disabled=True),  # as vLLM has it with VLLM_DISABLE_PYNCCL=1
}


@pytest.mark.parametrize("nccl", NCCL.values(), ids=NCCL)
@pytest.mark.parametrize("values", [[True, False], [0.5, 2.0]], ids=["decisions", "scores"])
def test_every_rank_takes_the_values_of_the_first(monkeypatch, values, nccl):
    """By vLLM's own NCCL communicator, where there is one that works."""
    first = torch.tensor(values)
    works = nccl is not None and not nccl.disabled

    def broadcast(tensor: Tensor) -> Tensor:
        return first.to(tensor.dtype)

    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError("a second communicator, or one that is disabled")

    group = SimpleNamespace(
        world_size=2,
        broadcast=refuse if works else broadcast,
        device_communicator=SimpleNamespace(
            broadcast=broadcast if works else refuse, pynccl_comm=nccl
        ),
    )
    monkeypatch.setattr(ranks, "get_tp_group", lambda: group)
    assert ranks.broadcast_from_rank0(torch.zeros_like(first)).tolist() == values
