"""Torch backend of `pool`, which CPUs use; see `triton_pooling` for GPUs.

It goes through the rows in blocks, so that memory does not grow with the batch, and carries the
sums on from block to block as `pool` does from call to call.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from adainfer_kernels.pooling import EPS

# Numbers in a block, 8 MiB in fp32, and in each part of it, which is normed while it is in the
# caches. On cores with 2 MiB of L2, half or twice as many are about as fast.
BLOCK_NUMBERS = 1 << 21
PART_NUMBERS = 1 << 18


@torch.no_grad()  # in-place writes cannot be differentiated
def pool(
    hidden: Tensor,
    residual: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `adainfer_kernels.pool`; there is at least one request."""
    first_rows, end_rows = starts.tolist(), ends.tolist()
    if 2 * (sum(end_rows) - sum(first_rows)) < end_rows[-1] - first_rows[0]:
        return pool(*_without_gaps(hidden, residual, starts, ends), carried)
    hidden_size = hidden.shape[1]
    last = hidden.new_empty(len(starts), hidden_size, dtype=torch.float32)
    sums = torch.zeros_like(last) if carried is None else carried.clone()
    edges = torch.stack([starts, ends], dim=1)
    block = max(1, BLOCK_NUMBERS // hidden_size)
    # One for all blocks: on a CPU, page faults of new memory cost more than the arithmetic.
    scratch = last.new_empty(min(block, end_rows[-1] - first_rows[0]), hidden_size)
    for low in range(first_rows[0], end_rows[-1], block):
        # The requests with rows in this block, and those of them that end in it.
        first, stop = bisect_right(end_rows, low), bisect_left(first_rows, low + block)
        ended = bisect_right(end_rows, low + block)
        if first == stop:
            continue
        rows = slice(max(low, first_rows[first]), min(low + block, end_rows[stop - 1]))
        normed = scratch[: rows.stop - rows.start]
        _write_normed(hidden[rows], None if residual is None else residual[rows], normed)
        bags = edges[first:stop].clamp(rows.start, rows.stop).sub_(rows.start)
        last_rows = bags[: ended - first, 1] - 1
        torch.index_select(normed, 0, last_rows, out=last[first:ended])
        normed[bags[:, 0]] += sums[first:stop]
        # Every other bag is what lies between two requests.
        members = torch.arange(len(normed), device=normed.device)
        sums[first:stop] = embedding_bag(members, normed, bags.view(-1), mode="sum")[::2]
    return last, sums


def _without_gaps(
    hidden: Tensor, residual: Tensor | None, starts: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The same requests without the rows between them."""
    lengths = ends - starts
    new_ends = lengths.cumsum(dim=0)
    new_starts = new_ends - lengths
    rows = torch.repeat_interleave(starts - new_starts, lengths)
    rows += torch.arange(len(rows), device=rows.device)
    return hidden[rows], None if residual is None else residual[rows], new_starts, new_ends


def _write_normed(hidden: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """Write the normed states to `out`, fp32 [rows, hidden size]."""
    rows, hidden_size = out.shape
    part = min(max(1, PART_NUMBERS // hidden_size), rows)
    summed = hidden.new_empty(part, hidden_size)
    for first in range(0, rows, part):
        state = hidden[first : first + part]
        if residual is not None:
            state = torch.add(state, residual[first : first + part], out=summed[: len(state)])
        x = out[first : first + part].copy_(state)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x *= length.square_().div_(hidden_size).add_(EPS).rsqrt_()
