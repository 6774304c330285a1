"""Tensor parallelism: all ranks follow the first rank's decisions and serve the same policies."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_adainfer.engine.compat.communication import broadcast

RANKS_DIFFER = "ranks read different artifacts: is one being replaced? Try again"


def broadcast_from_rank0(values: Tensor) -> Tensor:
    """The first rank's `values`, on every rank: each computes them, but may round differently."""
    ranks = get_tp_group()
    if ranks.world_size == 1:
        return values
    if values.dtype == torch.bool:  # not every backend can send booleans
        return broadcast(ranks, values.to(torch.uint8)).bool()
    return broadcast(ranks, values.contiguous())


def same_on_all_ranks(number: int) -> bool:
    """Whether every rank passes the same `number`; a collective that every rank must call."""
    ranks = get_tp_group()
    numbers = [0] * ranks.world_size
    torch.distributed.all_gather_object(numbers, number, group=ranks.cpu_group)
    return all(other == number for other in numbers)
