"""Torch backend, which CPUs use; see `triton_probe` for GPUs.

It goes through the vocabulary in blocks that fit the cache. Each block is multiplied in the head's
dtype, reduced, and dropped, so memory does not grow with the vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from adainfer_kernels.parameters import Head, Lens, Norm
from adainfer_kernels.result import NO_ID, ProbeResult, linear_score, merge

# Scores in a block, 2 MiB in fp32: the fastest of 2^17 to 2^22 on cores with 1 MiB of L2 and
# 16 MiB of L3.
BLOCK_SCORES = 1 << 19
MIN_BLOCK_SIZE = 1024
GROUP_SIZE = 64
TOPK_SCORES = 1 << 13  # up to this many scores, plain topk is faster than groups


@functools.cache
def top2_to_features(device: torch.device) -> Tensor:
    """What turns the best two probabilities into top_prob and gap; it is copied to a device once.

    [2, 2].
    """
    return torch.tensor([[1.0, 1.0], [0.0, -1.0]], device=device)


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
        x += hidden.to(lens.weight.dtype) @ lens.weight
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
    """Score readouts [rows, hidden size] with a head, and reduce the scores.

    `candidates` are the vocabulary ids of the head's rows; None means that row j is token j.
    """
    result, scores = _score_blocks(readout, head, candidates, return_scores)
    settled = None
    if classifier is not None and threshold is not None:
        settled = linear_score(result.features, classifier) >= threshold
    return ProbeResult(
        result.top1_id, result.top1, result.top2, result.lse, settled=settled, scores=scores
    )


@torch.no_grad()
def settle(
    readout: Tensor, head: Head, classifier: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """See `adainfer_kernels.settle`: `score` in fewer, smaller steps.

    Between layers whose weights fill the caches, a step costs ten times what it costs alone.
    """
    if readout.shape[0] * head.size > BLOCK_SCORES:
        result = score(readout, head, None, classifier, threshold, True)
        assert result.settled is not None
        assert result.scores is not None
        return result.settled, result.scores
    scores = (readout @ head.weight.T).float()
    _bias_cap_scale_(scores, head, head.bias)
    probabilities = torch.softmax(scores, dim=-1)
    if probabilities.numel() <= TOPK_SCORES:
        top2 = probabilities.topk(2).values
    else:
        first, _, second = _best_two(probabilities)
        top2 = torch.stack([first, second], dim=-1)
    features = top2 @ top2_to_features(top2.device)
    return linear_score(features, classifier) >= threshold, scores


def _score_blocks(
    readout: Tensor, head: Head, candidates: Tensor | None, return_scores: bool
) -> tuple[ProbeResult, Tensor | None]:
    """Score and reduce block by block, reusing three buffers; also return the scores if asked."""
    rows, size = readout.shape[0], head.size
    block = max(MIN_BLOCK_SIZE, BLOCK_SCORES // max(rows, 1) // GROUP_SIZE * GROUP_SIZE)
    block = min(block, size)
    products = readout.new_empty(rows * block)
    scores, softmax = readout.new_empty(2, rows * block, dtype=torch.float32)
    all_scores = readout.new_empty(rows, size, dtype=torch.float32) if return_scores else None
    parts = []
    for first in range(0, size, block):
        columns = slice(first, min(first + block, size))
        width = columns.stop - first
        block_products, block_scores, block_softmax = (
            buffer[: rows * width].view(rows, width) for buffer in (products, scores, softmax)
        )
        torch.mm(readout, head.weight[columns].T, out=block_products)
        block_scores.copy_(block_products)
        _bias_cap_scale_(block_scores, head, None if head.bias is None else head.bias[columns])
        if all_scores is not None:
            all_scores[:, columns] = block_scores
        ids = None if candidates is None else candidates[columns]
        parts.append(_reduce(block_scores, ids, first, block_softmax))
    return merge(parts), all_scores


def _bias_cap_scale_(products: Tensor, head: Head, bias: Tensor | None) -> None:
    """Turn products into scores in place: bias, soft cap, scale, as vLLM's LogitsProcessor does.

    `bias` holds the entries of ``head.bias`` that belong to these columns.
    """
    if bias is not None:
        products += bias
    if head.soft_cap is not None:
        products.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    if head.scale != 1.0:
        products *= head.scale


def _reduce(scores: Tensor, ids: Tensor | None, first_id: int, softmax: Tensor) -> ProbeResult:
    """Reduce scores [rows, n] of the tokens `ids` [n]; None means consecutive from `first_id`.

    `softmax` is scratch memory of the scores' shape.
    """
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
    if size <= 2 * GROUP_SIZE or scores.numel() <= TOPK_SCORES:
        values = scores.topk(2).values
        return values[:, 0], scores.argmax(dim=-1), values[:, 1]
    if size % GROUP_SIZE:
        scores = torch.nn.functional.pad(scores, (0, -size % GROUP_SIZE), value=float("-inf"))
    groups = scores.view(rows, scores.shape[1] // GROUP_SIZE, GROUP_SIZE)
    maxima = groups.amax(dim=-1)
    group = maxima.argmax(dim=-1)
    members = groups[torch.arange(rows, device=scores.device), group]
    values = members.topk(2).values
    second = torch.maximum(values[:, 1], maxima.topk(2).values[:, 1])
    return values[:, 0], group * GROUP_SIZE + members.argmax(dim=-1), second


def _lowest_best_id(
    scores: Tensor, ids: Tensor, top1: Tensor, column: Tensor, top2: Tensor
) -> Tensor:
    """The lowest of the `ids` [n] that have the best score."""
    if scores.is_cuda:  # testing for ties would synchronise with the device
        return _lowest_of_tied(scores, ids, top1)
    top1_id = ids[column]
    is_tied = top1 == top2
    if is_tied.any():
        tied = is_tied.nonzero().squeeze(1)
        top1_id[tied] = _lowest_of_tied(scores[tied], ids, top1[tied])
    return top1_id


def _lowest_of_tied(scores: Tensor, ids: Tensor, top1: Tensor) -> Tensor:
    lowest = torch.where(scores == top1.unsqueeze(-1), ids, NO_ID).amin(dim=-1)
    return lowest.masked_fill(lowest == NO_ID, -1)  # a row of NaN has no best score
