"""The probe: lens, final norm, LM head, then top-1, top-2 and log-sum-exp of each row's scores.

    x       = hidden + hidden @ lens_weight @ lens_up + lens_bias (affine lens, optional)
    readout = norm(x) * norm_weight + norm_bias                   (the model's final norm, optional)
    scores  = soft_cap(readout @ head_weight.T + head_bias) * scale

The features of AdaInfer (arXiv 2403.02181) follow from three numbers a row:
``top_prob = exp(top1 - lse)`` and ``gap = top_prob - exp(top2 - lse)``.

Two twins do the work, `triton_probe` on a GPU and `torch_probe` anywhere; neither writes the
rows x vocabulary scores. Under ``torch.compile`` a call is traced as torch ops, see `ops`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adainfer_kernels import ops
from adainfer_kernels.dispatch import Implementation, resolve, twin
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
    lens_up: Tensor | None = None,
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
        lens_weight: [hidden size, hidden size], multiplied in its own dtype; or [hidden size, rank]
            with a `lens_up`.
        lens_up: [rank, hidden size] of a lens of low rank; None means the identity.
        lens_bias: [hidden size], goes with `lens_weight`; None means zeros.
        dtype: of the result; None means that of `hidden`.
        implementation: see `probe`.

    Returns:
        [rows, hidden size]; norm and sums in fp32, rounded once.

    Raises:
        ValueError: shapes or options do not fit together.
        RuntimeError: the forced implementation cannot run.

    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [rows, hidden size], got {list(hidden.shape)}")
    if norm not in ("rms", "layer", None):
        raise ValueError(f'norm must be "rms", "layer" or None, got {norm!r}')
    if norm is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError("norm_weight or norm_bias is given but norm is None: name the norm")
    if lens_weight is None and (lens_up is not None or lens_bias is not None):
        raise ValueError("lens_up and lens_bias go with lens_weight: give it too, or neither")
    size = hidden.shape[1]
    _check_shape("norm_weight", norm_weight, size)
    _check_shape("norm_bias", norm_bias, size)
    rank = size if lens_up is None else lens_up.shape[0]
    _check_shape("lens_weight", lens_weight, size, rank)
    _check_shape("lens_up", lens_up, rank, size)
    _check_shape("lens_bias", lens_bias, size)
    dtype = dtype or hidden.dtype
    if norm is None and lens_weight is None:
        return hidden.to(dtype)
    lens = (lens_weight, lens_up, lens_bias)
    arguments = (hidden, norm, norm_weight, norm_bias, norm_eps, *lens, dtype)
    chosen = resolve(implementation, hidden.device)
    if torch.compiler.is_compiling():
        return ops.readout(*arguments, chosen)
    state: Tensor = twin(chosen).readout(*arguments)
    return state


def probe(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    norm: Norm = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    lens_weight: Tensor | None = None,
    lens_up: Tensor | None = None,
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
        norm: see `readout`, as are the next six.
        norm_weight: see `readout`.
        norm_bias: see `readout`.
        norm_eps: see `readout`.
        lens_weight: see `readout`.
        lens_up: see `readout`.
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
        lens_up=lens_up,
        lens_bias=lens_bias,
        dtype=head_weight.dtype,
        implementation=implementation,
    )
    rows, hidden_size = hidden.shape
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden_size:
        raise ValueError(
            f"head_weight must be [vocabulary, {hidden_size}], got {list(head_weight.shape)}"
        )
    size = head_weight.shape[0]
    _check_shape("head_bias", head_bias, size)
    if candidates is not None:
        if candidates.dtype != torch.int64:
            raise ValueError(f"candidates must be int64, got {candidates.dtype}")
        if candidates.dim() == 1:
            if size != candidates.shape[0]:
                head_weight = head_weight[candidates]
                head_bias = None if head_bias is None else head_bias[candidates]
        elif candidates.dim() != 2 or candidates.shape[0] != rows:
            raise ValueError(
                f"candidates must be [n] or [{rows}, width], got {list(candidates.shape)}"
            )
        size = candidates.shape[-1]
    if size < 2:
        raise ValueError(f"a probe needs at least two scores a row, got {size}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if (classifier is None) != (threshold is None):
        raise ValueError("classifier and threshold go together: give both, or neither")
    _check_shape("classifier", classifier, 3)
    _check_shape("threshold", threshold, rows)
    arguments = (
        state,
        head_weight,
        candidates,
        head_bias,
        soft_cap,
        scale,
        classifier,
        threshold,
        return_scores,
    )
    chosen = resolve(implementation, hidden.device)
    if torch.compiler.is_compiling():
        top1_id, top1, top2, lse, settled, scores = ops.probe(*arguments, chosen)
        return ProbeResult(
            top1_id,
            top1,
            top2,
            lse,
            settled=None if classifier is None else settled,
            scores=scores if return_scores else None,
        )
    result: ProbeResult = twin(chosen).score(*arguments)
    return result


def settle(
    readout: Tensor,
    head_weight: Tensor,
    *,
    head_bias: Tensor | None = None,
    classifier: Tensor,
    threshold: Tensor,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """All that an exit point asks of a probe: which rows are settled, and their scores.

    The same as ``settled`` and ``scores`` of `probe` with ``return_scores`` (to rounding of the
    probabilities), without what else there is in a `ProbeResult`.

    Args:
        readout: [rows, hidden size], what `readout` returns.
        head_weight: [n, hidden size], of the tokens to be scored.
        head_bias: [n], added to the products.
        classifier: fp32 [3], as for `probe`.
        threshold: fp32 [rows].
        implementation: see `probe`.

    Returns:
        bool [rows] and fp32 [rows, n].

    Raises:
        ValueError: shapes do not fit together.
        RuntimeError: the forced implementation cannot run.

    """
    if resolve(implementation, readout.device) == "torch":
        rows, hidden_size = readout.shape
        _check_shape("head_weight", head_weight, max(2, head_weight.shape[0]), hidden_size)
        _check_shape("head_bias", head_bias, head_weight.shape[0])
        _check_shape("classifier", classifier, 3)
        _check_shape("threshold", threshold, rows)
        asked = readout, head_weight, head_bias, classifier, threshold
        settled_and_scores: tuple[Tensor, Tensor] = twin("torch").settle(*asked)
        return settled_and_scores
    found = probe(
        readout,
        head_weight,
        norm=None,
        head_bias=head_bias,
        classifier=classifier,
        threshold=threshold,
        return_scores=True,
        implementation=implementation,
    )
    assert found.settled is not None
    assert found.scores is not None
    return found.settled, found.scores


def _check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")
