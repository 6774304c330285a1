"""Launch shapes of the score kernel: fixed for Hopper, candidates for the autotuner elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LaunchShape(NamedTuple):
    """How the score kernel tiles its work.

    Attributes:
        block_v: rows of the head in a tile.
        block_r: rows of the batch in a tile.
        block_k: hidden elements in a tile.
        num_warps: warps of a program.
        num_stages: tiles in flight (software pipelining).

    """

    block_v: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


# Keyed by the most rows a shape is for. Up to 64 rows, reading the head is the bottleneck, so the
# shapes keep at least 64 KiB of it in flight on a multiprocessor; beyond, the tensor cores are.
HOPPER = {
    16: LaunchShape(64, 16, 128, num_warps=4, num_stages=4),
    32: LaunchShape(64, 32, 128, num_warps=4, num_stages=4),
    64: LaunchShape(128, 64, 64, num_warps=4, num_stages=4),
    128: LaunchShape(128, 128, 64, num_warps=8, num_stages=4),
}
MOST_ROWS = max(HOPPER)  # larger batches run in blocks of this many rows

# On other GPUs, the first call with new sizes times these, and Triton keeps the winner on disk.
CANDIDATES = (
    *HOPPER.values(),
    LaunchShape(64, 16, 64, num_warps=4, num_stages=3),
    LaunchShape(128, 16, 64, num_warps=4, num_stages=3),
    LaunchShape(64, 32, 64, num_warps=4, num_stages=3),
    LaunchShape(64, 64, 64, num_warps=4, num_stages=3),
    LaunchShape(128, 64, 64, num_warps=8, num_stages=3),
)

# Few candidates make few programs, so latency is the bottleneck: small tiles, deep pipelines.
FEW_CANDIDATES = 1024
FEW = LaunchShape(16, 16, 256, num_warps=2, num_stages=4)
# The only fp32 heads are fitted label heads; fp32 multiplies without tensor cores.
FP32 = LaunchShape(16, 16, 64, num_warps=4, num_stages=3)
# The interpreter's time goes by operations on tiles, not by elements.
INTERPRETED = LaunchShape(1024, 64, 256, num_warps=4, num_stages=1)

# Tile of the shortlist kernel: candidates of one row x hidden elements.
SHORTLIST_BLOCK_V = 8
SHORTLIST_BLOCK_K = 512

# Two programs on a multiprocessor hide each other's reductions.
PARTS_PER_MULTIPROCESSOR = 2


def parts_of(size: int, multiprocessors: int) -> int:
    """How many programs share a head of `size` rows: enough to fill the device even at one row."""
    smallest = FEW.block_v if size <= FEW_CANDIDATES else 64
    return min(-(-size // smallest), PARTS_PER_MULTIPROCESSOR * multiprocessors)


def fixed_shape(
    rows: int, size: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> LaunchShape | None:
    """Launch shape for `rows` readouts and a head of `size` rows; None means autotune.

    `capability` is the device's CUDA compute capability, None for Triton's interpreter.
    """
    if size <= FEW_CANDIDATES:
        return FP32 if dtype == torch.float32 else FEW
    if capability is None:
        return INTERPRETED
    if dtype == torch.float32:
        return FP32
    return HOPPER[row_bucket(rows)] if capability[0] == 9 else None


def rows_to_compile_for(most: int) -> list[int]:
    """Row counts up to `most`, after which no other makes Triton compile (or tune) anew.

    Beside the bucket it tells apart 1, multiples of 16, and the rest.
    """
    edges = {1, 2, *(rows for bucket in HOPPER for rows in (bucket - 1, bucket))}
    return sorted({min(rows, most) for rows in edges})


def row_bucket(rows: int) -> int:
    """The key of `HOPPER` that covers `rows`."""
    return next((most for most in HOPPER if rows <= most), MOST_ROWS)
