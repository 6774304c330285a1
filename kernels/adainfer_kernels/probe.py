"""The probe: lens, final norm, LM head, then top-1, top-2 and log-sum-exp of each row's scores.

    x       = hidden + hidden @ lens.weight @ lens.up + lens.bias (affine lens, optional)
    readout = norm(x) * norm.weight + norm.bias                   (the model's final norm, optional)
    scores  = soft_cap(readout @ head.weight.T + head.bias) * head.scale

AdaInfer's features (arXiv 2403.02181) follow from three numbers per row:
``top_prob = exp(top1 - lse)`` and ``gap = top_prob - exp(top2 - lse)``.

Two twins do the work, `triton_probe` on a GPU and `torch_probe` anywhere; neither writes the
rows x vocabulary scores. ``torch.compile`` traces a call as torch ops, see `ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adainfer_kernels import ops
from adainfer_kernels.dispatch import Implementation, resolve, twin
from adainfer_kernels.parameters import Head, Lens, Norm, check_shape
from adainfer_kernels.result import ProbeResult


def readout(
    hidden: Tensor,
    norm: Norm | None = None,
    lens: Lens | None = None,
    *,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Lens and final norm: the state that the LM head reads.

    Args:
        hidden: [rows, hidden size], the residual stream after a decoder layer.
        norm: the final norm; None for states that are already normed.
        lens: applied before the norm; None for none.
        dtype: of the result; None means that of `hidden`.
        implementation: see `probe`.

    Returns:
        [rows, hidden size]; the norm and all sums are in fp32 and rounded once.

    Raises:
        ValueError: shapes or options do not fit together.
        RuntimeError: the forced implementation cannot run.

    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [rows, hidden size], got {list(hidden.shape)}")
    if norm is not None and norm.hidden_size is not None:
        _check_fits("norm", norm.hidden_size, hidden)
    if lens is not None:
        _check_fits("lens", lens.hidden_size, hidden)
    dtype = dtype or hidden.dtype
    if norm is None and lens is None:
        return hidden.to(dtype)
    chosen = resolve(implementation, hidden.device)
    if torch.compiler.is_compiling():
        return ops.readout(hidden, norm, lens, dtype, chosen)
    state: Tensor = twin(chosen).readout(hidden, norm, lens, dtype)
    return state


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
    implementation: Implementation = "auto",
) -> ProbeResult:
    """Score hidden states with an LM head and summarise each row's scores.

    Args:
        hidden: [rows, hidden size], the residual stream after a decoder layer; rows may be strided.
        head: scores the readouts.
        norm: see `readout`.
        lens: see `readout`.
        candidates: which tokens to score, as distinct vocabulary ids (int64).
            None: all rows of the head.
            [n]: the same for every row of the batch. A head of exactly n rows counts as packed:
            row j scores token ``candidates[j]`` and nothing is gathered (a shard of the
            vocabulary is such a head); from a larger head the rows are gathered at every call.
            [rows, width]: each row has its own, gathered from the whole head; -1 is padding, and
            an id beyond the head makes its row's features NaN.
        classifier: fp32 [3], the weights of ``top_prob`` and ``gap``, then the bias; fills in
            `ProbeResult.settled`.
        threshold: fp32 [rows], goes with `classifier`.
        return_scores: also return the scores, fp32 [rows, candidates].
        implementation: "triton", "torch", or "auto": Triton on a GPU, else torch.

    Raises:
        ValueError: shapes or options do not fit together.
        RuntimeError: the forced implementation cannot run.

    """
    state = readout(hidden, norm, lens, dtype=head.weight.dtype, implementation=implementation)
    _check_fits("head", head.hidden_size, hidden)
    rows = hidden.shape[0]
    if candidates is not None:
        if candidates.dtype != torch.int64:
            raise ValueError(f"candidates must be int64, got {candidates.dtype}")
        if candidates.dim() != 1 and (candidates.dim() != 2 or candidates.shape[0] != rows):
            raise ValueError(
                f"candidates must be [n] or [{rows}, width], got {list(candidates.shape)}"
            )
        if candidates.shape[-1] < 2:
            raise ValueError(f"a row needs at least two candidates, got {candidates.shape[-1]}")
        if candidates.dim() == 1 and candidates.shape[0] != head.size:
            head = head.of_rows(candidates)
    if (classifier is None) != (threshold is None):
        raise ValueError("classifier and threshold go together: give both, or neither")
    check_shape("classifier", classifier, 3)
    check_shape("threshold", threshold, rows)
    chosen = resolve(implementation, hidden.device)
    if torch.compiler.is_compiling():
        return ops.score(state, head, candidates, classifier, threshold, return_scores, chosen)
    result: ProbeResult = twin(chosen).score(
        state, head, candidates, classifier, threshold, return_scores
    )
    return result


def settle(
    readout: Tensor,
    head: Head,
    classifier: Tensor,
    threshold: Tensor,
    *,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Only what an exit point needs: which rows are settled, and their scores.

    Equals ``settled`` and ``scores`` of `probe` with ``return_scores``, up to rounding of the
    probabilities, and skips the rest of a `ProbeResult`.

    Args:
        readout: [rows, hidden size], what `readout` returns.
        head: of the tokens to score.
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
        _check_fits("head", head.hidden_size, readout)
        check_shape("classifier", classifier, 3)
        check_shape("threshold", threshold, readout.shape[0])
        settled_and_scores: tuple[Tensor, Tensor] = twin("torch").settle(
            readout, head, classifier, threshold
        )
        return settled_and_scores
    found = probe(
        readout,
        head,
        classifier=classifier,
        threshold=threshold,
        return_scores=True,
        implementation=implementation,
    )
    assert found.settled is not None
    assert found.scores is not None
    return found.settled, found.scores


def _check_fits(name: str, hidden_size: int, hidden: Tensor) -> None:
    if hidden.shape[1] != hidden_size:
        raise ValueError(
            f"the {name} is for a hidden size of {hidden_size}, got states {list(hidden.shape)}"
        )
