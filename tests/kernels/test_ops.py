"""The ops keep torch's rules, and a probe traces as one graph for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.flat import probe, readout
from tests.kernels.oracle import (
    DEVICE,
    FORMS,
    IMPLEMENTATIONS,
    in_form,
    normal,
    states_and_head,
)

VOCAB, HIDDEN = 50, 16
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # there is no gradient


def as_is(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("view", [as_is, transposed])
@pytest.mark.parametrize(
    ("norm", "lens"),
    [
        ("rms", "none"),
        ("rms", "whole"),
        ("layer", "none"),
        ("layer", "low rank"),
        (None, "whole"),
        (None, "low rank"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readout_is_a_proper_op(dtype, norm, lens, view, implementation):
    affine = (normal(HIDDEN), normal(HIDDEN)) if norm else (None, None)
    lenses = {
        "none": (None, None, None),
        "whole": (normal(HIDDEN, HIDDEN), None, normal(HIDDEN)),
        "low rank": (normal(HIDDEN, 4), normal(4, HIDDEN), normal(HIDDEN)),
    }
    outcome = torch.library.opcheck(
        torch.ops.adainfer.readout.default,
        (
            view(normal(5, HIDDEN)),
            dtype,
            implementation,
            norm,
            *affine,
            1e-6,
            *lenses[lens],
        ),
        test_utils=CHECKS,
    )
    assert outcome == dict.fromkeys(CHECKS, "SUCCESS")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("view", [as_is, transposed])
@pytest.mark.parametrize("return_scores", [False, True])
@pytest.mark.parametrize("classified", [False, True])
@pytest.mark.parametrize("form", ["full", "packed", "padded shortlists"])
def test_probe_is_a_proper_op(form, classified, return_scores, view, implementation):
    hidden, head = states_and_head(5, VOCAB, HIDDEN)
    head, options = in_form(form, head, rows=5, width=20, head_bias=normal(VOCAB))
    outcome = torch.library.opcheck(
        torch.ops.adainfer.probe.default,
        (
            view(hidden),
            head,
            options.get("candidates"),
            normal(3) if classified else None,
            normal(5) if classified else None,
            return_scores,
            implementation,
            options["head_bias"],
            None,
            1.0,
        ),
        test_utils=CHECKS,
    )
    assert outcome == dict.fromkeys(CHECKS, "SUCCESS")


def probing(form: str, implementation: str) -> tuple[Callable[..., Tensor], Callable[[int], Any]]:
    """A function to compile, and what makes its arguments for so many rows."""
    _, head = states_and_head(1, VOCAB, HIDDEN)
    lens, classifier = normal(HIDDEN, HIDDEN), normal(3)

    def decide(hidden: Tensor, threshold: Tensor, head: Tensor, options: dict) -> Tensor:
        found = probe(
            2 * hidden,
            head,
            **options,
            lens_weight=lens,
            soft_cap=5.0,
            scale=0.5,
            classifier=classifier,
            threshold=threshold,
            implementation=implementation,
        )
        return found.features * found.settled[:, None] + found.top1_id[:, None]

    def arguments(rows: int) -> Any:
        hidden, threshold = normal(rows, HIDDEN), normal(rows)
        packed, options = in_form(form, head, rows=rows, width=20, head_bias=normal(VOCAB))
        per_row = [hidden, threshold]
        if "shortlists" in form:
            per_row.append(options["candidates"])
        for tensor in per_row:
            torch._dynamo.mark_dynamic(tensor, 0)
        return hidden, threshold, packed, options

    return decide, arguments


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("form", FORMS)
def test_a_probe_compiles_to_one_graph_for_any_number_of_rows(form, implementation):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    decide, arguments = probing(form, implementation)
    compiled = torch.compile(decide, fullgraph=True, backend=counter)
    for rows in (3, 5, 20):
        given = arguments(rows)
        assert torch.equal(compiled(*given), decide(*given))
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", FORMS)
def test_factors_may_change_between_calls_of_a_compiled_probe(form):
    torch._dynamo.reset()
    hidden, head = states_and_head(5, VOCAB, HIDDEN)
    head, options = in_form(form, head, rows=5, width=20)

    def features(soft_cap: float, scale: float) -> Tensor:
        return probe(hidden, head, **options, soft_cap=soft_cap, scale=scale).features

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager", dynamic=True)
    for soft_cap, scale in ((5.0, 0.5), (7.0, 2.0), (4.0, 0.25)):
        assert torch.equal(compiled(soft_cap, scale), features(soft_cap, scale))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_a_readout_compiles_to_one_graph(norm, implementation):
    torch._dynamo.reset()

    def read(hidden: Tensor) -> Tensor:
        return readout(hidden, norm=norm, implementation=implementation) + 1

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    hidden = normal(5, HIDDEN)
    assert torch.equal(compiled(hidden), read(hidden))


def test_inductor_takes_a_probe():
    torch._dynamo.reset()
    decide, arguments = probing("full", "auto")
    given = arguments(5)
    compiled = torch.compile(decide, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(*given), decide(*given))
    assert given[0].device.type == DEVICE
