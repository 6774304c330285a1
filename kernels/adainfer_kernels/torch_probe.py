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
FEATURES_OF_BEST = torch.tensor([[1.0, 1.0], [0.0, -1.0]])  # top_prob and gap of two probabilities
GATHERED = 1 << 22  # elements of the head gathered at a time
GROUP = 64
FEW_SCORES = 1 << 13  # of which torch finds the two best faster without groups


@torch.no_grad()  # what is written in place cannot be differentiated
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
) -> Tensor:
    """See `adainfer_kernels.readout`."""
    no_lens = lens_weight is None and lens_bias is None
    one_dtype = all(t is None or t.dtype == dtype for t in (hidden, norm_weight, norm_bias))
    if norm == "layer" and no_lens and one_dtype:
        # torch's own kernel sums in fp32 and rounds once as well, with no copy.
        return _layer_norm(hidden.contiguous(), norm_weight, norm_bias, norm_eps)
    # In place: on a CPU a temporary of a megabyte costs more in page faults than its arithmetic.
    x = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if lens_weight is not None:
        change = hidden.to(lens_weight.dtype) @ lens_weight
        x += change if lens_up is None else change @ lens_up
    if lens_bias is not None:
        x += lens_bias
    if norm == "layer":
        weight = None if norm_weight is None else norm_weight.float()
        bias = None if norm_bias is None else norm_bias.float()
        return _layer_norm(x, weight, bias, norm_eps).to(dtype)
    if norm == "rms":
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x *= torch.rsqrt(length.square() / x.shape[-1] + norm_eps)
    if norm_weight is not None:
        x *= norm_weight
    if norm_bias is not None:
        x += norm_bias
    return x.to(dtype)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@torch.no_grad()  # what is written in place cannot be differentiated
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
    if candidates is not None and candidates.dim() == 2:
        kept: Tensor | None
        kept = _shortlist_scores(readout, head_weight, candidates, head_bias, soft_cap, scale)
        found = _reduce(kept, candidates, 0, torch.empty_like(kept))
    else:
        found, kept = _score_blocks(
            readout, head_weight, candidates, head_bias, soft_cap, scale, return_scores
        )
    settled: Tensor | None = None
    if classifier is not None and threshold is not None:
        settled = linear_score(found.features, classifier) >= threshold
    return ProbeResult(
        found.top1_id,
        found.top1,
        found.top2,
        found.lse,
        settled=settled,
        scores=kept if return_scores else None,
    )


@torch.no_grad()
def settle(
    readout: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    classifier: Tensor,
    threshold: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `adainfer_kernels.settle`: `score` with fewer, smaller steps.

    Between layers whose weights fill the caches each step costs ten times what it costs alone.
    """
    if readout.shape[0] * head_weight.shape[0] > BLOCK_SCORES:
        found = score(readout, head_weight, None, head_bias, None, 1.0, classifier, threshold, True)
        assert found.settled is not None
        assert found.scores is not None
        return found.settled, found.scores
    scores = (readout @ head_weight.T).float()
    if head_bias is not None:
        scores += head_bias
    best = torch.softmax(scores, dim=-1)
    if best.numel() <= FEW_SCORES:
        best = best.topk(2).values
    else:
        first, _, second = _best_two(best)
        best = torch.stack([first, second], dim=-1)
    return linear_score(best @ FEATURES_OF_BEST.to(best.device), classifier) >= threshold, scores


def _score_blocks(
    readout: Tensor,
    head_weight: Tensor,
    candidates: Tensor | None,
    head_bias: Tensor | None,
    soft_cap: float | None,
    scale: float,
    return_scores: bool,
) -> tuple[ProbeResult, Tensor | None]:
    """Score and reduce block by block, in the same three buffers; with the scores if asked for."""
    rows, size = readout.shape[0], head_weight.shape[0]
    block = max(SMALLEST_BLOCK, BLOCK_SCORES // max(rows, 1) // GROUP * GROUP)
    block = min(block, size)
    products = readout.new_empty(rows * block)
    scores, softmax = readout.new_empty(2, rows * block, dtype=torch.float32)
    kept = readout.new_empty(rows, size, dtype=torch.float32) if return_scores else None
    parts = []
    for first in range(0, size, block):
        here = slice(first, min(first + block, size))
        width = here.stop - first
        product, part, exponentials = (
            buffer[: rows * width].view(rows, width) for buffer in (products, scores, softmax)
        )
        torch.mm(readout, head_weight[here].T, out=product)
        part.copy_(product)
        _shape(part, None if head_bias is None else head_bias[here], soft_cap, scale)
        if kept is not None:
            kept[:, here] = part
        ids = None if candidates is None else candidates[here]
        parts.append(_reduce(part, ids, first, exponentials))
    return merge(parts), kept


def summarise(scores: Tensor, ids: Tensor | None = None) -> ProbeResult:
    """Reduce scores to a `ProbeResult`.

    Args:
        scores: [rows, n].
        ids: vocabulary ids of the columns, [n] or [rows, n], -1 for a column that is none; without
            them column j is token j.

    """
    scores = scores.float()
    if ids is not None:
        scores = scores.masked_fill(ids < 0, float("-inf"))
    return _reduce(scores, ids, 0, torch.empty_like(scores))


def _reduce(scores: Tensor, ids: Tensor | None, first_id: int, softmax: Tensor) -> ProbeResult:
    """See `summarise`; without `ids` the first column is token `first_id`; `softmax` is scratch."""
    top1, column, top2 = _best_two(scores)
    if ids is not None:
        top1_id = _lowest_best_id(scores, ids, top1, column, top2)
    else:
        top1_id = column + first_id if first_id else column
    # softmax is torch's one fused reduction over exponentials; its maximum is exp(top1 - lse).
    torch.softmax(scores, dim=-1, out=softmax)
    return ProbeResult(top1_id, top1, top2, top1 - softmax.amax(dim=-1).log())


def _best_two(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best score, the first column that has it, second best score.

    Many columns are reduced to maxima of groups first (one vectorised pass); only the best group
    is looked into.
    """
    rows, size = scores.shape
    if size == 1:
        first = scores[:, 0]
        return first, first.new_zeros(rows, dtype=torch.int64), first.new_full((rows,), -torch.inf)
    if size <= 2 * GROUP or scores.numel() <= FEW_SCORES:
        values = scores.topk(2).values
        return values[:, 0], scores.argmax(dim=-1), values[:, 1]
    if size % GROUP:
        scores = torch.nn.functional.pad(scores, (0, -size % GROUP), value=float("-inf"))
    groups = scores.view(rows, scores.shape[1] // GROUP, GROUP)
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
    is_tied = top1 == top2
    if is_tied.any():
        tied = is_tied.nonzero().squeeze(1)
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
    """Scores of each row's own candidates, fp32 [rows, width].

    Padding has -inf, an id beyond the head NaN.
    """
    (rows, width), hidden_size = candidates.shape, head_weight.shape[1]
    beyond = candidates >= head_weight.shape[0]
    safe = candidates.masked_fill(beyond, 0).clamp(min=0)
    block = max(1, GATHERED // max(1, width * hidden_size))  # rows gathered at a time
    products = readout.new_empty(rows, width, 1)
    for first in range(0, rows, block):
        here = slice(first, first + block)
        torch.bmm(head_weight[safe[here]], readout[here].unsqueeze(-1), out=products[here])
    scores = products.squeeze(-1).to(torch.float32, copy=True)
    _shape(scores, None if head_bias is None else head_bias[safe], soft_cap, scale)
    return scores.masked_fill_(beyond, torch.nan).masked_fill_(candidates < 0, -torch.inf)


def _shape(scores: Tensor, bias: Tensor | None, soft_cap: float | None, scale: float) -> None:
    """Bias, then soft cap, then scale, in place: the order of vLLM's LogitsProcessor."""
    if bias is not None:
        scores += bias
    if soft_cap is not None:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    if scale != 1.0:
        scores *= scale
