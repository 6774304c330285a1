"""Triton twin of `torch_probe`: launches the kernels of `triton_kernels`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from adainfer_kernels import triton_kernels, tuning
from adainfer_kernels.result import ProbeResult


def _config(shape: tuning.LaunchShape) -> triton.Config:
    blocks = {"BLOCK_V": shape.block_v, "BLOCK_R": shape.block_r, "BLOCK_K": shape.block_k}
    return triton.Config(blocks, num_warps=shape.num_warps, num_stages=shape.num_stages)


_autotuned_score_kernel = triton.autotune(
    [_config(shape) for shape in tuning.CANDIDATES],
    key=["ROWS_UP_TO", "size", "hidden_size"],
    cache_results=True,
)(triton_kernels.score_kernel)


def readout(
    hidden: Tensor,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    lens_weight: Tensor | None,
    lens_up: Tensor | None,
    lens_bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `adainfer_kernels.readout`; products with the lens are torch's."""
    hidden = _rows_contiguous(hidden)
    rows, hidden_size = hidden.shape
    out = torch.empty(rows, hidden_size, dtype=dtype, device=hidden.device)
    if rows == 0:
        return out
    change = None if lens_weight is None else hidden.to(lens_weight.dtype) @ lens_weight
    if change is not None and lens_up is not None:
        change = change @ lens_up
    triton_kernels.readout_kernel[(rows,)](
        hidden,
        change,
        _contiguous(lens_bias),
        _contiguous(norm_weight),
        _contiguous(norm_bias),
        out,
        hidden_size,
        hidden.stride(0),
        norm_eps,
        RMS=norm == "rms",
        LAYER=norm == "layer",
        BLOCK_K=triton.next_power_of_2(hidden_size),
        num_warps=4 if hidden_size <= 4096 else 8,
    )
    return out


def score(
    readout: Tensor,
    head_weight: Tensor,
    candidates: Tensor | None,
    head_bias: Tensor | None,
    soft_cap: float | None,
    scale: float,
    classifier: Tensor | None,
    threshold: Tensor | None,
    return_scores: bool,
    shape: tuning.LaunchShape | None = None,
) -> ProbeResult:
    """Score readouts [rows, hidden size] with a head (packed if `candidates` is 1-D) and reduce.

    `shape` overrides the tuning table.
    """
    readout = _rows_contiguous(readout)
    rows, hidden_size = readout.shape
    shortlist = candidates is not None and candidates.dim() == 2
    size = head_weight.shape[0] if candidates is None else candidates.shape[-1]
    if shortlist:
        parts = triton.cdiv(size, tuning.SHORTLIST_BLOCK_V)
    else:
        parts = tuning.parts_of(size, _multiprocessors(readout.device))

    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device=readout.device)

    result = ProbeResult(
        top1_id=new(rows, dtype=torch.int64),
        top1=new(rows),
        top2=new(rows),
        lse=new(rows),
        settled=None if classifier is None else new(rows, dtype=torch.bool),
        scores=new(rows, size) if return_scores else None,
    )
    if rows == 0:
        return result
    scratch: tuple[Tensor | None, Tensor | None] = (None, None)
    if parts > 1:
        scratch = (new(3, rows, parts), new(rows, parts, dtype=torch.int32))
    ends = (
        result.top1_id,
        result.top1,
        result.top2,
        result.lse,
        result.settled,
        _contiguous(classifier),
        _contiguous(threshold),
    )
    arguments = (
        readout,
        head_weight,
        _contiguous(candidates),
        _contiguous(head_bias),
        soft_cap,
        scale,
        result.scores,
        *scratch,
        *ends,
        rows,
        size,
        hidden_size,
        readout.stride(0),
        head_weight.stride(0),
        head_weight.stride(1),
        parts,
    )
    if shortlist:
        triton_kernels.shortlist_kernel[(rows, parts)](
            *arguments,
            head_weight.shape[0],
            WHOLE=parts == 1,
            BLOCK_V=tuning.SHORTLIST_BLOCK_V,
            BLOCK_K=tuning.SHORTLIST_BLOCK_K,
        )
    else:
        _launch_score(arguments, rows, size, parts, head_weight, shape)
    if parts > 1:
        triton_kernels.finish_kernel[(rows,)](
            *scratch, *ends, rows, parts, BLOCK_P=triton.next_power_of_2(parts)
        )
    return result


def _launch_score(
    arguments: tuple[Any, ...],
    rows: int,
    size: int,
    parts: int,
    head_weight: Tensor,
    shape: tuning.LaunchShape | None,
) -> None:
    """Launch with `shape`, the tuning table's, or the one that autotuning finds."""

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_R"]), parts

    interpreted = head_weight.device.type == "cpu"
    capability = None if interpreted else torch.cuda.get_device_capability(head_weight.device)
    shape = shape or tuning.fixed_shape(rows, size, head_weight.dtype, capability)
    fixed = {
        "ROWS_UP_TO": tuning.row_bucket(rows),
        "WHOLE": parts == 1,
        "WIDEN": interpreted and head_weight.dtype == torch.bfloat16,
    }
    if shape is None:
        _autotuned_score_kernel[grid](*arguments, **fixed)
    else:
        triton_kernels.score_kernel[grid](*arguments, **fixed, **_config(shape).all_kwargs())


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """Rows may lie apart, a row's elements may not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
