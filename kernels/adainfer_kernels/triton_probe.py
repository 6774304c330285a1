"""Triton backend: launches the kernels of `triton_kernels`."""

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
    [_config(shape) for shape in tuning.AUTOTUNED],
    key=["ROWS_UP_TO", "size", "hidden_size"],
    cache_results=True,
)(triton_kernels.score_kernel)


def readout(hidden: Tensor, norm: Norm | None, lens: Lens | None, dtype: torch.dtype) -> Tensor:
    """See `adainfer_kernels.readout`; torch multiplies with the lens."""
    hidden = rows_contiguous(hidden)
    rows, hidden_size = hidden.shape
    out = torch.empty(rows, hidden_size, dtype=dtype, device=hidden.device)
    if rows == 0:
        return out
    lens_product = lens_bias = weight = bias = None
    if lens is not None:
        lens_product = hidden.to(lens.weight.dtype) @ lens.weight
        lens_bias = lens.bias
    if norm is not None:
        weight, bias = norm.weight, norm.bias
    triton_kernels.readout_kernel[(rows,)](
        hidden,
        lens_product,
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
) -> ProbeResult:
    """See `torch_probe.score`."""
    readout = rows_contiguous(readout)
    rows, hidden_size = readout.shape
    parts = tuning.parts_of(head.size, _multiprocessors(readout.device))

    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device=readout.device)

    result = ProbeResult(
        top1_id=new(rows, dtype=torch.int64),
        top1=new(rows),
        top2=new(rows),
        lse=new(rows),
        settled=None if classifier is None else new(rows, dtype=torch.bool),
        scores=new(rows, head.size) if return_scores else None,
    )
    if rows == 0:
        return result
    scratch: tuple[Tensor | None, Tensor | None] = (None, None)
    if parts > 1:
        scratch = (new(3, rows, parts), new(rows, parts, dtype=torch.int32))
    outputs_and_classifier = (
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
        *outputs_and_classifier,
        rows,
        head.size,
        hidden_size,
        readout.stride(0),
        head.weight.stride(0),
        head.weight.stride(1),
        parts,
    )
    _launch_score(arguments, rows, parts, head.weight)
    if parts > 1:
        triton_kernels.merge_parts_kernel[(rows,)](
            *scratch, *outputs_and_classifier, rows, parts, BLOCK_P=triton.next_power_of_2(parts)
        )
    return result


def settle(
    readout: Tensor, head: Head, classifier: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """See `adainfer_kernels.settle`; `score` has no step to skip here."""
    result = score(readout, head, None, classifier, threshold, return_scores=True)
    assert result.settled is not None
    assert result.scores is not None
    return result.settled, result.scores


def _launch_score(arguments: tuple[Any, ...], rows: int, parts: int, head_weight: Tensor) -> None:
    """Launch the score kernel with its fixed shape, or else with the autotuner's."""

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_R"]), parts

    interpreted = head_weight.device.type == "cpu"
    capability = None if interpreted else torch.cuda.get_device_capability(head_weight.device)
    shape = tuning.fixed_shape(rows, len(head_weight), head_weight.dtype, capability)
    constants = {
        "ROWS_UP_TO": tuning.row_bucket(rows),
        "SINGLE_PART": parts == 1,
        "UPCAST": interpreted and head_weight.dtype == torch.bfloat16,
    }
    if shape is None:
        _autotuned_score_kernel[grid](*arguments, **constants)
    else:
        triton_kernels.score_kernel[grid](*arguments, **constants, **_config(shape).all_kwargs())


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The kernels take any row stride, but the elements of a row must be contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
