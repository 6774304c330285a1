"""The tables of `bench_structured.py`: speed, then what drafts were worth and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.intervals import share_of
from benchmarks.offline.structured_engine import OURS, STOCK
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.reports.speedup import Speedup

Part = Mapping[str, Any]
NUMBERS = (4, 16, 64)  # in flight, whose throughput is shown
THREE_FIELDS, MIXED = ("review", "news", "question"), ("reason last", "reason first")


def table(report: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = report["parts"]
    tables = [speeds(parts), drafts(parts)]
    if report["refusals"]:
        tables.append(refused(report["refusals"]))
    return "\n\n".join([*tables, *reached(parts)]) + "\n"


def speeds(parts: Sequence[Part]) -> str:
    """Latency alone and throughput, stock / ours, by kind and backend."""
    columns = ["answers", "backend", "p50 alone, ms"]
    columns += [f"objects/s, {number} in flight" for number in NUMBERS]
    rows = []
    for part in parts:
        cells = [spoken(part, 1, "p50_ms"), *(spoken(part, one, "per_second") for one in NUMBERS)]
        rows.append([part["kind"], part["backend"], *cells])
    return markdown_grid(columns, rows, text_columns=2)


def drafts(parts: Sequence[Part]) -> str:
    """Tokens and steps of an object, the share of drafts that is kept, the first objects, texts."""
    columns = [
        "answers",
        "backend",
        "tokens",
        "steps alone",
        "drafted tokens that are kept",
        "the same, first objects",
        "speed of the first objects",
        "texts that differ from stock's (95 %)",
        "stock's in other batches",
    ]
    rows = []
    for part in parts:
        alone, first, texts = part["in_flight"][0], part["first"], part["texts"]
        objects = alone["objects"] * len(alone[STOCK]["seconds"])
        steps = " / ".join(f"{alone[name]['steps'] / objects:.1f}" for name in (STOCK, OURS))
        every = [one[OURS] for one in part["in_flight"]]
        rows.append(
            [
                part["kind"],
                part["backend"],
                f"{alone[STOCK]['tokens'] / objects:.1f}",
                steps,
                kept_of(every),
                kept_of([first[OURS]]),
                Speedup.of(first[STOCK]["seconds"], first[OURS]["seconds"]).text,
                share_of(texts["differ"] / texts["compared"], texts["compared"]),
                share_of(texts["stock_differ"] / texts["stock_compared"], texts["stock_compared"]),
            ]
        )
    return markdown_grid(columns, rows, text_columns=2)


def refused(refusals: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of a step by the rows of each request that are refused."""
    counts = list(dict.fromkeys(one["refused"] for one in refusals))
    rows = []
    for in_flight in dict.fromkeys(one["in_flight"] for one in refusals):
        times = [one["milliseconds"] for one in refusals if one["in_flight"] == in_flight]
        cells = [f"{time:.1f} ({time / times[0]:.2f}x)" for time in times]
        rows.append([str(in_flight), *cells])
    columns = ["requests in a step", *(f"{count} refused rows each, ms" for count in counts)]
    return markdown_grid(columns, rows, text_columns=0)


def reached(parts: Sequence[Part]) -> list[str]:
    """A line for each aim that is missed; an aim is missed if its interval lies beyond it."""
    missed = []
    for part in parts:
        kind, name = part["kind"], f"{part['kind']} ({part['backend']})"
        aims: list[tuple[int, str, float, float]] = []
        if kind in THREE_FIELDS:
            aims = [(1, "p50_ms", 0, 0.30), (16, "per_second", 1.3, 99), (64, "per_second", 1, 99)]
        elif kind in MIXED:
            aims = [(number, "per_second", 1, 99) for number in (1, *NUMBERS)]
        elif kind == "free text":
            aims = [(number, "per_second", 0.98, 99) for number in (1, *NUMBERS)]
        for number, key, least, most in aims:
            found = ratio(part, number, key)
            if not least <= found.value <= most:
                clearly = "clearly " if found.most < least or found.least > most else ""
                what = "latency" if key == "p50_ms" else "throughput"
                missed.append(f"{name}, {number} in flight: {what} {clearly}beyond the aim")
    return [f"Aims that are missed: {'; '.join(missed) or 'none'}."]


def spoken(part: Part, number: int, key: str) -> str:
    """The medians of stock and ours, and their ratio."""
    stock, ours = (statistics.median(values(part, number, name, key)) for name in (STOCK, OURS))
    return f"{stock:.3g} / {ours:.3g} = {ratio(part, number, key).bold}"


def ratio(part: Part, number: int, key: str) -> Speedup:
    """Ours / stock over the rounds."""
    stock, ours = (values(part, number, name, key) for name in (STOCK, OURS))
    return Speedup.of(ours, stock)


def values(part: Part, number: int, name: str, key: str) -> list[float]:
    """A value of each round."""
    [found] = [one for one in part["in_flight"] if one["number"] == number]
    if key == "per_second":
        return [found["objects"] / seconds for seconds in found[name]["seconds"]]
    return list(found[name][key])


def kept_of(counts: Sequence[Mapping[str, int]]) -> str:
    """The share of drafted tokens that was kept, and how many were drafted."""
    drafted, kept = (sum(one[key] for one in counts) for key in ("drafted", "kept"))
    return f"{kept / drafted:.2f} of {drafted}" if drafted else "none"
