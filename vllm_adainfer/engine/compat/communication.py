"""Messages between ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def broadcast(ranks: Any, values: Tensor) -> Tensor:
    """The first rank's `values` on every rank of a vLLM group with several.

    `GroupCoordinator.broadcast` of vLLM 0.32 goes through torch's own NCCL communicator, a second
    one that would be made at the first exit. Its device communicator has the one that vLLM uses in
    the model; it is None where vLLM has turned that off.
    """
    communicator = ranks.device_communicator
    if getattr(communicator, "pynccl_comm", None) is None:
        sent: Tensor = ranks.broadcast(values)
        return sent
    received: Tensor = communicator.broadcast(values)
    return received
