"""The probe as torch ops, which is what ``torch.compile`` sees of a call.

An op takes tensors and plain numbers only, so `readout` and `score` take apart the parameters that
they pass to an op, and the op puts them together again. Arguments have been checked, and
`implementation` is "triton" or "torch".
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from adainfer_kernels.dispatch import twin
from adainfer_kernels.parameters import Head, Lens, Norm, NormKind
from adainfer_kernels.result import ProbeResult


def readout(
    hidden: Tensor, norm: Norm | None, lens: Lens | None, dtype: torch.dtype, implementation: str
) -> Tensor:
    """`adainfer_kernels.readout` as an op."""
    norm_numbers: tuple[Any, ...] = (None, None, None, 0.0)
    if norm is not None:
        norm_numbers = (norm.kind, norm.weight, norm.bias, norm.eps)
    lens_tensors = (None, None, None) if lens is None else (lens.weight, lens.up, lens.bias)
    state: Tensor = _readout(hidden, dtype, implementation, *norm_numbers, *lens_tensors)
    return state


@torch.library.custom_op("adainfer::readout", mutates_args=())
def _readout(
    hidden: Tensor,
    dtype: torch.dtype,
    implementation: str,
    norm_kind: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    lens_weight: Tensor | None,
    lens_up: Tensor | None,
    lens_bias: Tensor | None,
) -> Tensor:
    norm = lens = None
    if norm_kind is not None:
        norm = Norm(cast(NormKind, norm_kind), norm_weight, norm_bias, norm_eps)
    if lens_weight is not None:
        lens = Lens(lens_weight, lens_up, lens_bias)
    return twin(implementation).readout(hidden, norm, lens, dtype)


@_readout.register_fake
def _readout_shape(hidden: Tensor, dtype: torch.dtype, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape, dtype=dtype)


def score(
    readout: Tensor,
    head: Head,
    candidates: Tensor | None,
    classifier: Tensor | None,
    threshold: Tensor | None,
    return_scores: bool,
    implementation: str,
) -> ProbeResult:
    """`score` of either twin as an op."""
    top1_id, top1, top2, lse, settled, scores = _score(
        readout,
        head.weight,
        candidates,
        classifier,
        threshold,
        return_scores,
        implementation,
        head.bias,
        head.soft_cap,
        head.scale,
    )
    return ProbeResult(
        top1_id,
        top1,
        top2,
        lse,
        settled=None if classifier is None else settled,
        scores=scores if return_scores else None,
    )


@torch.library.custom_op("adainfer::probe", mutates_args=())
def _score(
    readout: Tensor,
    head_weight: Tensor,
    candidates: Tensor | None,
    classifier: Tensor | None,
    threshold: Tensor | None,
    return_scores: bool,
    implementation: str,
    head_bias: Tensor | None,
    soft_cap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(head_weight, head_bias, soft_cap, scale)
    return _as_tensors(
        twin(implementation).score(readout, head, candidates, classifier, threshold, return_scores)
    )


@_score.register_fake
def _score_shapes(
    readout: Tensor,
    head_weight: Tensor,
    candidates: Tensor | None,
    classifier: Tensor | None,
    threshold: Tensor | None,
    return_scores: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = readout.shape[0]
    size = head_weight.shape[0] if candidates is None else candidates.shape[-1]

    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return readout.new_empty(sizes, dtype=dtype)

    return _as_tensors(
        ProbeResult(
            new(rows, dtype=torch.int64),
            new(rows),
            new(rows),
            new(rows),
            settled=None if classifier is None else new(rows, dtype=torch.bool),
            scores=new(rows, size) if return_scores else None,
        )
    )


def _as_tensors(result: ProbeResult) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An op returns only tensors, none a view of another; an empty one stands for None."""
    top1, top2 = result.top1.clone(), result.top2.clone()
    settled = top1.new_empty(0, dtype=torch.bool) if result.settled is None else result.settled
    scores = top1.new_empty(0, 0) if result.scores is None else result.scores
    return result.top1_id, top1, top2, result.lse, settled, scores
