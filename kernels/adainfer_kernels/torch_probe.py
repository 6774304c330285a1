"""Torch twin of `triton_probe`; CPUs use it.

It goes through the vocabulary in blocks that fit the cache. Each block is multiplied in the head's
dtype, reduced, and dropped, so memory does not grow with the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adainfer_kernels.parameters import Head, Lens, Norm
from adainfer_kernels.result import NO_ID, ProbeResult, linear_score, merge

# Scores in a block, 2 MiB in fp32: the fastest of 2^17 to 2^22 on cores with 1 MiB of L2 and
# 16 MiB of L3.
BLOCK_SCORES = 1 << 19
SMALLEST_BLOCK = 1024
FEATURES_OF_BEST = torch.tensor([[1.0, 1.0], [0.0, -1.0]])  # top_prob and gap of two probabilities
GATHERED = 1 << 22  # elements of the head gathered at a time
GROUP = 64
FEW_SCORES = 1 << 13  # up to this many, torch finds the best two faster without groups


@torch.no_grad()  # in-place writes cannot be differentiated
def readout(hidden: Tensor, norm: Norm | None, lens: Lens | None, dtype: torch.dtype) -> Tensor:
    """See `adainfer_kernels.readout`."""
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    one_dtype = all(t is None or t.dtype == dtype for t in (hidden, weight, bias))
    if norm is not None and norm.kind == "layer" and lens is None and one_dtype:
        # torch's own kernel also sums in fp32 and rounds once, and copies nothing.
        return _layer_norm(hidden.contiguous(), weight, bias, norm.eps)
    # In place: on a CPU a temporary of a megabyte costs more in page faults than its arithmetic.
    x = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if lens is not None:
        change = hidden.to(lens.weight.dtype) @ lens.weight
        x += change if lens.up is None else change @ lens.up
        if lens.bias is not None:
            x += lens.bias
    if norm is None:
        return x.to(dtype)
    if norm.kind == "layer":
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
        return _layer_norm(x, weight, bias, norm.eps).to(dtype)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x *= torch.rsqrt(length.square() / x.shape[-1] + norm.eps)
    if weight is not None:
        x *= weight
    if bias is not None:
        x += bias
    return x.to(dtype)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@torch.no_grad()  # in-place writes cannot be differentiated
def score(
    readout: Tensor,
    head: Head,
    candidates: Tensor | None,
    classifier: Tensor | None,
    threshold: Tensor | None,
    return_scores: bool,
) -> ProbeResult:
    """Score readouts [rows, hidden size] with a head (packed if `candidates` is 1-D) and reduce."""
    if candidates is not None and candidates.dim() == 2:
        kept: Tensor | None
        kept = scores = _shortlist_scores(readout, head, candidates)
        found = _reduce(scores, candidates, 0, torch.empty_like(scores))
    else:
        found, kept = _score_blocks(readout, head, candidates, return_scores)
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
    readout: Tensor, head: Head, classifier: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """See `adainfer_kernels.settle`: `score` in fewer, smaller steps.

    Between layers whose weights fill the caches, a step costs ten times what it costs alone.
    """
    if readout.shape[0] * head.size > BLOCK_SCORES:
        found = score(readout, head, None, classifier, threshold, True)
        assert found.settled is not None
        assert found.scores is not None
        return found.settled, found.scores
    scores = (readout @ head.weight.T).float()
    _to_scores(scores, head, head.bias)
    best = torch.softmax(scores, dim=-1)
    if best.numel() <= FEW_SCORES:
        best = best.topk(2).values
    else:
        first, _, second = _best_two(best)
        best = torch.stack([first, second], dim=-1)
    return linear_score(best @ FEATURES_OF_BEST.to(best.device), classifier) >= threshold, scores


def _score_blocks(
    readout: Tensor, head: Head, candidates: Tensor | None, return_scores: bool
) -> tuple[ProbeResult, Tensor | None]:
    """Score and reduce block by block, in the same three buffers; with the scores if wanted."""
    rows, size = readout.shape[0], head.size
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
        torch.mm(readout, head.weight[here].T, out=product)
        part.copy_(product)
        _to_scores(part, head, None if head.bias is None else head.bias[here])
        if kept is not None:
            kept[:, here] = part
        ids = None if candidates is None else candidates[here]
        parts.append(_reduce(part, ids, first, exponentials))
    return merge(parts), kept


def summarise(scores: Tensor, ids: Tensor | None = None) -> ProbeResult:
    """Reduce scores to a `ProbeResult`.

    Args:
        scores: [rows, n].
        ids: vocabulary ids of the columns, [n] or [rows, n]; -1 marks padding. None means that
            column j is token j.

    """
    scores = scores.float()
    if ids is not None:
        scores = scores.masked_fill(ids < 0, float("-inf"))
    return _reduce(scores, ids, 0, torch.empty_like(scores))


def _reduce(scores: Tensor, ids: Tensor | None, first_id: int, softmax: Tensor) -> ProbeResult:
    """See `summarise`. Without `ids`, column 0 is token `first_id`; `softmax` is scratch memory."""
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

    Many columns are first reduced to the maxima of groups, in one vectorised pass; then only the
    best group is searched.
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
    """The lowest id that has the best score, in any column; -1 if only padding has it."""
    if scores.is_cuda:  # testing for ties would synchronise with the device
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


def _shortlist_scores(readout: Tensor, head: Head, candidates: Tensor) -> Tensor:
    """Scores of each row's own candidates, fp32 [rows, width].

    Padding scores -inf; an id beyond the head scores NaN.
    """
    rows, width = candidates.shape
    beyond = candidates >= head.size
    safe = candidates.masked_fill(beyond, 0).clamp(min=0)
    block = max(1, GATHERED // max(1, width * head.hidden_size))  # rows gathered at a time
    products = readout.new_empty(rows, width, 1)
    for first in range(0, rows, block):
        here = slice(first, first + block)
        torch.bmm(head.weight[safe[here]], readout[here].unsqueeze(-1), out=products[here])
    scores = products.squeeze(-1).to(torch.float32, copy=True)
    _to_scores(scores, head, None if head.bias is None else head.bias[safe])
    return scores.masked_fill_(beyond, torch.nan).masked_fill_(candidates < 0, -torch.inf)


def _to_scores(products: Tensor, head: Head, bias: Tensor | None) -> None:
    """Bias, then soft cap, then scale, in place: the order of vLLM's LogitsProcessor.

    `bias` holds the entries of ``head.bias`` that belong to these columns.
    """
    if bias is not None:
        products += bias
    if head.soft_cap is not None:
        products.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    if head.scale != 1.0:
        products *= head.scale
