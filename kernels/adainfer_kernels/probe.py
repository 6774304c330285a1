"""Reference probe in plain torch: lens, final norm, LM head, then top-1, top-2 and log-sum-exp.

    x      = hidden + hidden @ lens_weight + lens_bias      (the affine lens, optional)
    z      = RMSNorm(x) * norm_weight                       (the model's final norm, optional)
    scores = z @ head_weight.T + head_bias                  (all rows, or the candidates' rows)

The features of AdaInfer (arXiv 2403.02181) follow from three numbers per row:
``top_prob = exp(top1 - lse)`` and ``gap = top_prob - exp(top2 - lse)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProbeResult:
    """What a probe says about each row; every tensor has the shape [rows].

    Attributes:
        top1_id: id of the best score (int64); the lowest id wins a tie.
        top1: best score (fp32).
        top2: second best score (fp32); equals ``top1`` on a tie.
        lse: log of the sum of the exponentials of all scores (fp32).

    """

    top1_id: Tensor
    top1: Tensor
    top2: Tensor
    lse: Tensor

    @property
    def top_prob(self) -> Tensor:
        """Probability of the best token, fp32 [rows]."""
        return (self.top1 - self.lse).exp()

    @property
    def gap(self) -> Tensor:
        """Lead of the best token's probability over the second's, fp32 [rows]."""
        return self.top_prob - (self.top2 - self.lse).exp()


def summarise(scores: Tensor, candidates: Tensor | None = None) -> ProbeResult:
    """Reduce scores [rows, n >= 2] to a `ProbeResult`; column j scores token ``candidates[j]``.

    A row with a NaN gives NaN features, which no threshold accepts.
    """
    if scores.shape[-1] < 2:
        raise ValueError(f"a probe needs at least two scores a row, got {scores.shape[-1]}")
    scores = scores.float()
    top1, column = scores.max(dim=-1)  # the first of equal maxima
    rest = scores.scatter(-1, column.unsqueeze(-1), float("-inf"))
    return ProbeResult(
        top1_id=column if candidates is None else candidates[column],
        top1=top1,
        top2=rest.max(dim=-1).values,
        lse=scores.logsumexp(dim=-1),
    )


def normed(hidden: Tensor, norm_weight: Tensor, norm_eps: float) -> Tensor:
    """RMSNorm of [rows, hidden] in fp32, rounded to ``norm_weight.dtype``."""
    x = hidden.float()
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm_eps)
    return (x * norm_weight.float()).to(norm_weight.dtype)


def lensed(hidden: Tensor, lens_weight: Tensor, lens_bias: Tensor) -> Tensor:
    """``hidden + hidden @ lens_weight + lens_bias`` in fp32, [rows, hidden]."""
    x = hidden.float()
    return torch.addmm(x + lens_bias.float(), x, lens_weight.float())


def probe(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    lens_weight: Tensor | None = None,
    lens_bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    candidates: Tensor | None = None,
) -> ProbeResult:
    """Score hidden states with a (possibly packed) LM head and summarise the scores.

    Args:
        hidden: [rows, hidden size], the residual stream after a decoder layer.
        head_weight: [n, hidden size], one row per scored token.
        norm_weight: [hidden size] of the model's final RMSNorm; None leaves the state as it is.
        norm_eps: epsilon of that norm.
        lens_weight: [hidden size, hidden size] of the affine lens, applied before the norm.
        lens_bias: [hidden size], goes with `lens_weight`.
        head_bias: [n], added to the scores.
        candidates: [n] token ids of the rows of `head_weight`; None means 0..n-1.

    """
    if lens_weight is not None:
        if lens_bias is None:
            raise ValueError("lens_weight needs lens_bias: pass zeros for a lens without one")
        hidden = lensed(hidden, lens_weight, lens_bias)
    if norm_weight is not None:
        hidden = normed(hidden, norm_weight, norm_eps)
    scores = (hidden.to(head_weight.dtype) @ head_weight.T).float()
    if head_bias is not None:
        scores = scores + head_bias.float()
    return summarise(scores, candidates)
