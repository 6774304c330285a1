"""Torch twin of `triton_probe`, and the path that a CPU takes.

The vocabulary goes by in blocks that stay in the cache: each is multiplied in the head's own
dtype, reduced, and dropped, so that memory does not grow with the vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from adainfer_kernels.result import NO_ID, ProbeResult, linear_score, merge

# Scores in flight. In fp32 they fill the second-level cache of one core (2^18 x 4 bytes = 1 MiB).
BLOCK_SCORES = 1 << 18
SMALLEST_BLOCK = 1024
GROUP = 64


def readout(
    hidden: Tensor,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    lens_change: Tensor | None,
    lens_bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `adainfer_kernels.readout`; `lens_change` is ``hidden @ lens_weight``."""
    x = hidden.float()
    if lens_change is not None:
        x = x + lens_change
    if lens_bias is not None:
        x = x + lens_bias
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm_eps)
    if norm_weight is not None:
        x = x * norm_weight.float()
    if norm_bias is not None:
        x = x + norm_bias.float()
    return x.to(dtype)


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
) -> ProbeResult:
    """Score readouts [rows, hidden size] with a head (packed if `candidates` is 1-D) and reduce."""
    rows = readout.shape[0]
    kept: Tensor | None = None
    if candidates is not None and candidates.dim() == 2:
        kept = _shortlist_scores(readout, head_weight, candidates, head_bias, soft_cap, scale)
        found = summarise(kept, candidates)
    else:
        size = head_weight.shape[0]
        block = max(SMALLEST_BLOCK, BLOCK_SCORES // max(rows, 1) // GROUP * GROUP)
        if return_scores:
            kept = readout.new_empty(rows, size, dtype=torch.float32)
        parts = []
        for first in range(0, size, block):
            here = slice(first, min(first + block, size))
            bias = None if head_bias is None else head_bias[here]
            scores = _shaped((readout @ head_weight[here].T).float(), bias, soft_cap, scale)
            if kept is not None:
                kept[:, here] = scores
            ids = None if candidates is None else candidates[here]
            parts.append(summarise(scores, ids, first_id=first))
        found = merge(parts)
    settled: Tensor | None = None
    if classifier is not None and threshold is not None:
        settled = linear_score(found.features, classifier) >= threshold
    return replace(found, settled=settled, scores=kept if return_scores else None)


def summarise(scores: Tensor, ids: Tensor | None = None, *, first_id: int = 0) -> ProbeResult:
    """Reduce scores to a `ProbeResult`.

    Args:
        scores: [rows, n].
        ids: vocabulary ids of the columns, [n] or [rows, n]; -1 for a column that is none.
        first_id: without `ids`, the id of the first column.

    """
    scores = scores.float()
    if ids is None:
        top1, column, top2 = _best_two(scores)
        top1_id = column + first_id
    else:
        if ids.dim() == 2:
            scores = scores.masked_fill(ids < 0, float("-inf"))
        top1 = scores.amax(dim=-1)
        # The lowest id among equals, wherever it stands.
        winners = (scores == top1.unsqueeze(-1)) & (ids >= 0)
        top1_id = torch.where(winners, ids, NO_ID).amin(dim=-1)
        top2 = scores.masked_fill(ids == top1_id.unsqueeze(-1), float("-inf")).amax(dim=-1)
        top1_id = top1_id.masked_fill(top1_id == NO_ID, -1)
    # softmax is torch's one fused reduction over exponentials; its maximum is exp(top1 - lse).
    lse = top1 - scores.softmax(dim=-1).amax(dim=-1).log()
    lse = torch.where(top1 == float("-inf"), top1, lse)  # there is no score at all
    return ProbeResult(top1_id, top1, top2, lse)


def _best_two(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best score, its first column, second best score.

    Many columns are reduced to maxima of groups first (one vectorised pass); only the best group
    is looked into.
    """
    rows, size = scores.shape
    if size <= 2 * GROUP:
        top1, column = scores.max(dim=-1)
        rest = scores.scatter(-1, column.unsqueeze(-1), float("-inf"))
        return top1, column, rest.amax(dim=-1)
    if size % GROUP:
        scores = torch.nn.functional.pad(scores, (0, -size % GROUP), value=float("-inf"))
    groups = scores.view(rows, -1, GROUP)
    maxima = groups.amax(dim=-1)
    _, group = maxima.max(dim=-1)
    at = group.unsqueeze(-1)
    members = groups.gather(1, at.unsqueeze(-1).expand(rows, 1, GROUP)).squeeze(1)
    top1, member = members.max(dim=-1)
    rivals = members.scatter(-1, member.unsqueeze(-1), float("-inf")).amax(dim=-1)
    others = maxima.scatter(-1, at, float("-inf")).amax(dim=-1)
    return top1, group * GROUP + member, torch.maximum(rivals, others)


def _shortlist_scores(
    readout: Tensor,
    head_weight: Tensor,
    candidates: Tensor,
    head_bias: Tensor | None,
    soft_cap: float | None,
    scale: float,
) -> Tensor:
    """Scores of each row's own candidates, fp32 [rows, width]; NaN for ids beyond the head."""
    beyond = candidates >= head_weight.shape[0]
    safe = candidates.masked_fill(beyond, 0).clamp(min=0)
    gathered = head_weight[safe]  # [rows, width, hidden size]
    scores = torch.bmm(gathered, readout.unsqueeze(-1)).squeeze(-1).float()
    bias = None if head_bias is None else head_bias[safe]
    return _shaped(scores, bias, soft_cap, scale).masked_fill(beyond, float("nan"))


def _shaped(scores: Tensor, bias: Tensor | None, soft_cap: float | None, scale: float) -> Tensor:
    """Bias, then soft cap, then scale: the order of vLLM's LogitsProcessor."""
    if bias is not None:
        scores = scores + bias.float()
    if soft_cap is not None:
        scores = (scores / soft_cap).tanh() * soft_cap
    return scores if scale == 1.0 else scores * scale
