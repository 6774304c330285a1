"""Tables of `docs/results.md` about speed alone: generated text, and scripted exits."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

from benchmarks.common.intervals import share_of
from benchmarks.front_page import load
from vllm_adainfer.offline.facts.document import markdown_grid, markdown_table
from vllm_adainfer.offline.reports.speedup import Speedup


def throughput_table() -> list[str]:
    """Speed-up by skipped layers, over all one-token cases of the synthetic benchmark."""
    report = load("throughput")
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in report["cases"]:
        if row["output"] == 1:
            cases.setdefault(row["scenario"], []).append(row)
    lengths = {row["length"] for rows in cases.values() for row in rows}
    batches = {row["batch"] for rows in cases.values() for row in rows}
    cells = []
    for name, rows in cases.items():
        keys = "layers_saved", "speedup", "of_bound"
        saved, speedups, shares = ([row[key] for row in rows] for key in keys)
        cells.append(
            {
                "scenario": name,
                "cases": str(len(rows)),
                "share of layers skipped, as scripted": f"{mean(saved):.2f}",
                "speed-up, median of cases (range)": (
                    f"**{median(speedups):.2f}x** ({min(speedups):.2f} to {max(speedups):.2f})"
                ),
                "share of the possible speed-up, median (lowest)": (
                    f"{median(shares):.2f} ({min(shares):.2f})"
                ),
            }
        )

    return [
        f"Scripted exits (synthetic), {min(lengths)} to {max(lengths)} prompt tokens x "
        f"{min(batches)} to {max(batches)} requests, one token out:",
        "",
        markdown_table(cells),
    ]


def generation_table() -> list[str]:
    """Speed by batch size, then the headroom and the changed tokens."""
    report = load("generation")
    variants = list(dict.fromkeys(row["variant"] for row in report["speed"]))
    speed = {(row["batch"], row["variant"]): row for row in report["speed"]}
    cells = []
    for batch in dict.fromkeys(row["batch"] for row in report["speed"]):
        stock, *ours = (speed[batch, variant] for variant in variants)
        speedups = [Speedup.read(row, "speedup").bold for row in ours]
        cells.append([str(batch), f"{stock['tokens_per_second']:.0f}", *speedups])
    columns = ["requests at once", f"{variants[0]}, tokens/s", *variants[1:]]
    lines = [
        "Generated text (GSM8K, AlpacaEval, Spec-Bench prompts), SmolLM2-135M-Instruct, up to "
        f"{report['max_tokens']} tokens, epsilon {report['epsilon']:g} per token at delta "
        f"{report['delta']:g}:",
        "",
        markdown_grid(columns, cells, text_columns=0),
    ]
    changed = {
        name: mean(row["disagreement"] for row in report["quality"] if row["variant"] == name)
        for name in variants
    }
    texts = len({row["data"] for row in report["quality"]}) * report["prompts"]
    one, depth, room = speed[1, "exact"], report["layers_total"], report["oracle_layers_run"]
    left = {int(layers): count for layers, count in one["exit_histogram"].items()}
    lines += [
        "",
        f"Headroom: an oracle exiting at the first correct layer would run {room:.1f} of {depth} "
        "layers. One request at a time under `exact`, "
        f"{sum(left.values()) - left.get(depth, 0)} of {sum(left.values())} tokens exited after "
        f"{', '.join(map(str, report['exit_points']))} layers without an LM head. Tokens that "
        f"differ from never exiting, up to a text's first difference, in {texts} texts: "
        f"{share_of(changed['exact'], texts)} under `exact`, "
        f"{share_of(changed['stock'], texts)} in stock vLLM (by rounding).",
    ]
    return lines


def startup_line() -> list[str]:
    """Time and memory of an engine's start, and how all engines of these tables ran."""
    ratios = load("startup")["ratios"]
    cold, warm, memory = (
        Speedup.read(ratios, name).text for name in ("cold_seconds", "warm_seconds", "bytes")
    )
    versions = load("throughput")["provenance"]["versions"]
    return [
        "An engine with four exit points (six segments) relative to stock, the median of the "
        f"rounds' ratios: cold start {cold}, start with compiled code in the cache {warm}, memory "
        f"{memory}. All engines: torch {versions['torch']}, compiled, bfloat16, vLLM's default "
        "CPU settings (one core computes, one serves), unless a table says otherwise.",
    ]
