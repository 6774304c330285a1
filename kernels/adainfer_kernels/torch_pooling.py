"""Torch backend of `pool`, which CPUs use; see `triton_pooling` for GPUs.

It goes through the rows in blocks whose fp32 states fit the cache, and carries the sums on from
block to block as `pool` does from call to call.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from adainfer_kernels.pooling import EPS

BLOCK_NUMBERS = 1 << 20


@torch.no_grad()  # in-place writes cannot be differentiated
def pool(
    hidden: Tensor,
    residual: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `adainfer_kernels.pool`; there is at least one request."""
    hidden, residual, starts, ends = _without_large_gaps(hidden, residual, starts, ends)
    requests, hidden_size = len(starts), hidden.shape[1]
    last = hidden.new_empty(requests, hidden_size, dtype=torch.float32)
    sums = torch.zeros_like(last) if carried is None else carried.clone()
    first_rows, end_rows = starts.tolist(), ends.tolist()
    block = max(1, BLOCK_NUMBERS // hidden_size)
    # One allocation for all blocks: on a CPU page faults would cost more than the arithmetic.
    scratch = last.new_empty(2, min(block, end_rows[-1] - first_rows[0]), hidden_size)
    for low in range(first_rows[0], end_rows[-1], block):
        # The requests with rows in this block, and those of them that end in it.
        first, stop = bisect_right(end_rows, low), bisect_left(first_rows, low + block)
        ended = bisect_right(end_rows, low + block)
        if first == stop:
            continue
        here = slice(first, stop)
        rows = slice(max(low, first_rows[first]), min(low + block, end_rows[stop - 1]))
        normed = _normed(hidden[rows], None if residual is None else residual[rows], scratch)
        start = starts[here].clamp(min=rows.start) - rows.start
        end = ends[here].clamp(max=rows.stop) - rows.start
        last[first:ended] = normed[end[: ended - first] - 1]
        normed[start] += sums[here]
        # Every other bag is what lies between two requests.
        bags = torch.stack([start, end], dim=1).view(-1)
        members = torch.arange(len(normed), device=normed.device)
        sums[here] = embedding_bag(members, normed, bags, mode="sum")[::2]
    return last, sums


def _without_large_gaps(
    hidden: Tensor, residual: Tensor | None, starts: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The same requests, moved together if most rows from the first to the last are nobody's."""
    lengths = ends - starts
    new_ends = lengths.cumsum(dim=0)
    if 2 * new_ends[-1] >= ends[-1] - starts[0]:
        return hidden, residual, starts, ends
    new_starts = new_ends - lengths
    rows = torch.repeat_interleave(starts - new_starts, lengths)
    rows += torch.arange(len(rows), device=rows.device)
    return hidden[rows], None if residual is None else residual[rows], new_starts, new_ends


def _normed(hidden: Tensor, residual: Tensor | None, scratch: Tensor) -> Tensor:
    """The normed states, in the first part of `scratch`, fp32 [2, rows or more, hidden size]."""
    x, converted = scratch[:, : len(hidden)]
    x.copy_(hidden)
    if residual is not None:
        x += converted.copy_(residual)  # adding another dtype would allocate its copy
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x *= length.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
    return x
