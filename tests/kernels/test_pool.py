"""Pooled states are sums of a request's own rows, added in order, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from typing import Any

import adainfer_kernels
import pytest
import torch
from adainfer_kernels import Pooled, torch_pooling
from adainfer_kernels.pooling import EPS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.full import needed
from tests.kernels import oracle
from tests.kernels.oracle import BACKENDS, DEVICE, DTYPES, NAN, normal
from tests.kernels.test_interface import assert_says

# On a GPU torch only checks Triton. It norms a row there by a reduction that depends on how many
# rows there are, so its sums may differ in their last bits. What is served is exact.
IS_EXACT = {"torch": DEVICE == "cpu", "triton": True}
# Of numbers of a few tens, with Triton's approximate square root.
MORE_ERROR = 1e-5 if DEVICE == "cpu" else 4e-5
SAME_NORM = 1e-6 if DEVICE == "cpu" else 4e-6  # relative, of two kernels
HIDDEN = 100  # in the Triton backend, more than one block of columns, and no multiple of one
# Gaps and lengths, in turn: how many rows are nobody's, how many the next request's.
LAYOUTS = {
    "one row": [0, 1],
    "one request": [0, 23],
    "rows on either side": [5, 9, 4],
    "side by side": [0, 3, 0, 1, 0, 17, 0, 1, 0, 8],
    "ragged": [2, 7, 1, 1, 0, 19, 3, 8, 0, 2, 6],
    "mostly nobody's": [30, 2, 11, 9, 40, 1, 7],
}


def is_needed(
    backend: str,
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    residual: bool = True,
    carried: bool = True,
) -> bool:
    """In the interpreter, only one layout, the dtypes that are served, and not all with each."""
    if backend == "torch" or DEVICE == "cuda":
        return True
    varied = dtype == torch.bfloat16 or (dtype == torch.float32 and residual and carried)
    return name == "ragged" and varied


def grid(*values: Iterable[Any]) -> list[Any]:
    return [
        pytest.param(*one, marks=() if is_needed(*one) else pytest.mark.full)
        for one in product(*values)
    ]


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_layout = pytest.mark.parametrize(("backend", "name"), grid(BACKENDS, LAYOUTS))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def spans(layout: list[int]) -> tuple[Tensor, Tensor]:
    """Starts and ends of the requests."""
    edges = torch.tensor(layout).cumsum(dim=0).to(DEVICE)
    return edges[0 : len(layout) // 2 * 2 : 2], edges[1::2]


def states(layout: list[int], dtype: torch.dtype = torch.float32, size: int = HIDDEN) -> Tensor:
    return 3 * normal(sum(layout), size, seed=1, dtype=dtype)


def assert_same(found: Pooled, right: Pooled, backend: str) -> None:
    """Bit for bit, or as near as `backend` comes to that."""
    for value, truth in ((found.last, right.last), (found.sums, right.sums)):
        if IS_EXACT[backend]:
            assert torch.equal(value, truth)
        else:
            torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-4)


def assert_accurate(found: Pooled, *arguments: Tensor | None) -> None:
    """No more error than torch's own sum in fp32, plus some roundings of sums of about 10."""
    right, naive = (oracle.pool(*arguments, sum_in=kind) for kind in (torch.float64, torch.float32))
    for value, accepted, truth in zip((found.last, found.sums), naive, right, strict=True):
        assert value.dtype == torch.float32
        excess = (value - truth).abs() - (accepted - truth).abs()
        assert excess.max().item() <= MORE_ERROR


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "residual", "carried"),
    grid(BACKENDS, LAYOUTS, DTYPES, [False, True], [False, True]),
)
def test_sums_are_as_in_fp64(backend, name, dtype, residual, carried):
    layout = LAYOUTS[name]
    arguments = (
        states(layout, dtype),
        normal(sum(layout), HIDDEN, seed=2, dtype=dtype) if residual else None,
        *spans(layout),
        5 * normal(len(layout) // 2, HIDDEN, seed=3) if carried else None,
    )
    assert_accurate(adainfer_kernels.pool(*arguments, backend=backend), *arguments)


@each_backend
@pytest.mark.parametrize("size", needed([1, 64, 129], of=[1, 7, 64, 129, 576, 4096]))
def test_any_hidden_size(size, backend):
    layout = [1, 5, 2, 10]
    arguments = states(layout, size=size), normal(sum(layout), size, seed=2), *spans(layout)
    assert_accurate(adainfer_kernels.pool(*arguments, backend=backend), *arguments)


@each_backend
def test_the_norm_is_that_of_a_readout(backend):
    """Its `eps` counts where a state is as small as this one."""
    hidden = 1e-3 * states([0, 6])
    found = adainfer_kernels.pool(hidden, None, *spans([0, 6]), backend=backend)
    norm = adainfer_kernels.Norm("rms", eps=EPS)
    right = adainfer_kernels.readout(hidden, norm, backend=backend)
    torch.testing.assert_close(found.last, right[-1:], rtol=SAME_NORM, atol=0)


@each_layout
def test_a_request_is_the_same_alone_and_among_others(backend, name):
    layout = LAYOUTS[name]
    hidden, residual = states(layout, torch.bfloat16), states(layout, torch.bfloat16).flip(0)
    starts, ends = spans(layout)
    carried = normal(len(starts), HIDDEN, seed=3)
    together = adainfer_kernels.pool(hidden, residual, starts, ends, carried, backend=backend)
    for request, (start, end) in enumerate(zip(starts, ends, strict=True)):
        alone = adainfer_kernels.pool(
            hidden[start:end],
            residual[start:end],
            *spans([0, int(end - start)]),
            carried[request : request + 1],
            backend=backend,
        )
        one = slice(request, request + 1)
        assert_same(alone, Pooled(together.last[one], together.sums[one]), backend)


@each_backend
@pytest.mark.parametrize("cuts", [[8], [1, 2, 12], range(1, 13)], ids=["two", "four", "rows"])
def test_chunks_that_carry_their_sums_on_are_the_whole(cuts, backend):
    hidden = states([0, 13])
    whole = adainfer_kernels.pool(hidden, None, *spans([0, 13]), backend=backend)
    assert_same(in_chunks(hidden, list(cuts), backend), whole, backend)


def in_chunks(hidden: Tensor, cuts: list[int], backend: str = "torch") -> Pooled:
    """The rows of one request, pooled in several calls."""
    found = None
    for start, end in pairwise([0, *cuts, len(hidden)]):
        found = adainfer_kernels.pool(
            hidden[start:end],
            None,
            *spans([0, end - start]),
            None if found is None else found.sums,
            backend=backend,
        )
    return found


@pytest.mark.parametrize("size", needed([64, 577], of=[1, 64, 577, 2048, 4096]))
@pytest.mark.parametrize("layout", [[0, 3000], [3, 1500, 0, 1, 7, 990, 0, 40]], ids=["one", "four"])
def test_thousands_of_rows_are_added_one_after_another(layout, size, threads):
    hidden = states(layout, size=size)
    starts, ends = spans(layout)
    found = adainfer_kernels.pool(hidden, None, starts, ends, backend="torch")
    every_row = torch.arange(len(hidden), device=DEVICE)
    normed = adainfer_kernels.pool(hidden, None, every_row, every_row + 1, backend="torch").last
    for sums, start, end in zip(found.sums, starts, ends, strict=True):
        right = torch.zeros_like(sums)
        for row in normed[start:end]:
            right += row
        assert_same(Pooled(sums, sums), Pooled(right, right), "torch")
    assert_same(Pooled(found.last, found.last), Pooled(*2 * [normed[ends - 1]]), "torch")


@given(data=st.data())
@settings(max_examples=40)
def test_any_layout_in_any_chunks_is_what_each_request_is_alone(data):
    """Blocks end, and chunks are cut, anywhere in a request; fp32 states of a few columns."""
    requests = data.draw(st.integers(1, 6))
    gaps = data.draw(st.lists(st.integers(0, 40), min_size=requests, max_size=requests))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=requests, max_size=requests))
    layout = [number for pair in zip(gaps, lengths, strict=True) for number in pair]
    layout.append(data.draw(st.integers(0, 9)))
    hidden, (starts, ends) = states(layout, size=5), spans(layout)
    block, part = (data.draw(st.sampled_from([1, 3, 16, 1000])) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_pooling, "BLOCK_NUMBERS", 5 * block)
        patch.setattr(torch_pooling, "PART_NUMBERS", 5 * part)
        found = adainfer_kernels.pool(hidden, None, starts, ends, backend="torch")
    for request, length in enumerate(lengths):
        cuts = data.draw(st.sets(st.integers(1, length), max_size=4)) - {length}
        alone = in_chunks(hidden[starts[request] : ends[request]], sorted(cuts))
        one = slice(request, request + 1)
        assert_same(Pooled(found.last[one], found.sums[one]), alone, "torch")


@each_layout
def test_rows_of_nobody_may_hold_anything(backend, name):
    layout = LAYOUTS[name]
    hidden, (starts, ends) = states(layout), spans(layout)
    clean = adainfer_kernels.pool(hidden, hidden, starts, ends, backend=backend)
    rows = torch.arange(len(hidden), device=DEVICE)[:, None]
    theirs = ((starts <= rows) & (rows < ends)).any(dim=1)
    hidden[~theirs] = NAN
    found = adainfer_kernels.pool(hidden, hidden, starts, ends, backend=backend)
    assert_same(found, clean, backend)


@each_backend
def test_a_row_of_nan_spoils_no_other_request(backend):
    layout = LAYOUTS["side by side"]
    hidden, (starts, ends) = states(layout), spans(layout)
    clean = adainfer_kernels.pool(hidden, None, starts, ends, backend=backend)
    hidden[starts[2]] = NAN
    found = adainfer_kernels.pool(hidden, None, starts, ends, backend=backend)
    assert found.sums.isnan().all(dim=1).tolist() == [False, False, True, False, False]
    assert torch.equal(found.last, clean.last)
    others = [0, 1, 3, 4]
    assert torch.equal(found.sums[others], clean.sums[others])


@each_layout
def test_arguments_may_have_strides_and_gradients_and_are_only_read(backend, name):
    layout = LAYOUTS[name]
    hidden, residual = states(layout), states(layout).flip(0)
    starts, ends = spans(layout)
    carried = normal(len(starts), HIDDEN, seed=3)
    right = adainfer_kernels.pool(hidden, residual, starts, ends, carried, backend=backend)
    strided = [
        torch.cat([hidden, residual], dim=1)[:, :HIDDEN],
        residual.T.contiguous().T,
        torch.stack([starts, ends], dim=1)[:, 0],
        torch.stack([starts, ends], dim=1)[:, 1],
        carried.T.contiguous().T,
    ]
    before = [argument.clone() for argument in strided]
    for number in (0, 1, 4):
        strided[number].requires_grad_()
    found = adainfer_kernels.pool(*strided, backend=backend)
    assert_same(found, right, backend)
    assert not found.sums.requires_grad
    assert all(map(torch.equal, strided, before))


@each_backend
def test_no_requests_have_no_sums(backend):
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    found = adainfer_kernels.pool(states([4]), None, none, none, backend=backend)
    assert found.last.shape == found.sums.shape == (0, HIDDEN)


def test_auto_is_triton_on_a_gpu_and_torch_elsewhere():
    forced = "triton" if DEVICE == "cuda" else "torch"
    arguments = states([0, 9]), None, *spans([0, 9])
    auto = adainfer_kernels.pool(*arguments)
    assert_same(auto, adainfer_kernels.pool(*arguments, backend=forced), forced)


@each_backend
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"hidden": torch.zeros(8)}, "hidden must be [rows, hidden size], got [8]"),
        ({"hidden": torch.zeros(3, 8).double()}, "hidden must be fp32, … got torch.float64"),
        ({"residual": torch.zeros(3, 9)}, "residual must … [3, 8], got [3, 9]"),
        ({"residual": torch.zeros(3, 8).half()}, "residual must be torch.float32, got … float16"),
        ({"starts": torch.zeros(1, 2).long()}, "starts must be [requests], got [1, 2]"),
        ({"starts": torch.zeros(2).int()}, "starts must be torch.int64, got torch.int32"),
        ({"ends": torch.zeros(1).long()}, "ends must … [2], got [1]"),
        ({"ends": torch.zeros(2)}, "ends must be torch.int64, got torch.float32"),
        ({"carried": torch.zeros(3, 8)}, "carried must … [2, 8], got [3, 8]"),
        ({"carried": torch.zeros(2, 8).half()}, "carried must be torch.float32, got … float16"),
    ],
)
def test_bad_input_is_one_clear_sentence(bad, words, backend):
    call = {"hidden": torch.zeros(3, 8), "residual": torch.zeros(3, 8)}
    call |= {"starts": torch.tensor([0, 1]), "ends": torch.tensor([1, 3])}
    with pytest.raises(ValueError) as error:  # noqa: PT011  see assert_says
        adainfer_kernels.pool(**{**call, **bad}, backend=backend)
    assert_says(error, words)
