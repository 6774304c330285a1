"""The probe: tuned lens, final norm, LM head, then top-1, top-2 and log-sum-exp of the scores.

    x       = hidden + hidden @ lens.weight + lens.bias (tuned lens, optional)
    readout = norm(x) * norm.weight + norm.bias                   (the model's final norm, optional)
    scores  = soft_cap(readout @ head.weight.T + head.bias) * head.scale

AdaInfer's features (arXiv 2403.02181) follow from three numbers per row:
``top_prob = exp(top1 - lse)`` and ``gap = top_prob - exp(top2 - lse)``.

There are two backends, `triton_probe` on a GPU and `torch_probe` anywhere. Neither materialises
the scores, [rows, vocabulary], unless they are requested.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adainfer_kernels.backend import Backend, load_backend
from adainfer_kernels.parameters import Head, Lens, Norm, check_shape
from adainfer_kernels.result import ProbeResult


def readout(
    hidden: Tensor,
    norm: Norm | None = None,
    lens: Lens | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Apply the lens and the final norm: the result is the LM head's input.

    Args:
        hidden: [rows, hidden size], the residual stream after a decoder layer.
        norm: the final norm; None for states that are already normed.
        lens: applied before the norm; None for none.
        dtype: the dtype of the result; None means that of `hidden`.
        backend: see `probe`, which raises the same errors.

    Returns:
        [rows, hidden size]; the norm and all sums are in fp32 and rounded once.

    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [rows, hidden size], got {list(hidden.shape)}")
    if norm is not None and norm.hidden_size is not None:
        _check_hidden_size("norm", norm.hidden_size, hidden)
    if lens is not None:
        _check_hidden_size("lens", lens.hidden_size, hidden)
    dtype = dtype or hidden.dtype
    if norm is None and lens is None:
        return hidden.to(dtype)
    return load_backend(backend, hidden.device).readout(hidden, norm, lens, dtype)


def probe(
    hidden: Tensor,
    head: Head,
    norm: Norm | None = None,
    lens: Lens | None = None,
    *,
    candidates: Tensor | None = None,
    classifier: Tensor | None = None,
    threshold: Tensor | None = None,
    return_scores: bool = False,
    backend: Backend = "auto",
) -> ProbeResult:
    """Score hidden states with an LM head and reduce each row's scores to a `ProbeResult`.

    Args:
        hidden: [rows, hidden size], the residual stream after a decoder layer; rows may be strided.
        head: scores the readouts.
        norm: see `readout`.
        lens: see `readout`.
        candidates: int64 [n], the distinct vocabulary ids to score, the same for every row.
            None scores all rows of the head. A head of exactly n rows counts as packed: its row j
            scores token ``candidates[j]`` and nothing is gathered (a shard of the vocabulary is
            such a head). From a larger head, the n rows are gathered at every call.
        classifier: fp32 [3], the weights of ``top_prob`` and ``gap``, then the bias; fills in
            `ProbeResult.settled`.
        threshold: fp32 [rows], required with `classifier`.
        return_scores: also return the scores, fp32 [rows, n].
        backend: "triton", "torch", or "auto": Triton on a GPU, else torch.

    Raises:
        ValueError: shapes or options do not fit together.
        RuntimeError: the requested backend cannot run.

    """
    state = readout(hidden, norm, lens, dtype=head.weight.dtype, backend=backend)
    _check_hidden_size("head", head.hidden_size, hidden)
    if candidates is not None:
        if candidates.dtype != torch.int64:
            raise ValueError(f"candidates must be int64, got {candidates.dtype}")
        if candidates.dim() != 1:
            raise ValueError(
                f"candidates must be [n], the same for every row, got {list(candidates.shape)}"
            )
        if candidates.numel() < 2:
            raise ValueError(f"candidates needs at least two ids, got {candidates.numel()}")
        if candidates.numel() != head.size:
            head = head.of_rows(candidates)
    if (classifier is None) != (threshold is None):
        raise ValueError("classifier and threshold go together: give both, or neither")
    check_shape("classifier", classifier, 3)
    check_shape("threshold", threshold, hidden.shape[0])
    return load_backend(backend, hidden.device).score(
        state, head, candidates, classifier, threshold, return_scores
    )


def settle(
    readout: Tensor,
    head: Head,
    classifier: Tensor,
    threshold: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Only what an exit point needs: which rows are settled, and their scores.

    Equals ``settled`` and ``scores`` of `probe` with ``return_scores``, up to rounding of the
    probabilities, and skips the rest of a `ProbeResult`. It raises the same errors.

    Args:
        readout: [rows, hidden size], as `readout` returns it, in the dtype of the head.
        head: the rows of the LM head of the tokens to score.
        classifier, threshold, backend: as for `probe`.

    Returns:
        bool [rows] and fp32 [rows, n].

    """
    _check_hidden_size("head", head.hidden_size, readout)
    check_shape("classifier", classifier, 3)
    check_shape("threshold", threshold, readout.shape[0])
    return load_backend(backend, readout.device).settle(readout, head, classifier, threshold)


def _check_hidden_size(name: str, hidden_size: int, hidden: Tensor) -> None:
    if hidden.shape[1] != hidden_size:
        raise ValueError(
            f"the {name} is for a hidden size of {hidden_size}, got states {list(hidden.shape)}"
        )
