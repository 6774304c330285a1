"""The package's functions with each number of the formula as an argument of its own."""

from __future__ import annotations

from typing import Any

import adainfer_kernels
from adainfer_kernels import Head, Lens, Norm, NormKind, ProbeResult
from torch import Tensor


def probe(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    candidates: Tensor | None = None,
    classifier: Tensor | None = None,
    threshold: Tensor | None = None,
    return_scores: bool = False,
    backend: Any = "auto",
    **before: Any,
) -> ProbeResult:
    """`adainfer_kernels.probe`; by default with an RMSNorm."""
    return adainfer_kernels.probe(
        hidden,
        Head(head_weight, head_bias, soft_cap, scale),
        *norm_and_lens(**before),
        candidates=candidates,
        classifier=classifier,
        threshold=threshold,
        return_scores=return_scores,
        backend=backend,
    )


def readout(hidden: Tensor, *, dtype: Any = None, backend: Any = "auto", **before: Any) -> Tensor:
    """`adainfer_kernels.readout`; by default with an RMSNorm."""
    return adainfer_kernels.readout(hidden, *norm_and_lens(**before), dtype=dtype, backend=backend)


def norm_and_lens(
    norm: NormKind | None = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    lens_weight: Tensor | None = None,
    lens_bias: Tensor | None = None,
) -> tuple[Norm | None, Lens | None]:
    return (
        None if norm is None else Norm(norm, norm_weight, norm_bias, norm_eps),
        None if lens_weight is None else Lens(lens_weight, lens_bias),
    )
