"""Triton twin of `torch_probe`: launches the kernels of `triton_kernels`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from adainfer_kernels import triton_kernels, tuning
from adainfer_kernels.parameters import Head, Lens, Norm
from adainfer_kernels.result import ProbeResult


def _config(shape: tuning.LaunchShape) -> triton.Config:
    blocks = {"BLOCK_V": shape.block_v, "BLOCK_R": shape.block_r, "BLOCK_K": shape.block_k}
    return triton.Config(blocks, num_warps=shape.num_warps, num_stages=shape.num_stages)


_autotuned_score_kernel = triton.autotune(
    [_config(shape) for shape in tuning.CANDIDATES],
    key=["ROWS_UP_TO", "size", "hidden_size"],
    cache_results=True,
)(triton_kernels.score_kernel)


def readout(hidden: Tensor, norm: Norm | None, lens: Lens | None, dtype: torch.dtype) -> Tensor:
    """See `adainfer_kernels.readout`; torch multiplies with the lens."""
    hidden = _rows_contiguous(hidden)
    rows, hidden_size = hidden.shape
    out = torch.empty(rows, hidden_size, dtype=dtype, device=hidden.device)
    if rows == 0:
        return out
    change = lens_bias = weight = bias = None
    if lens is not None:
        change = hidden.to(lens.weight.dtype) @ lens.weight
        change = change if lens.up is None else change @ lens.up
        lens_bias = lens.bias
    if norm is not None:
        weight, bias = norm.weight, norm.bias
    triton_kernels.readout_kernel[(rows,)](
        hidden,
        change,
        _contiguous(lens_bias),
        _contiguous(weight),
        _contiguous(bias),
        out,
        hidden_size,
        hidden.stride(0),
        0.0 if norm is None else norm.eps,
        RMS=norm is not None and norm.kind == "rms",
        LAYER=norm is not None and norm.kind == "layer",
        BLOCK_K=triton.next_power_of_2(hidden_size),
        num_warps=4 if hidden_size <= 4096 else 8,
    )
    return out


def score(
    readout: Tensor,
    head: Head,
    candidates: Tensor | None,
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
    size = head.size if candidates is None else candidates.shape[-1]
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
        head.weight,
        _contiguous(candidates),
        _contiguous(head.bias),
        head.soft_cap,
        head.scale,
        result.scores,
        *scratch,
        *ends,
        rows,
        size,
        hidden_size,
        readout.stride(0),
        head.weight.stride(0),
        head.weight.stride(1),
        parts,
    )
    if shortlist:
        triton_kernels.shortlist_kernel[(rows, parts)](
            *arguments,
            head.size,
            WHOLE=parts == 1,
            BLOCK_V=tuning.SHORTLIST_BLOCK_V,
            BLOCK_K=tuning.SHORTLIST_BLOCK_K,
        )
    else:
        _launch_score(arguments, rows, size, parts, head.weight, shape)
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
    """Launch with `shape`; None means the tuning table's, or else the autotuner's."""

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
    """The kernels take any row stride, but the elements of a row must be contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
