"""The probe: lens, final norm, LM head, then top-1, top-2 and log-sum-exp of each row's scores.

    x       = hidden + hidden @ lens_weight + lens_bias     (the affine lens, optional)
    readout = norm(x) * norm_weight + norm_bias             (the model's final norm, optional)
    scores  = soft_cap(readout @ head_weight.T + head_bias) * scale

The features of AdaInfer (arXiv 2403.02181) follow from three numbers a row:
``top_prob = exp(top1 - lse)`` and ``gap = top_prob - exp(top2 - lse)``.

Two twins do the work, `triton_probe` on a GPU and `torch_probe` anywhere; neither writes the
rows x vocabulary scores. Both are reached through torch ops, ``adainfer::readout`` and
``adainfer::probe``, so that a call traces under ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adainfer_kernels import ops
from adainfer_kernels.dispatch import Implementation, resolve
from adainfer_kernels.result import ProbeResult

Norm = Literal["rms", "layer"] | None


def readout(
    hidden: Tensor,
    *,
    norm: Norm = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    lens_weight: Tensor | None = None,
    lens_bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Lens and final norm: the state that the LM head is to read.

    Args:
        hidden: [rows, hidden size], the residual stream after a decoder layer.
        norm: kind of the final norm; None for states that are normed already.
        norm_weight: [hidden size]; None means ones.
        norm_bias: [hidden size]; None means zeros.
        norm_eps: epsilon of the norm.
        lens_weight: [hidden size, hidden size], multiplied in its own dtype.
        lens_bias: [hidden size], goes with `lens_weight`; None means zeros.
        dtype: of the result; None means that of `hidden`.
        implementation: see `probe`.

    Returns:
        [rows, hidden size]; norm and sums in fp32, rounded once.

    Raises:
        ValueError: shapes or options do not fit together.
        RuntimeError: the forced implementation cannot run.

    """
    _check(hidden.dim() == 2, "hidden must be [rows, hidden size], got {}", hidden)
    size = hidden.shape[1:]
    _check(norm in ("rms", "layer", None), f'norm must be "rms", "layer" or None, got {norm!r}')
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            _check(norm is not None, f"{name} is given but norm is None: name the norm, or drop it")
            _check(value.shape == size, name + " must be [hidden size], got {}", value)
    if lens_weight is None:
        _check(lens_bias is None, "lens_bias goes with lens_weight: give both, or neither")
    else:
        square = torch.Size([size[0], size[0]])
        wanted = "lens_weight must be [hidden size, hidden size], got {}"
        _check(lens_weight.shape == square, wanted, lens_weight)
    if lens_bias is not None:
        _check(lens_bias.shape == size, "lens_bias must be [hidden size], got {}", lens_bias)
    dtype = dtype or hidden.dtype
    if norm is None and lens_weight is None:
        return hidden.to(dtype)
    return ops.readout(
        hidden,
        norm,
        norm_weight,
        norm_bias,
        norm_eps,
        lens_weight,
        lens_bias,
        dtype,
        resolve(implementation, hidden.device),
    )


def probe(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    norm: Norm = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    lens_weight: Tensor | None = None,
    lens_bias: Tensor | None = None,
    candidates: Tensor | None = None,
    head_bias: Tensor | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    classifier: Tensor | None = None,
    threshold: Tensor | None = None,
    return_scores: bool = False,
    implementation: Implementation = "auto",
) -> ProbeResult:
    """Score hidden states with an LM head and summarise each row's scores.

    Args:
        hidden: [rows, hidden size], the residual stream after a decoder layer; rows may be strided.
        head_weight: [vocabulary, hidden size], fp32, fp16 or bf16. Of a padded head, pass the rows
            that are tokens (a slice, no copy).
        norm: see `readout`, as are the next five.
        norm_weight: see `readout`.
        norm_bias: see `readout`.
        norm_eps: see `readout`.
        lens_weight: see `readout`.
        lens_bias: see `readout`.
        candidates: which tokens are scored, as distinct vocabulary ids (int64).
            None: all rows of the head.
            [n]: the same for every row of the batch. A head of exactly n rows is taken as packed:
            row j scores token ``candidates[j]``, nothing is gathered (a shard of the vocabulary
            is such a head); from a larger one the rows are gathered at every call.
            [rows, width]: each row's own, gathered from the whole head; -1 is padding, an id
            beyond the head makes its row's features NaN.
        head_bias: [rows of the head], added to the products.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``.
        scale: factor on the scores, after the soft cap.
        classifier: fp32 [3], the weights of ``top_prob`` and ``gap``, then the bias: asks for
            `ProbeResult.settled`.
        threshold: fp32 [rows], goes with `classifier`.
        return_scores: keep the scores too, fp32 [rows, candidates].
        implementation: "triton", "torch", or "auto": Triton on a GPU, else torch.

    Raises:
        ValueError: shapes or options do not fit together.
        RuntimeError: the forced implementation cannot run.

    """
    state = readout(
        hidden,
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        lens_weight=lens_weight,
        lens_bias=lens_bias,
        dtype=head_weight.dtype,
        implementation=implementation,
    )
    rows = hidden.shape[0]
    wanted = f"head_weight must be [vocabulary, {hidden.shape[1]}], got {{}}"
    _check(head_weight.shape[1:] == hidden.shape[1:], wanted, head_weight)
    size = head_weight.shape[0]
    if head_bias is not None:
        _check(head_bias.shape == (size,), f"head_bias must be [{size}], got {{}}", head_bias)
    if candidates is not None:
        _check(candidates.dtype == torch.int64, f"candidates must be int64, got {candidates.dtype}")
        if candidates.dim() == 1:
            if size != candidates.shape[0]:
                head_weight = head_weight[candidates]
                head_bias = None if head_bias is None else head_bias[candidates]
        else:
            fits = candidates.dim() == 2 and candidates.shape[0] == rows
            _check(fits, f"candidates must be [n] or [{rows}, width], got {{}}", candidates)
        size = candidates.shape[-1]
    _check(size >= 2, f"a probe needs at least two scores a row, got {size}")
    _check(soft_cap is None or soft_cap > 0, f"soft_cap must be positive, got {soft_cap}")
    _check(scale > 0, f"scale must be positive, got {scale}")
    both = "classifier and threshold go together: give both, or neither"
    _check((classifier is None) == (threshold is None), both)
    if classifier is not None and threshold is not None:
        _check(classifier.shape == (3,), "classifier must be [3], got {}", classifier)
        _check(threshold.shape == (rows,), f"threshold must be [{rows}], got {{}}", threshold)
    top1_id, top1, top2, lse, settled, scores = ops.probe(
        state,
        head_weight,
        candidates,
        head_bias,
        soft_cap,
        scale,
        classifier,
        threshold,
        return_scores,
        resolve(implementation, hidden.device),
    )
    return ProbeResult(
        top1_id,
        top1,
        top2,
        lse,
        settled=None if classifier is None else settled,
        scores=scores if return_scores else None,
    )


def _check(fits: bool, sentence: str, tensor: Tensor | None = None) -> None:
    """Raise `sentence` if it does not fit; {} in it stands for the tensor's shape."""
    if not fits:
        raise ValueError(sentence if tensor is None else sentence.format(list(tensor.shape)))
