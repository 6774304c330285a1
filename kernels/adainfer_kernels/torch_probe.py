"""Torch twin of `triton_probe`, and the path that a CPU takes.

The vocabulary goes by in blocks that stay in the cache: each is multiplied in the head's own
dtype, reduced, and dropped, so that memory does not grow with the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adainfer_kernels.result import NO_ID, ProbeResult, linear_score, merge

# Scores in flight, 2 MiB in fp32: best of 2^17 to 2^22 where cores have 1 MiB of L2, 16 of L3.
BLOCK_SCORES = 1 << 19
SMALLEST_BLOCK = 1024
GATHERED = 1 << 22  # elements of the head gathered at a time
GROUP = 64


def readout(
    hidden: Tensor,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    lens_weight: Tensor | None,
    lens_bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `adainfer_kernels.readout`."""
    x = hidden.float()
    if lens_weight is not None:
        x = x + hidden.to(lens_weight.dtype) @ lens_weight
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
    rows, size = readout.shape[0], head_weight.shape[0]
    block = max(SMALLEST_BLOCK, BLOCK_SCORES // max(rows, 1) // GROUP * GROUP)
    kept: Tensor | None = None
    if candidates is not None and candidates.dim() == 2:
        kept = _shortlist_scores(readout, head_weight, candidates, head_bias, soft_cap, scale)
        found = summarise(kept, candidates)
    elif size <= block:
        kept = _shaped((readout @ head_weight.T).float(), head_bias, soft_cap, scale)
        found = summarise(kept, candidates)
    else:
        kept = readout.new_empty(rows, size, dtype=torch.float32) if return_scores else None
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
    scores_kept = kept if return_scores else None
    return ProbeResult(found.top1_id, found.top1, found.top2, found.lse, settled, scores_kept)


def summarise(scores: Tensor, ids: Tensor | None = None, *, first_id: int = 0) -> ProbeResult:
    """Reduce scores to a `ProbeResult`.

    Args:
        scores: [rows, n].
        ids: vocabulary ids of the columns, [n] or [rows, n]; -1 for a column that is none.
        first_id: without `ids`, the id of the first column.

    """
    scores = scores.float()
    if ids is not None and ids.dim() == 2:
        scores = scores.masked_fill(ids < 0, float("-inf"))
    top1, column, top2 = _best_two(scores)
    if ids is not None:
        top1_id = _lowest_best_id(scores, ids, top1, column, top2)
    else:
        top1_id = column + first_id if first_id else column
    # softmax is torch's one fused reduction over exponentials; its maximum is exp(top1 - lse).
    lse = top1 - scores.softmax(dim=-1).amax(dim=-1).log()
    return ProbeResult(top1_id, top1, top2, lse)


def _best_two(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best score, the first column that has it, second best score.

    Many columns are reduced to maxima of groups first (one vectorised pass); only the best group
    is looked into.
    """
    rows, size = scores.shape
    if size <= 2 * GROUP:
        values = scores.topk(2).values
        return values[:, 0], scores.argmax(dim=-1), values[:, 1]
    if size % GROUP:
        scores = torch.nn.functional.pad(scores, (0, -size % GROUP), value=float("-inf"))
    groups = scores.view(rows, -1, GROUP)
    maxima = groups.amax(dim=-1)
    group = maxima.argmax(dim=-1)
    members = groups[torch.arange(rows, device=scores.device), group]
    values = members.topk(2).values
    second = torch.maximum(values[:, 1], maxima.topk(2).values[:, 1])
    return values[:, 0], group * GROUP + members.argmax(dim=-1), second


def _lowest_best_id(
    scores: Tensor, ids: Tensor, top1: Tensor, column: Tensor, top2: Tensor
) -> Tensor:
    """The lowest id that has the best score, wherever its column is; -1 if only padding has it."""
    if scores.is_cuda:  # asking for ties would wait for the device
        return _lowest_winner(scores, ids, top1)
    top1_id = ids[column] if ids.dim() == 1 else ids.gather(1, column.unsqueeze(1)).squeeze(1)
    tied = (top1 == top2).nonzero().squeeze(1)
    if tied.numel():
        their_ids = ids if ids.dim() == 1 else ids[tied]
        top1_id[tied] = _lowest_winner(scores[tied], their_ids, top1[tied])
    return top1_id


def _lowest_winner(scores: Tensor, ids: Tensor, top1: Tensor) -> Tensor:
    winners = (scores == top1.unsqueeze(-1)) & (ids >= 0)
    lowest = torch.where(winners, ids, NO_ID).amin(dim=-1)
    return lowest.masked_fill(lowest == NO_ID, -1)


def _shortlist_scores(
    readout: Tensor,
    head_weight: Tensor,
    candidates: Tensor,
    head_bias: Tensor | None,
    soft_cap: float | None,
    scale: float,
) -> Tensor:
    """Scores of each row's own candidates, fp32 [rows, width]; NaN for ids beyond the head."""
    (rows, width), hidden_size = candidates.shape, head_weight.shape[1]
    beyond = candidates >= head_weight.shape[0]
    safe = candidates.masked_fill(beyond, 0).clamp(min=0)
    block = max(1, GATHERED // max(1, width * hidden_size))  # rows gathered at a time
    products = readout.new_empty(rows, width, 1)
    for first in range(0, rows, block):
        here = slice(first, first + block)
        torch.bmm(head_weight[safe[here]], readout[here].unsqueeze(-1), out=products[here])
    bias = None if head_bias is None else head_bias[safe]
    scores = _shaped(products.squeeze(-1).float(), bias, soft_cap, scale)
    return scores.masked_fill(beyond, float("nan"))


def _shaped(scores: Tensor, bias: Tensor | None, soft_cap: float | None, scale: float) -> Tensor:
    """Bias, then soft cap, then scale: the order of vLLM's LogitsProcessor."""
    if bias is not None:
        scores = scores + bias.float()
    if soft_cap is not None:
        scores = (scores / soft_cap).tanh() * soft_cap
    return scores if scale == 1.0 else scores * scale
