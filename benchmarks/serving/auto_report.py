"""The Markdown of a server that calibrates itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common.intervals import share_of
from benchmarks.serving.serve_report import OURS, STOCK
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.reports.speedup import Speedup

GROUPS = 8  # rows of the table over time
RECENT = 4  # blocks over which the layers saved are averaged


def table(report: Mapping[str, Any]) -> str:
    """All traffic: each in two tables, by kind and over time."""
    parts = [f"Processor: {report['provenance']['cpu']}.\n"]
    for title, one in report["traffic"].items():
        parts += [
            f"### {title}\n",
            f"{one['git']}, {one['model']}, {one['requests']:,} requests, {one['at_once']} in "
            f"flight, at most {one['epsilon']:g} of the answers of a kind changed (confidence "
            f"{1 - one['delta']:.0%}).\n",
            f"{by_kind(one)}\n",
            re.sub(r" \([\d.]+%\)", "", one["of_all"] or "") + "\n",
            f"{over_time(one['blocks'])}\n",
        ]
    return "\n".join(parts)


def by_kind(traffic: Mapping[str, Any]) -> str:
    """A row for each kind."""
    rows = []
    for kind in traffic["kinds"]:
        ledger, readings = kind["ledger"] or {}, kind["readings"]
        recent = round(RECENT * kind["requests"] / len(traffic["blocks"]))  # about so many
        before, after = (
            share_of(changed / count, count) if count else "-"
            for changed, count in zip(kind["changed"], kind["compared"], strict=True)
        )
        bounds = [bound for bound in ledger.get("bounds", ()) if bound is not None]
        claim = f"{min(bounds):.0f} of {ledger['requests']:,}" if ledger.get("decided") else "-"
        closed = "" if kind["closed_at"] is None else f", closed at {kind['closed_at']:,}"
        opened = "never"
        for event in traffic["events"]:
            if event["kind"] == kind["kind"] and event["event"] == "opened":
                opened = f"{event['requests']:,}"
        rows.append(
            [
                kind["title"],
                f"{kind['requests']:,}",
                opened + closed,
                *(
                    share_of(readings[at]["layers_saved"], recent, 0) if at in readings else "-"
                    for at in ("2000", "5000")
                ),
                share_of(kind["layers_saved"], recent, 0),
                before,
                after,
                f"{kind['changed'][1]:,}",
                claim,
                f"{ledger.get('rate', 1):g}",
            ]
        )
    names = [
        "kind",
        "requests",
        "open from request",
        "layers saved (95 %): after 2,000 requests",
        "after 5,000",
        "at the end",
        "unlike stock before it opens (95 %)",
        "since (95 %)",
        "these are",
        "changed at most, by the ledger",
        "still compared",
    ]
    return markdown_grid(names, rows)


def over_time(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Throughput and latency, in some rows."""
    rows, start = [], 0
    for group in np.array_split(np.arange(len(blocks)), min(GROUPS, len(blocks))):
        some = [blocks[index] for index in group.tolist()]
        rates = {s: [b[s]["requests_per_second"] for b in some] for s in (STOCK, OURS)}
        rows.append(
            [
                f"{start:,} to {some[-1]['requests']:,}",
                f"{some[-1]['minutes']:.1f}",
                *(f"{np.mean(rates[s]):.1f}" for s in (STOCK, OURS)),
                Speedup.of(rates[OURS], rates[STOCK]).text,
                *(
                    share_of(np.mean([b[key] for b in some]), some[-1]["requests"] - start, 0)
                    for key in ("layers_saved", "compared")
                ),
                *(f"{np.median([b[s]['p50_ms'] for b in some]):.0f}" for s in (STOCK, OURS)),
            ]
        )
        start = some[-1]["requests"]
    names = [
        "requests",
        "until minute",
        "stock, requests/s",
        "ours",
        "ratio (range of blocks)",
        "layers saved, of kinds (95 %)",
        "compared (95 %)",
        "stock p50, ms",
        "ours",
    ]
    return markdown_grid(names, rows)
