"""What the kernels promise, in the most obvious torch: fp64, with all scores in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from adainfer_kernels import ProbeResult
from torch import Tensor

from tests.kernels.flat import probe

BACKENDS = ["torch", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = ["full", "packed", "gathered"]
NUMBERS = ("top1", "top2", "lse", "top_prob", "gap")
# How much more error than naive torch's in the same dtype is accepted, as in ml-cross-entropy's
# tests: some roundings of the dtype at scores of about 10, since errors may cancel by chance.
EPSILON = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
INF = float("inf")
NAN = float("nan")


@dataclass(frozen=True)
class Truth:
    """A `ProbeResult` with its features, all of its numbers computed apart."""

    top1_id: Tensor
    top1: Tensor
    top2: Tensor
    lse: Tensor
    top_prob: Tensor
    gap: Tensor
    scores: Tensor


def oracle(hidden: Tensor, head_weight: Tensor, **options: Any) -> Truth:
    """The formula in fp64."""
    return _probe(hidden, head_weight, torch.float64, torch.float64, **options)


def same_dtype(hidden: Tensor, head_weight: Tensor, **options: Any) -> Truth:
    """What a user would write: products rounded to the head's dtype, the rest in fp32."""
    return _probe(hidden, head_weight, head_weight.dtype, torch.float32, **options)


def _probe(
    hidden: Tensor,
    head_weight: Tensor,
    multiply_in: torch.dtype,
    sum_in: torch.dtype,
    *,
    candidates: Tensor | None = None,
    head_bias: Tensor | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    **before: Any,
) -> Truth:
    state = readout(hidden, multiply_in, sum_in, **before).to(multiply_in)
    scores = (state @ head_weight.to(multiply_in).T).to(sum_in)
    if head_bias is not None:
        scores = scores + head_bias.to(sum_in)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores * scale
    size = len(head_weight)
    if candidates is None:
        ids = torch.arange(size, device=scores.device)
    else:
        ids = candidates
        if len(ids) != size:
            scores = scores[:, ids]
    return reduce(scores, ids)


def readout(
    hidden: Tensor,
    multiply_in: torch.dtype = torch.float64,
    sum_in: torch.dtype = torch.float64,
    *,
    norm: str | None = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    lens_weight: Tensor | None = None,
    lens_bias: Tensor | None = None,
) -> Tensor:
    """Lens and norm."""
    x = hidden.to(sum_in)
    if lens_weight is not None:
        change = hidden.to(multiply_in) @ lens_weight.to(multiply_in)
        x = x + change.to(sum_in)
    if lens_bias is not None:
        x = x + lens_bias.to(sum_in)
    if norm == "layer":
        x = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + norm_eps
        ) ** 0.5
    if norm == "rms":
        x = x / (x.square().mean(-1, keepdim=True) + norm_eps) ** 0.5
    if norm_weight is not None:
        x = x * norm_weight.to(sum_in)
    if norm_bias is not None:
        x = x + norm_bias.to(sum_in)
    return x


def pool(
    hidden: Tensor,
    residual: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    carried: Tensor | None = None,
    sum_in: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The last normed state of each request's rows, and their sum."""
    x = hidden if residual is None else hidden + residual
    normed = readout(x.to(sum_in), sum_in=sum_in)
    sums = [normed[start:end].sum(dim=0) for start, end in zip(starts, ends, strict=True)]
    return normed[ends - 1], torch.stack(sums) + (0 if carried is None else carried.to(sum_in))


def reduce(scores: Tensor, ids: Tensor) -> Truth:
    """Softmax and top-2 of scores [rows, n] of the tokens `ids` [n]."""
    best, probabilities = scores.topk(2, dim=-1).values, scores.softmax(dim=-1)
    winners = scores == best[:, :1]
    lowest = torch.where(winners, ids, torch.iinfo(torch.int64).max).amin(dim=-1)
    top_prob, second_prob = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
    return Truth(
        top1_id=lowest.where(winners.any(dim=-1), -1),
        top1=best[:, 0],
        top2=best[:, 1],
        lse=scores.logsumexp(dim=-1),
        top_prob=top_prob,
        gap=top_prob - second_prob,
        scores=scores,
    )


def assert_accurate(
    found: ProbeResult, truth: Truth, naive: Truth, dtype: torch.dtype = torch.float32
) -> None:
    """No more error than naive torch's, plus epsilon; exact ids where the scores are apart."""
    defined = ~truth.gap.isnan()
    assert torch.equal(~found.gap.isnan(), defined)
    assert torch.equal(~found.top_prob.isnan(), defined)
    for name in NUMBERS:
        right = getattr(truth, name)[defined]
        error, accepted = (
            torch.where(value == right, 0, (value - right).abs())
            for value in (getattr(result, name)[defined].double() for result in (found, naive))
        )
        worst = (error - accepted).max().item() if len(error) else 0
        assert worst <= EPSILON[dtype], f"{name} has {worst} more error than naive torch"
    rounding = torch.finfo(dtype).eps * truth.top1.abs().clamp(min=1)
    clear = defined & (truth.top1 - truth.top2 > 2 * rounding)
    assert torch.equal(found.top1_id[clear], truth.top1_id[clear])


def check_probe(
    hidden: Tensor, head_weight: Tensor, options: dict, backend: str, **asked: Any
) -> ProbeResult:
    """The probe of these arguments, once it is found to be what the formula says."""
    found = probe(hidden, head_weight, **options, **asked, backend=backend)
    truth = oracle(hidden, head_weight, **options)
    assert_accurate(found, truth, same_dtype(hidden, head_weight, **options), head_weight.dtype)
    return found


def same(left: ProbeResult, right: ProbeResult) -> bool:
    """Equal bit for bit, but for the payload of NaN."""
    return torch.equal(left.top1_id, right.top1_id) and all(
        torch.equal(getattr(left, name).nan_to_num(-9e9), getattr(right, name).nan_to_num(-9e9))
        for name in NUMBERS
    )


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def states_and_head(
    rows: int, vocab: int, hidden_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Rows that point to a token each, from not at all to clearly: with a score of 10."""
    head = normal(vocab, hidden_size, seed=1) * 10 / hidden_size
    tokens = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    clarity = normal(rows, 1, seed=3).abs() * hidden_size / 10
    hidden = normal(rows, hidden_size, seed=4) + clarity * head[tokens]
    return hidden.to(dtype), head.to(dtype)


def with_scores(
    scores: Tensor, rows: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """States and a head whose products, with norm=None, are exactly these [n], in every row."""
    hidden, head = torch.zeros(rows, 16), torch.zeros(len(scores), 16)
    hidden[:, 3], head[:, 3] = 1.0, scores
    return hidden.to(DEVICE, dtype), head.to(DEVICE, dtype)


def distinct_ids(width: int, vocab: int) -> Tensor:
    """[width] distinct vocabulary ids, not sorted."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(vocab, generator=generator).argsort()[:width].to(DEVICE)


def in_form(
    form: str, head_weight: Tensor, width: int, head_bias: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The head and the options that make a probe take this form."""
    if form == "full":
        return head_weight, {"head_bias": head_bias}
    ids = distinct_ids(width, len(head_weight))
    if form == "packed":
        head_weight = head_weight[ids]
        head_bias = None if head_bias is None else head_bias[ids]
    return head_weight, {"head_bias": head_bias, "candidates": ids}
