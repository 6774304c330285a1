"""Tensor parallelism: one decision for all ranks, made by the same policies."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.distributed import get_tp_group


def agreed(values: Tensor) -> Tensor:
    """`values` of the first rank, on each: every rank computes them, but may round otherwise."""
    ranks = get_tp_group()
    if ranks.world_size == 1:
        return values
    if values.dtype == torch.bool:  # which not every backend sends
        received: Tensor = ranks.broadcast(values.to(torch.uint8))
        return received.bool()
    return ranks.broadcast(values.contiguous())


def have_all(number: int, device: torch.device) -> bool:
    """Whether `number`, below 2**62, is the same on every rank."""
    numbers = get_tp_group().all_gather(torch.tensor([number], device=device), dim=0)
    return bool((numbers == number).all())
