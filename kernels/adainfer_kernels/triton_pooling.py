"""Triton backend of `pool`: two launches, nothing waits for the host.

scale_kernel  1 / rms of each row                             [rows]
pool_kernel   adds up a block of columns of a request's rows  [requests, hidden size], twice
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adainfer_kernels.pooling import EPS
from adainfer_kernels.triton_probe import rows_contiguous

# A request's rows are added one after another, so only its columns can be spread over the device,
# and a program hides the latency of memory by loading several rows ahead.
COLUMNS = 64
ROWS_AHEAD = 8


def pool(
    hidden: Tensor,
    residual: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    carried: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `adainfer_kernels.pool`; there is at least one request."""
    hidden = rows_contiguous(hidden)
    residual = None if residual is None else rows_contiguous(residual)
    rows, hidden_size = hidden.shape
    states = (hidden, residual, hidden.stride(0), 0 if residual is None else residual.stride(0))
    scale = hidden.new_empty(rows, dtype=torch.float32)
    last, sums = hidden.new_empty(2, len(starts), hidden_size, dtype=torch.float32)
    # Of all rows: to find out which ones belong to a request would take as long.
    scale_kernel[(rows,)](
        *states,
        scale,
        hidden_size,
        EPS,
        BLOCK_K=triton.next_power_of_2(hidden_size),
        num_warps=4 if hidden_size <= 4096 else 8,
    )
    pool_kernel[(len(starts), triton.cdiv(hidden_size, COLUMNS))](
        *states,
        scale,
        starts.contiguous(),
        ends.contiguous(),
        None if carried is None else carried.contiguous(),
        last,
        sums,
        hidden_size,
        BLOCK_K=COLUMNS,
        ROWS_AHEAD=ROWS_AHEAD,
        num_warps=1,
    )
    return last, sums


@triton.jit
def _state(hidden_ptr, residual_ptr, hidden_row_stride, residual_row_stride, row, k, inside):
    """Columns `k` of one row of the residual stream, rounded to its dtype, in fp32."""
    x = tl.load(hidden_ptr + row * hidden_row_stride + k, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_row_stride + k, mask=inside, other=0.0)
        x = (x + residual.to(tl.float32)).to(hidden_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def scale_kernel(
    hidden_ptr,
    residual_ptr,
    hidden_row_stride,
    residual_row_stride,
    scale_ptr,
    hidden_size,
    eps,
    BLOCK_K: tl.constexpr,
):
    """One program per row: what its normed state is a multiple of the state by."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x = _state(
        hidden_ptr, residual_ptr, hidden_row_stride, residual_row_stride, row, k, k < hidden_size
    )
    tl.store(scale_ptr + row, tl.rsqrt(tl.sum(x * x) / hidden_size + eps))


@triton.jit
def pool_kernel(
    hidden_ptr,
    residual_ptr,
    hidden_row_stride,
    residual_row_stride,
    scale_ptr,
    starts_ptr,
    ends_ptr,
    carried_ptr,
    last_ptr,
    sums_ptr,
    hidden_size,
    BLOCK_K: tl.constexpr,
    ROWS_AHEAD: tl.constexpr,
):
    """Program (request, block of columns): add up the request's normed rows, in their order."""
    request = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < hidden_size
    start = tl.load(starts_ptr + request)
    end = tl.load(ends_ptr + request)
    out = request * hidden_size + k
    sums = tl.zeros([BLOCK_K], tl.float32)
    if carried_ptr is not None:
        sums = tl.load(carried_ptr + out, mask=inside, other=0.0)
    for group in range(start, end, ROWS_AHEAD):
        for ahead in tl.static_range(ROWS_AHEAD):
            row = group + ahead
            # Past the end, the last row again, 0 times; it is finite, or the sums are NaN already.
            x = _state(
                hidden_ptr,
                residual_ptr,
                hidden_row_stride,
                residual_row_stride,
                tl.minimum(row, end - 1),
                k,
                inside,
            )
            sums = tl.fma(x, tl.load(scale_ptr + row, mask=row < end, other=0.0), sums)
    tl.store(sums_ptr + out, sums, mask=inside)
    x = _state(hidden_ptr, residual_ptr, hidden_row_stride, residual_row_stride, end - 1, k, inside)
    tl.store(last_ptr + out, x * tl.load(scale_ptr + end - 1), mask=inside)
