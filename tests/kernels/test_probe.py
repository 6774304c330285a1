"""A probe is lens, norm, head, softmax and top-2, whatever its form, dtype and strides."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from adainfer_kernels import linear_score
from torch import Tensor

from tests.kernels import oracle
from tests.kernels.flat import probe, readout
from tests.kernels.oracle import (
    BACKENDS,
    DEVICE,
    DTYPES,
    FORMS,
    NAN,
    assert_accurate,
    check_probe,
    in_form,
    normal,
    states_and_head,
)

ROWS = [1, 7, 83, 257]
VOCABULARIES = [2, 1000, 32000, 151936]
HIDDEN = 100


def fits_the_interpreter(rows: int, vocab: int) -> bool:
    """Its time goes by tiles, 16 x 16 of them up to 1024 candidates, else 64 x 1024.

    Of the largest vocabularies one count of rows is enough: 1 and 7 rows take the same tiles.
    """
    if rows == 1 and vocab > 32000:
        return False
    block_r, block_v = (16, 16) if vocab <= 1024 else (64, 1024)
    return -(-rows // block_r) * -(-vocab // block_v) <= 160


def is_needed(vocab: int, dtype: torch.dtype, backend: str) -> bool:
    """In the interpreter, only dtypes that are served: large heads in bfloat16, labels in fp32."""
    served = torch.float32 if vocab <= 1000 else torch.bfloat16
    return backend == "torch" or DEVICE == "cuda" or dtype == served


GRID = [
    pytest.param(*one, marks=() if is_needed(*one[1:]) else pytest.mark.full)
    for dtype in DTYPES
    for vocab in VOCABULARIES
    for rows in ROWS
    for backend in BACKENDS
    for one in [(rows, vocab, dtype, backend)]
    if backend == "torch" or DEVICE == "cuda" or fits_the_interpreter(rows, vocab)
]


@lru_cache(maxsize=1)
def case(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, oracle.Truth, ...]:
    hidden, head = states_and_head(rows, vocab, 576 if vocab <= 1000 else 64, dtype)
    truth, naive = oracle.oracle(hidden, head), oracle.same_dtype(hidden, head)
    nothing = torch.empty(0)
    return hidden, head, replace(truth, scores=nothing), replace(naive, scores=nothing)


@pytest.mark.parametrize(("rows", "vocab", "dtype", "backend"), GRID)
def test_no_less_accurate_than_naive_torch_in_the_same_dtype(rows, vocab, dtype, backend):
    hidden, head, truth, naive = case(rows, vocab, dtype)
    assert_accurate(probe(hidden, head, backend=backend), truth, naive, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [1023, 1024, 1025, 1026, 2049, 4097])
def test_the_size_of_the_vocabulary_need_not_fit_the_blocks(vocab, backend):
    rows = 256 if backend == "torch" else 1  # torch: enough for blocks of 1024
    hidden, head = states_and_head(rows, vocab, 16)
    head[-1] = 6 * hidden[0] / hidden[0].norm()  # so that its best token is the very last one
    found = check_probe(hidden, head, {}, backend)
    assert found.top1_id[0] == vocab - 1


def lens_and_norm(
    lens: str, norm: str | None, affine: str, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    options = {"norm": norm, "norm_eps": 0.1}
    if lens != "no lens":
        options["lens_weight"] = normal(HIDDEN, HIDDEN, seed=5, dtype=dtype) / HIDDEN**0.5
    if lens.endswith("with bias"):
        options["lens_bias"] = normal(HIDDEN, seed=6, dtype=dtype)
    if "weight" in affine:
        options["norm_weight"] = 1 + normal(HIDDEN, seed=7, dtype=dtype) / 4
    if "bias" in affine:
        options["norm_bias"] = normal(HIDDEN, seed=8, dtype=dtype)
    return options


LENSES = ["no lens", "lens", "lens with bias"]
NORMS = [
    (norm, affine)
    for norm in ("rms", "layer", None)
    for affine in ("plain", "weight", "bias", "weight and bias")
    if norm or affine == "plain"
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("lens", LENSES)
def test_a_readout_is_lens_then_norm_rounded_once(lens, norm, affine, backend):
    hidden = normal(7, HIDDEN) + 1
    options = lens_and_norm(lens, norm, affine)
    right = oracle.readout(hidden, **options)
    for dtype in DTYPES:
        found = readout(hidden, **options, dtype=dtype, backend=backend)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), right, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6
        )
    assert readout(hidden.half(), **options, backend=backend).dtype == torch.float16


AFTER = {
    "nothing": {},
    "bias": {"head_bias": True},
    "soft cap": {"soft_cap": 4.0},
    "scale": {"scale": 0.25},
    "whole scale": {"scale": 2},
    "all": {"head_bias": True, "soft_cap": 4.0, "scale": 0.25},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("after", AFTER)
def test_then_bias_then_soft_cap_then_scale(after, form, backend):
    hidden, head = states_and_head(7, 200, HIDDEN)
    options = dict(AFTER[after])
    bias = normal(200, seed=9) if options.pop("head_bias", False) else None
    head, candidates = in_form(form, head, width=30, head_bias=bias)
    options |= candidates
    found = check_probe(hidden, head, options, backend)
    most = options.get("soft_cap", torch.inf) * options.get("scale", 1)
    assert (found.top1.abs() <= most).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_everything_together_in_each_dtype(form, dtype, backend):
    hidden, head = states_and_head(7, 1500, HIDDEN, dtype)
    bias = normal(1500, seed=9, dtype=dtype)
    head, options = in_form(form, head, width=30, head_bias=bias)
    options |= lens_and_norm("lens with bias", "layer", "weight and bias", dtype)
    options |= {"soft_cap": 8.0, "scale": 1.5}
    found = check_probe(hidden, head, options, backend)
    assert (found.top1.abs() <= 8.0 * 1.5).all()
    assert found.top1.dtype == found.lse.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [2, 5, 30, 64, 1001])
@pytest.mark.parametrize("form", FORMS[1:])
def test_candidates_name_the_tokens_that_are_scored(form, width, backend):
    hidden, head = states_and_head(5, 1500, 40)
    head, options = in_form(form, head, width=width)
    found = check_probe(hidden, head, options, backend)
    assert found.top1_id.dtype == torch.int64
    assert torch.isin(found.top1_id, options["candidates"]).all()


def every_other_row(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, NAN)], dim=1).flatten(0, 1)[::2]


def start_of_longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.full_like(tensor, NAN)])[: len(tensor)]


def columns_of_wider(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.full_like(tensor, NAN)], dim=-1)[..., : tensor.shape[-1]]


def every_other_column(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, NAN)], dim=-1).flatten(-2)[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


MATRIX_VIEWS = [
    every_other_row,
    start_of_longer,
    columns_of_wider,
    every_other_column,
    transposed,
]
STRIDED = [
    *((name, view) for name in ("hidden", "head_weight", "lens_weight") for view in MATRIX_VIEWS),
    *(
        (name, every_other_row)
        for name in (
            "norm_weight",
            "norm_bias",
            "lens_bias",
            "head_bias",
            "classifier",
            "threshold",
        )
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "view"), STRIDED)
def test_strides_do_not_matter(name, view, backend):
    hidden, head = states_and_head(6, 50, HIDDEN)
    arguments = {"hidden": hidden, "head_weight": head}
    arguments |= lens_and_norm("lens with bias", "layer", "weight and bias")
    arguments["head_bias"] = normal(50, seed=9)
    truth, naive = oracle.oracle(**arguments), oracle.same_dtype(**arguments)
    arguments |= {"classifier": normal(3, seed=10), "threshold": normal(6, seed=11)}
    settled = probe(**arguments, backend=backend).settled
    arguments[name] = view(arguments[name])
    found = probe(**arguments, backend=backend)
    assert_accurate(found, truth, naive)
    assert torch.equal(found.settled, settled)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS[1:])
def test_candidates_may_be_strided(form, backend):
    hidden, head = states_and_head(6, 50, HIDDEN)
    head, options = in_form(form, head, width=20)
    right = probe(hidden, head, **options, backend=backend)
    options["candidates"] = options["candidates"].repeat_interleave(2, dim=-1)[..., ::2]
    assert oracle.same(probe(hidden, head, **options, backend=backend), right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_settled_where_the_classifier_reaches_its_threshold(form, backend):
    hidden, head = states_and_head(20, 1500, 40)
    head, options = in_form(form, head, width=30)
    asked = {"classifier": torch.tensor([0.5, -2.0, 0.3]).to(DEVICE), "threshold": normal(20)}
    found = check_probe(hidden, head, options, backend, **asked)
    lead = linear_score(found.features, asked["classifier"]) - asked["threshold"]
    assert (lead.abs() > 1e-5).all(), "no row is at the boundary"
    assert torch.equal(found.settled, lead >= 0)
    assert set(found.settled.tolist()) == {True, False}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_scores_are_kept_on_demand(form, dtype, backend):
    hidden, head = states_and_head(5, 1500, 40, dtype)
    head, options = in_form(form, head, width=30, head_bias=normal(1500, dtype=dtype))
    options |= {"soft_cap": 8.0, "scale": 0.5}
    found = check_probe(hidden, head, options, backend, return_scores=True)
    assert found.scores.dtype == torch.float32
    right, rounding = oracle.oracle(hidden, head, **options).scores, torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.scores.double(), right, rtol=rounding, atol=oracle.EPSILON[dtype]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab", [40, 1500])
@pytest.mark.parametrize("norm", ["rms", None])
def test_no_rows_give_no_rows(norm, vocab, form, backend):
    hidden, head = normal(0, 16), normal(vocab, 16)
    head, options = in_form(form, head, width=30)
    found = probe(
        hidden,
        head,
        **options,
        norm=norm,
        classifier=normal(3),
        threshold=normal(0),
        return_scores=True,
        backend=backend,
    )
    width = vocab if form == "full" else 30
    assert found.top1_id.shape == found.settled.shape == found.gap.shape == (0,)
    assert found.features.shape == (0, 2)
    assert found.scores.shape == (0, width)
    assert readout(hidden, norm=norm, backend=backend).shape == (0, 16)
