"""The probe as torch ops: what ``torch.compile`` sees of a call, with fakes that give the shapes.

Arguments are those of `adainfer_kernels.readout` and `adainfer_kernels.probe`, checked and
complete; `implementation` is "triton" or "torch".
"""

from __future__ import annotations

import torch
from torch import Tensor

from adainfer_kernels.dispatch import twin
from adainfer_kernels.result import ProbeResult


@torch.library.custom_op("adainfer::readout", mutates_args=())
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
    implementation: str,
) -> Tensor:
    """[rows, hidden size] in `dtype`."""
    return twin(implementation).readout(
        hidden, norm, norm_weight, norm_bias, norm_eps, lens_weight, lens_up, lens_bias, dtype
    )


@readout.register_fake
def _readout_shape(
    hidden: Tensor,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    lens_weight: Tensor | None,
    lens_up: Tensor | None,
    lens_bias: Tensor | None,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    return hidden.new_empty(hidden.shape, dtype=dtype)


@torch.library.custom_op("adainfer::probe", mutates_args=())
def probe(
    readout: Tensor,
    head_weight: Tensor,
    candidates: Tensor | None,
    head_bias: Tensor | None,
    soft_cap: float | None,
    scale: float,
    classifier: Tensor | None,
    threshold: Tensor | None,
    return_scores: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `ProbeResult`; those not asked for are empty."""
    found = twin(implementation).score(
        readout,
        head_weight,
        candidates,
        head_bias,
        soft_cap,
        scale,
        classifier,
        threshold,
        return_scores,
    )
    return _complete(found)


@probe.register_fake
def _probe_shapes(
    readout: Tensor,
    head_weight: Tensor,
    candidates: Tensor | None,
    head_bias: Tensor | None,
    soft_cap: float | None,
    scale: float,
    classifier: Tensor | None,
    threshold: Tensor | None,
    return_scores: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = readout.shape[0]
    size = head_weight.shape[0] if candidates is None else candidates.shape[-1]

    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return readout.new_empty(sizes, dtype=dtype)

    return _complete(
        ProbeResult(
            new(rows, dtype=torch.int64),
            new(rows),
            new(rows),
            new(rows),
            settled=None if classifier is None else new(rows, dtype=torch.bool),
            scores=new(rows, size) if return_scores else None,
        )
    )


def _complete(result: ProbeResult) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An op returns tensors only, none of them a view of another."""
    top1, top2 = result.top1.clone(), result.top2.clone()
    settled = top1.new_empty(0, dtype=torch.bool) if result.settled is None else result.settled
    scores = top1.new_empty(0, 0) if result.scores is None else result.scores
    return result.top1_id, top1, top2, result.lse, settled, scores
