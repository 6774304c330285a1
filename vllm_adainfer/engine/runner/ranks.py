"""Tensor parallelism: all ranks follow the first rank's decisions and serve the same policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_adainfer.arrays import AnyArray
from vllm_adainfer.engine.compat.runner import broadcast
from vllm_adainfer.transfers import HostCopy

T = TypeVar("T")
RANKS_DIFFER = "ranks read different artifacts: is one being replaced? Try again"


def broadcast_from_rank0(values: Tensor) -> Tensor:
    """The first rank's `values`, on every rank: each computes them, but may round differently."""
    ranks = get_tp_group()
    if ranks.world_size == 1:
        return values
    if values.dtype == torch.bool:  # not every backend can send booleans
        return broadcast(ranks, values.to(torch.uint8)).bool()
    return broadcast(ranks, values.contiguous())


def send_from_rank0(values: Tensor) -> HostCopy:
    """The first rank's `values` for the host of every rank, without waiting for them."""
    return HostCopy(broadcast_from_rank0(values))


def read_from_rank0(values: Tensor) -> AnyArray:
    """The first rank's `values` on the host of every rank, which waits for the device.

    Through pinned memory and an event: neither is a wait that vLLM's ``VLLM_GPU_SYNC_CHECK``
    reports, and no copy goes through memory that the driver must pin first.
    """
    return send_from_rank0(values).array()


def is_rank0() -> bool:
    """Whether this is the first rank, or the only one."""
    first: bool = get_tp_group().is_first_rank
    return first


def made_by_rank0(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, on every rank; a collective."""
    ranks = get_tp_group()
    if ranks.world_size == 1:
        return make()
    made = [make() if ranks.is_first_rank else None]
    torch.distributed.broadcast_object_list(made, ranks.first_rank, group=ranks.cpu_group)
    return cast(T, made[0])


def rows_of_all_ranks(part: Tensor) -> Tensor | None:
    """On the host of the first rank the rows of all ranks, as many of each; elsewhere None.

    A collective.
    """
    ranks, part = get_tp_group(), part.cpu().contiguous()
    if ranks.world_size == 1:
        return part
    parts = [torch.empty_like(part.view(torch.uint8)) for _ in range(ranks.world_size)]
    into = parts if ranks.is_first_rank else None
    torch.distributed.gather(part.view(torch.uint8), into, ranks.first_rank, ranks.cpu_group)
    return torch.cat(parts).view(part.dtype) if ranks.is_first_rank else None


def first_on_any_rank(text: str | None) -> str | None:
    """The first text that some rank passes, the same on all; a collective."""
    ranks = get_tp_group()
    texts: list[str | None] = [None] * ranks.world_size
    torch.distributed.all_gather_object(texts, text, group=ranks.cpu_group)
    return next((one for one in texts if one is not None), None)


def same_on_all_ranks(number: int) -> bool:
    """Whether every rank passes the same `number`; a collective that every rank must call."""
    ranks = get_tp_group()
    numbers = [0] * ranks.world_size
    torch.distributed.all_gather_object(numbers, number, group=ranks.cpu_group)
    return all(other == number for other in numbers)
