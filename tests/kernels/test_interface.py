"""Bad input is one clear sentence, and which backend runs is never a surprise."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import adainfer_kernels
import pytest
import torch
from adainfer_kernels import Head, Lens, Norm
from adainfer_kernels.backend import resolve_backend

from tests.kernels.flat import probe, readout
from tests.kernels.oracle import (
    BACKENDS,
    DEVICE,
    FORMS,
    NAN,
    in_form,
    normal,
    same,
    states_and_head,
)

ROWS, VOCAB, HIDDEN = 3, 10, 8


def floats(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=DEVICE)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=DEVICE, dtype=torch.int64)


# What the sentence says; … stands for any words.
BAD_PARAMETERS = [
    (lambda: Norm("batch"), """Norm.kind must be "rms" or "layer", got 'batch'"""),
    (lambda: Norm(None), """Norm.kind must be "rms" or "layer", got None"""),
    (lambda: Norm("rms", floats(1, 8)), "Norm.weight must … [8], got [1, 8]"),
    (lambda: Norm("rms", floats(9), floats(8)), "Norm.bias must … [9], got [8]"),
    (lambda: Norm("layer", bias=floats(1, 8)), "Norm.bias must … [8], got [1, 8]"),
    (lambda: Lens(floats(8, 9)), "Lens.weight must … [8, 8], got [8, 9]"),
    (lambda: Lens(floats(8)), "Lens.weight must … [8, 8], got [8]"),
    (lambda: Lens(floats(8, 8), bias=floats(7)), "Lens.bias must … [8], got [7]"),
    (lambda: Head(floats(10)), "Head.weight must be [n, hidden size], got [10]"),
    (lambda: Head(floats(10, 8), floats(9)), "Head.bias must … [10], got [9]"),
    (lambda: Head(floats(0, 8)), "Head.weight needs at least two rows, got 0"),
    (lambda: Head(floats(1, 8)), "Head.weight needs at least two rows, got 1"),
    (lambda: Head(floats(10, 8), soft_cap=0.0), "Head.soft_cap must be positive, got 0.0"),
    (lambda: Head(floats(10, 8), soft_cap=-1.0), "Head.soft_cap must be positive, got -1.0"),
    (lambda: Head(floats(10, 8), soft_cap=NAN), "Head.soft_cap must be positive, got nan"),
    (lambda: Head(floats(10, 8), scale=0.0), "Head.scale must be positive, got 0.0"),
    (lambda: Head(floats(10, 8), scale=-2.0), "Head.scale must be positive, got -2.0"),
    (lambda: Head(floats(10, 8), scale=NAN), "Head.scale must be positive, got nan"),
]
BAD_READOUTS = [
    ({"hidden": floats(8)}, "hidden must be [rows, hidden size], got [8]"),
    ({"hidden": floats(2, 3, 8)}, "hidden must be [rows, hidden size], got [2, 3, 8]"),
    ({"norm": Norm("rms", floats(9))}, "norm is for a hidden size of 9, got states [3, 8]"),
    ({"norm": Norm("rms", bias=floats(1))}, "norm is for a hidden size of 1, got states [3, 8]"),
    ({"lens": Lens(floats(7, 7))}, "lens is for a hidden size of 7, got states [3, 8]"),
    (
        {"norm": Norm("rms"), "backend": "cuda-magic"},
        """backend must be "auto", "triton" or "torch", got 'cuda-magic'""",
    ),
]
BAD_PROBES = [
    ({"head": Head(floats(10, 9))}, "head is for a hidden size of 9, got states [3, 8]"),
    ({"candidates": ids(5).int()}, "candidates must be int64, got torch.int32"),
    ({"candidates": floats(5)}, "candidates must be int64, got torch.float32"),
    ({"candidates": ids()}, "candidates must be [n], the same for every row, got []"),
    ({"candidates": ids(3, 5)}, "candidates must be [n], the same for every row, got [3, 5]"),
    ({"candidates": ids(1)}, "candidates needs at least two ids, got 1"),
    ({"candidates": ids(0)}, "candidates needs at least two ids, got 0"),
    ({"classifier": floats(3)}, "classifier and threshold go together"),
    ({"threshold": floats(3)}, "classifier and threshold go together"),
    ({"classifier": floats(2), "threshold": floats(3)}, "classifier must … [3], got [2]"),
    ({"classifier": floats(3), "threshold": floats(4)}, "threshold must … [3], got [4]"),
]


def assert_says(error: pytest.ExceptionInfo[ValueError], words: str) -> None:
    parts = words.split(" … ")
    assert re.search(".*".join(map(re.escape, parts)), str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("make", "words"), BAD_PARAMETERS)
def test_bad_parameters_are_one_clear_sentence(make, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011  see assert_says
        make()
    assert_says(error, words)


CALLS = [
    *((adainfer_kernels.readout, *one) for one in BAD_READOUTS),
    *((adainfer_kernels.probe, *one) for one in BAD_READOUTS + BAD_PROBES),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "bad", "words"), CALLS)
def test_bad_input_is_one_clear_sentence(function, bad, words, backend):
    call = {"hidden": floats(ROWS, HIDDEN), "backend": backend}
    if function is adainfer_kernels.probe:
        call["head"] = Head(floats(VOCAB, HIDDEN))
    with pytest.raises(ValueError) as error:  # noqa: PT011  see assert_says
        function(**{**call, **bad})
    assert_says(error, words)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_read_as_any_tensor(form, backend):
    hidden, head = states_and_head(5, 1500, 40)
    head, options = in_form(form, head, width=30, head_bias=normal(1500))
    options |= {"norm_weight": normal(40), "lens_weight": normal(40, 40)}
    right = probe(hidden, head, **options, backend=backend)
    options |= {
        name: torch.nn.Parameter(value)
        for name, value in options.items()
        if value is not None and value.is_floating_point()
    }
    found = probe(hidden.requires_grad_(), torch.nn.Parameter(head), **options, backend=backend)
    assert same(found, right)


@pytest.mark.parametrize("form", FORMS)
def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(form):
    hidden, head = states_and_head(5, 1500, 40)
    head, options = in_form(form, head, width=30)
    forced = "triton" if DEVICE == "cuda" else "torch"
    auto = probe(hidden, head, **options)
    assert same(auto, probe(hidden, head, **options, backend=forced))
    assert torch.equal(readout(hidden), readout(hidden, backend=forced))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("has_triton", [False, True])
def test_auto_needs_no_triton(has_triton, device, monkeypatch):
    spec = importlib.util.find_spec("triton") if has_triton else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    right = "triton" if has_triton and device == "cuda" else "torch"
    assert resolve_backend("auto", torch.device(device)) == right


def test_forced_triton_without_a_gpu_or_its_interpreter_is_an_error_that_names_the_ways_out(
    monkeypatch,
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, head = normal(3, 8).cpu(), normal(10, 8).cpu()
    ways_out = 'cpu tensors: move them to a GPU, pass "torch", or set TRITON_INTERPRET=1'
    for norm in ("rms", None):
        with pytest.raises(RuntimeError, match=ways_out):
            probe(hidden, head, norm=norm, backend="triton")
    with pytest.raises(RuntimeError, match=ways_out):
        readout(hidden, backend="triton")


def test_forced_triton_without_the_package_is_an_error_that_names_the_ways_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for device in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match='pip install triton, or pass "torch"'):
            resolve_backend("triton", torch.device(device))
    with pytest.raises(RuntimeError, match='pip install triton, or pass "torch"'):
        probe(normal(3, 8), normal(10, 8), backend="triton")


FORCED_TORCH = """
import sys
import torch
from adainfer_kernels import Head, probe
hidden, head = torch.ones(2, 8), Head(torch.ones(10, 8))
for candidates in (None, torch.arange(10), torch.arange(4)):
    probe(hidden, head, candidates=candidates, backend="torch")
assert "adainfer_kernels.torch_probe" in sys.modules
unwanted = ("vllm", "adainfer_kernels.triton_")  # torch itself may load Triton
assert not [name for name in sys.modules if name.startswith(unwanted)]
"""


def test_torch_loads_neither_the_triton_backend_nor_vllm():
    done = subprocess.run(
        [sys.executable, "-c", FORCED_TORCH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
