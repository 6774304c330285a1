"""The probe kernel against plain torch: time, bandwidth, memory.

    .venv/bin/python benchmarks/bench_probe_kernel.py

Each cell is one model shape, one form of candidates and one number of rows. Weights are random,
since time does not depend on them. Providers, interleaved on a CPU:

    naive    norm, matmul, softmax, topk(2), as in the paper's code
    compile  the same function through torch.compile, specialised for the cell
    ours     adainfer_kernels.probe, checked against naive first
    matmul   only the product with the head: a lower bound for probes of the whole head on a CPU

On a GPU each call replays a CUDA graph with a cold L2 cache, so Python's launch overhead is not
timed.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from adainfer_kernels import Head, Norm, NormKind, probe
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vllm_adainfer.offline.provenance import provenance

# name: (vocabulary, hidden size, kind of the final norm)
SHAPES: dict[str, tuple[int, int, NormKind]] = {
    "SmolLM2-135M": (49152, 576, "rms"),
    "Llama-2-7B": (32000, 4096, "rms"),
    "OPT-6.7B": (50272, 4096, "layer"),
    "Llama-3-8B": (128256, 4096, "rms"),
    "Qwen3-8B": (151936, 4096, "rms"),
    "Llama-3-70B": (128256, 8192, "rms"),
}
FORMS = ("full", "labels")
ROWS = (1, 8, 64, 256)
LABELS = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 40, 1.0

Call = Callable[[], Any]


def naive(
    hidden: Tensor, head: Tensor, ids: Tensor | None, kind: str, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """top1 id, top_prob and gap in plain torch."""
    size = hidden.shape[-1:]
    if kind == "layer":
        state = torch.nn.functional.layer_norm(hidden, size, weight, bias, 1e-6)
    else:
        state = torch.nn.functional.rms_norm(hidden, size, weight, 1e-6)
    values, columns = (state @ head.T).float().softmax(dim=-1).topk(2)
    best = columns[:, 0] if ids is None else ids[columns[:, 0]]
    return best, values[:, 0], values[:, 0] - values[:, 1]


def cells(shape: str, rows_list: list[int]) -> Iterator[tuple[str, int, dict[str, Call], int]]:
    """Form, rows, providers and the bytes that must be read, for each cell of a shape."""
    vocabulary, size, kind = SHAPES[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    head = normal(vocabulary, size).mul_(size**-0.5)
    weight, bias = normal(size), normal(size) if kind == "layer" else None
    for form in FORMS:
        for rows in rows_list:
            hidden = normal(rows, size)
            ids: Tensor | None = None
            scored = head
            if form == "labels":
                ids = torch.randperm(vocabulary, generator=generator, device=DEVICE)[:LABELS]
                scored = head[ids]
            arguments = (hidden, scored, ids, kind, weight, bias)
            torch._dynamo.reset()
            compiled = torch.compile(naive, dynamic=False)
            providers: dict[str, Call] = {
                "naive": lambda a=arguments: naive(*a),
                "compile": lambda a=arguments, c=compiled: c(*a),
                "ours": lambda a=arguments: ours(*a),
            }
            if form == "full":
                providers["matmul"] = lambda a=arguments: a[0] @ a[1].T
            yield form, rows, providers, 2 * size * (len(scored) + rows)


def ours(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor | None,
    kind: NormKind,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers from the kernel."""
    found = probe(hidden, Head(head), Norm(kind, weight, bias), candidates=ids)
    top_prob, gap = found.features.unbind(dim=-1)
    return found.top1_id, top_prob, gap


def check(providers: dict[str, Call]) -> None:
    """Fail unless ours agrees with naive, up to the rounding of bfloat16 logits."""
    expected, found = providers["naive"](), providers["ours"]()
    clear = expected[2] > 0.02
    if not torch.equal(expected[0][clear], found[0][clear]):
        raise SystemExit(
            "the kernel and plain torch find different tokens: do not trust these times"
        )
    for left, right in zip(expected[1:], found[1:], strict=True):
        torch.testing.assert_close(left, right, rtol=0.05, atol=1e-3)


def measure(providers: dict[str, Call]) -> dict[str, list[float]]:
    """Seconds of each call: median, 20th and 80th percentile."""
    if DEVICE == "cuda":
        return {name: _replayed(call) for name, call in providers.items()}
    for call in providers.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS * len(providers):
            break
        names = list(providers)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            before = time.perf_counter()
            providers[name]()
            seconds[name].append(time.perf_counter() - before)
    return {name: _quantiles(runs) for name, runs in seconds.items()}


def _quantiles(runs: list[float]) -> list[float]:
    fifths = statistics.quantiles(runs, n=5, method="inclusive")
    return [statistics.median(runs), fifths[0], fifths[3]]


def _replayed(call: Call) -> list[float]:
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile, autotune, allocate
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return [ms / 1e3 for ms in do_bench(graph.replay, quantiles=[0.5, 0.2, 0.8])]


def peak_bytes(call: Call) -> int:
    """Peak bytes that torch's allocator held during a call, beyond those before it."""
    call()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    moves = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for move in sorted(moves, key=lambda event: event["ts"]):
        held += move["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def bandwidth() -> float:
    """Bytes per second that this device reaches: the better of a large copy and a large sum."""
    source = torch.ones(1 << 29, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    rates = []
    for call, moved in ((lambda: target.copy_(source), 2), (lambda: source.sum(), 1)):
        [median, *_] = measure({"call": call})["call"]
        rates.append(moved * source.numel() * source.element_size() / median)
    return max(rates)


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    rate, versions = result["bandwidth_bytes_per_second"], result["provenance"]["versions"]
    lines = [
        f"{result['device']} ({result['provenance']['cpu']}, {result['threads']} threads), "
        f"{result['dtype']}, torch {versions['torch']}; reaches {rate / 1e9:.0f} GB/s.",
        "",
        "| model | candidates | rows | naive, ms | torch.compile, ms | ours, ms (p20 to p80) "
        "| over naive | of bandwidth | peak extra memory, naive / ours, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        naive_ms, compile_ms = (
            f"{cell['seconds'][name][0] * 1e3:.3g}" for name in ("naive", "compile")
        )
        median, low, high = (f"{value * 1e3:.3g}" for value in cell["seconds"]["ours"])
        memory = " / ".join(f"{cell['peak_bytes'][name] / 1e6:.3g}" for name in ("naive", "ours"))
        lines.append(
            f"| {cell['model']} | {cell['candidates']} | {cell['rows']} | {naive_ms} "
            f"| {compile_ms} | {median} ({low} to {high}) | {cell['over_naive']:.2f}x "
            f"| {cell['share_of_bandwidth']:.0%} | {memory} |"
        )
    return "\n".join(lines)


def main(
    output: Annotated[Path | None, typer.Option(help="default: named after the device")] = None,
    models: Annotated[str, typer.Option(help="comma-separated")] = ",".join(SHAPES),
    rows: Annotated[str, typer.Option(help="comma-separated")] = ",".join(map(str, ROWS)),
) -> None:
    """Measure all cells, write the result and print its table."""
    rate = bandwidth()
    name = torch.cuda.get_device_name().split()[1].lower() if DEVICE == "cuda" else "cpu"
    output = output or Path(__file__).parent / "results" / f"probe_kernel_{name}.json"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16",
        "bandwidth_bytes_per_second": rate,
        "cells": [],
        "provenance": provenance(),
    }
    with torch.inference_mode():
        for model in models.split(","):
            for form, count, providers, moved in cells(model, [int(n) for n in rows.split(",")]):
                check(providers)
                seconds = measure(providers)
                cell = {
                    "model": model,
                    "candidates": form,
                    "rows": count,
                    "seconds": seconds,
                    "over_naive": seconds["naive"][0] / seconds["ours"][0],
                    "bytes": moved,
                    "share_of_bandwidth": moved / seconds["ours"][0] / rate,
                    "peak_bytes": {k: peak_bytes(providers[k]) for k in ("naive", "ours")},
                }
                result["cells"].append(cell)
                typer.echo(markdown(result).splitlines()[-1])
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(result) + "\n")
    typer.echo(f"wrote {output} and its table beside it")


if __name__ == "__main__":
    typer.run(main)
