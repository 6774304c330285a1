"""Launch shapes of the score kernel: fixed for Hopper, chosen by the autotuner elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LaunchShape(NamedTuple):
    """The score kernel's tile (head rows, batch rows, hidden elements) and how it is run.

    `num_stages` is the number of tiles in flight in a program (software pipelining).
    """

    block_v: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


# Keyed by the most batch rows that a shape serves. Up to 64 rows, reading the head is the
# bottleneck, so the shapes keep at least 64 KiB of it in flight per multiprocessor; beyond that,
# the tensor cores are.
HOPPER = {
    16: LaunchShape(64, 16, 128, num_warps=4, num_stages=4),
    32: LaunchShape(64, 32, 128, num_warps=4, num_stages=4),
    64: LaunchShape(128, 64, 64, num_warps=4, num_stages=4),
    128: LaunchShape(128, 128, 64, num_warps=8, num_stages=4),
}
MAX_ROWS = max(HOPPER)  # larger batches run in blocks of this many rows

# On other GPUs, the first call with new sizes times these, and Triton keeps the winner on disk.
AUTOTUNED = (
    *HOPPER.values(),
    LaunchShape(64, 16, 64, num_warps=4, num_stages=3),
    LaunchShape(128, 16, 64, num_warps=4, num_stages=3),
    LaunchShape(64, 32, 64, num_warps=4, num_stages=3),
    LaunchShape(64, 64, 64, num_warps=4, num_stages=3),
    LaunchShape(128, 64, 64, num_warps=8, num_stages=3),
)

# A small head makes few programs, so latency is the bottleneck: small tiles, deep pipelines.
SMALL_HEAD_SIZE = 1024
SMALL_HEAD = LaunchShape(16, 16, 256, num_warps=2, num_stages=4)
# The only fp32 heads are fitted label heads; fp32 multiplies without tensor cores.
FP32_HEAD = LaunchShape(16, 16, 64, num_warps=4, num_stages=3)
# The interpreter's time depends on the number of tile operations, not on their size.
INTERPRETED = LaunchShape(1024, 64, 256, num_warps=4, num_stages=1)

# Two programs on a multiprocessor hide each other's reductions.
PARTS_PER_MULTIPROCESSOR = 2


def parts_of(size: int, multiprocessors: int) -> int:
    """Number of parts of a head of `size` rows: enough to fill the device at one batch row."""
    smallest = SMALL_HEAD.block_v if size <= SMALL_HEAD_SIZE else 64
    return min(-(-size // smallest), PARTS_PER_MULTIPROCESSOR * multiprocessors)


def fixed_shape(
    rows: int, size: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> LaunchShape | None:
    """Launch shape for `rows` readouts and a head of `size` rows; None means to autotune.

    `capability` is the device's CUDA compute capability, None for Triton's interpreter.
    """
    if size <= SMALL_HEAD_SIZE:
        return FP32_HEAD if dtype == torch.float32 else SMALL_HEAD
    if capability is None:
        return INTERPRETED
    if dtype == torch.float32:
        return FP32_HEAD
    return HOPPER[row_bucket(rows)] if capability[0] == 9 else None


def rows_to_compile_for(max_rows: int) -> list[int]:
    """Row counts up to `max_rows` that cover everything Triton compiles or tunes separately.

    That is each bucket (see `row_bucket`) and, within it, 1, multiples of 16, and the rest.
    """
    edges = {1, 2, *(rows for bucket in HOPPER for rows in (bucket - 1, bucket))}
    return sorted({min(rows, max_rows) for rows in edges})


def row_bucket(rows: int) -> int:
    """The key of `HOPPER` that covers `rows`."""
    return next((bucket for bucket in HOPPER if rows <= bucket), MAX_ROWS)
