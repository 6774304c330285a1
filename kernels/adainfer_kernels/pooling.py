"""Pooling: what a label head reads of a request's own tokens, not just of its last one.

    x      = hidden + residual, rounded to their dtype      (residual optional)
    normed = x / sqrt(mean(x^2) + EPS)
    last   = normed[end - 1]
    sums   = carried + normed[start] + ... + normed[end - 1]     (carried optional)

The rows of a request are added one after another, in ascending order. So its sums are the same bit
for bit alone and among others, and in one call and in several that carry them on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adainfer_kernels.backend import Backend, load_backend
from adainfer_kernels.parameters import Norm, check_shape
from adainfer_kernels.probe import readout

EPS = 1e-6


@dataclass(frozen=True)
class Pooled:
    """What `pool` returns, one row per request.

    Attributes:
        last: fp32 [requests, hidden size], the normed state of the request's last row.
        sums: fp32 [requests, hidden size], the sum of its normed states, earlier chunks included.

    """

    last: Tensor
    sums: Tensor


def pool(
    hidden: Tensor,
    residual: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    carried: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Pooled:
    """Sum the RMS-normed states of each request's rows, in fp32 and in ascending order.

    Args:
        hidden: [rows, hidden size], fp32, fp16 or bf16; rows may be strided.
        residual: like `hidden`, added to it and rounded to its dtype; None means zeros.
        starts: int64 [requests], each request's first row.
        ends: int64 [requests], one past its last row. Requests are in ascending order, do not
            overlap and have at least one row each; this is not checked, as a GPU would have to
            wait for it. Rows between them belong to none, and may hold anything.
        carried: fp32 [requests, hidden size], `Pooled.sums` of each request's earlier rows; None
            means zeros.
        backend: "triton", "torch", or "auto": Triton on a GPU, else torch.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        RuntimeError: the requested backend cannot run.

    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [rows, hidden size], got {list(hidden.shape)}")
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"hidden must be fp32, fp16 or bf16, got {hidden.dtype}")
    if starts.dim() != 1:
        raise ValueError(f"starts must be [requests], got {list(starts.shape)}")
    requests, hidden_size = len(starts), hidden.shape[1]
    check_shape("residual", residual, *hidden.shape)
    check_shape("ends", ends, requests)
    check_shape("carried", carried, requests, hidden_size)
    _check_dtype("residual", residual, hidden.dtype)
    _check_dtype("starts", starts, torch.int64)
    _check_dtype("ends", ends, torch.int64)
    _check_dtype("carried", carried, torch.float32)
    pooling = load_backend(backend, hidden.device, "pooling")
    if requests == 0:
        nothing = hidden.new_empty(0, hidden_size, dtype=torch.float32)
        return Pooled(nothing, nothing)
    return Pooled(*pooling.pool(hidden, residual, starts, ends, carried))


def _check_dtype(name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
    if tensor is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def normed(states: Tensor) -> Tensor:
    """fp32 [rows, hidden size], the states [rows, hidden size] as `pool` norms them."""
    return readout(states, Norm("rms", eps=EPS), dtype=torch.float32)
