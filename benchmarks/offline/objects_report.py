"""The tables of `bench_objects.py`: what is written early and what differs, then speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.intervals import share_of
from benchmarks.offline.object_rounds import DRAFTS, STUDENT
from benchmarks.offline.structured_engine import OURS, STOCK
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.reports.speedup import Speedup

Part = Mapping[str, Any]
ENGINES = (DRAFTS, OURS, STUDENT)
SPOKEN = {DRAFTS: DRAFTS, OURS: "a policy", STUDENT: "and a student"}


def table(report: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = report["parts"]
    left_out = [part["schema"] for part in parts if part["student"] is False]
    tables = [early(parts), speeds(parts)]
    if left_out:
        tables.append(f"`calibrate` left the student out for {', '.join(left_out)}.")
    return "\n\n".join([*tables, *reached(parts)]) + "\n"


def early(parts: Sequence[Part]) -> str:
    """The share that is written after the prompt, the layers and rows spared, what differs."""
    columns = [
        "objects",
        "served with",
        "written early",
        "layers saved",
        "rows of an object, stock / served",
        "objects that differ from full depth's (95 %)",
        "by field",
        "drafts from stock",
        "stock from itself in other batches",
    ]
    rows = []
    for part in parts:
        unseen = part["unseen"]
        count, engines = unseen["compared"], unseen["engines"]
        for name in (OURS, STUDENT):
            if name not in engines:
                continue
            own = engines[name]
            fields = ", ".join(f"{path} {share}" for path, share in own["by_field"].items())
            rows.append(
                [
                    part["schema"],
                    SPOKEN[name],
                    share_of(own["early"] / count, count, digits=0),
                    share_of(1 - own["layers_run"] / own["layers_possible"], count),
                    f"{engines[STOCK]['rows'] / count:.0f} / {own['rows'] / count:.0f}",
                    share_of(own["differ"] / count, count),
                    fields,
                    share_of(engines[DRAFTS]["differ"] / count, count),
                    share_of(engines[STOCK]["differ"] / count, count),
                ]
            )
    return markdown_grid(columns, rows, text_columns=2)


def speeds(parts: Sequence[Part]) -> str:
    """Latency alone and throughput by the number in flight, beside stock and beside drafts."""
    numbers = [one["number"] for one in parts[0]["in_flight"]] if parts else []
    columns = ["objects", "served with", "p50 alone, ms"]
    columns += [f"throughput, {number} in flight" for number in numbers]
    columns += [f"beside drafts, {number}" for number in numbers]
    rows = []
    for part in parts:
        names = [name for name in ENGINES if name in part["in_flight"][0]]
        stock = statistics.median(part["in_flight"][0][STOCK]["p50_ms"])
        rows.append([part["schema"], "stock", f"{stock:.0f}", *["1"] * len(numbers), *[""] * 3])
        for name in names:
            alone = part["in_flight"][0]
            p50 = statistics.median(alone[name]["p50_ms"])
            shorter = Speedup.of(alone[name]["p50_ms"], alone[STOCK]["p50_ms"]).bold
            cells = [
                Speedup.of(one[STOCK]["seconds"], one[name]["seconds"]).bold
                for one in part["in_flight"]
            ]
            beside = [
                "" if name == DRAFTS else Speedup.of(*seconds_of(one, name)).bold
                for one in part["in_flight"]
            ]
            rows.append([part["schema"], SPOKEN[name], f"{p50:.0f} ({shorter})", *cells, *beside])
    return markdown_grid(columns, rows, text_columns=2)


def seconds_of(one: Mapping[str, Any], name: str) -> tuple[list[float], list[float]]:
    """The seconds of drafts alone and of an engine, in each round."""
    return one[DRAFTS]["seconds"], one[name]["seconds"]


def reached(parts: Sequence[Part]) -> list[str]:
    """A line for each aim that is missed; an aim is missed if its interval lies beyond it."""
    missed = []
    for part in parts:
        for name in (OURS, STUDENT):
            by_number = {one["number"]: one for one in part["in_flight"]}
            if name not in by_number[1]:
                continue
            what = f"{part['schema']}, {SPOKEN[name]}"
            alone, many = by_number[1], by_number[16]
            if Speedup.of(alone[name]["p50_ms"], alone[STOCK]["p50_ms"]).least > 0.25:
                missed.append(f"{what}: latency alone above 0.25x")
            if Speedup.of(many[STOCK]["seconds"], many[name]["seconds"]).most < 2.5:
                missed.append(f"{what}: throughput with 16 in flight below 2.5x")
            missed += [
                f"{what}: slower than drafts alone with {number} in flight"
                for number, one in by_number.items()
                if Speedup.of(*seconds_of(one, name)).most < 0.98
            ]
    return [f"Aims that are missed: {'; '.join(missed) or 'none'}."]
