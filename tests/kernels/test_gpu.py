"""What only a GPU can show: CUDA graphs, memory, autotuning."""

from __future__ import annotations

import pytest
import torch
from adainfer_kernels import Pooled, ProbeResult, pool, tuning

from tests.kernels.flat import probe
from tests.kernels.oracle import (
    BACKENDS,
    DEVICE,
    FORMS,
    check_probe,
    in_form,
    normal,
    same,
    states_and_head,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 64])
def test_a_captured_probe_replays_on_new_inputs(rows, form):
    hidden, head = states_and_head(rows, 32000, 1024, torch.bfloat16)
    head, options = in_form(form, head, width=30)
    threshold, weight = normal(rows), normal(1024, dtype=torch.bfloat16)
    options |= {"norm_weight": weight, "classifier": normal(3), "threshold": threshold}

    def run() -> ProbeResult:
        return probe(hidden, head, **options)

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # compiles before the capture
        run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        hidden.copy_(normal(rows, 1024, seed=seed))
        threshold.copy_(normal(rows, seed=seed + 100))
        graph.replay()
        eager = run()
        assert same(captured, eager)
        assert torch.equal(captured.settled, eager.settled)


def test_a_captured_pool_replays_on_new_inputs():
    hidden, starts, ends = normal(64, 576), torch.tensor([0, 9, 40]), torch.tensor([9, 40, 41])
    starts, ends, carried = starts.to(DEVICE), ends.to(DEVICE), normal(3, 576)

    def run() -> Pooled:
        return pool(hidden, hidden, starts, ends, carried)

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # compiles before the capture
        run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        hidden.copy_(normal(64, 576, seed=seed))
        starts += 1
        ends += 1
        graph.replay()
        eager = run()
        assert torch.equal(captured.last, eager.last)
        assert torch.equal(captured.sums, eager.sums)


def extra_memory(rows: int, vocab: int, backend: str) -> int:
    """Bytes that a probe holds at its peak, beyond its arguments."""
    hidden = torch.zeros(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    head = torch.zeros(vocab, 1024, device=DEVICE, dtype=torch.bfloat16)
    probe(hidden, head, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    probe(hidden, head, backend=backend)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_with_the_vocabulary(backend):
    small, large = (extra_memory(64, vocab, backend) for vocab in (32000, 128256))
    assert large - small < MIB, "the scores of the difference alone would be 23 MiB in fp32"


@pytest.mark.parametrize("rows", [1, 20, 64, 300])
def test_an_autotuned_launch_gives_the_same_result(rows, monkeypatch):
    hidden, head = states_and_head(rows, 32000, 576, torch.bfloat16)
    fixed = probe(hidden, head, backend="triton")
    monkeypatch.setattr(tuning, "fixed_shape", lambda *arguments: None)
    autotuned = check_probe(hidden, head, {}, "triton")
    assert torch.allclose(autotuned.top1, fixed.top1)
    assert torch.allclose(autotuned.lse, fixed.lse)
