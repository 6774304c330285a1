"""The Markdown report of `bench_everything.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.soak.soak_verdict import SETTLED_SECONDS, growth_once_settled
from vllm_adainfer.offline.facts.document import markdown_grid, markdown_table

COUNTS = ("sent", "answered", "ties", "wrong", "lost", "refused", "left")


EXPLAINED = (
    "A tie is an answer that differed in a batch but was that of the quiet pass when asked for "
    "again, alone. Tokens are equal where no client left, and rows where also no request was "
    "preempted (its rows come twice). For each request that its client left, the plugin may count "
    "some more tokens (decided before the engine heard of it), and rows of a prompt whose first "
    "token was never sent."
)


def growth(samples: list[Mapping[str, float]]) -> dict[str, float]:
    """MiB gained per 10,000 requests of a soak, since its first and its second memory sample.

    The first half minute fills pools and caches. A soak under a minute has no third sample.
    """
    found = {}
    for name, first in (("all", samples[0]), ("after_half_a_minute", samples[1])):
        requests = max(samples[-1]["sent"] - first["sent"], 1)
        for kind in ("rss", "uss"):
            found[f"{kind}_{name}"] = 10_000 * (samples[-1][kind] - first[kind]) / requests
    return found


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row per scenario, then counters and remarks."""
    scenarios = report["scenarios"]
    requests = markdown_grid(
        [
            "scenario",
            "sent",
            "answered",
            "tie",
            "wrong",
            "lost",
            "refused",
            "left by the client",
            "USS before / after, MiB",
            "RSS before / after, MiB",
        ],
        [
            [
                row["name"],
                *(f"{row['requests'][key]:,}" for key in COUNTS),
                *(
                    " / ".join(f"{at[kind]:,.0f}" for at in row["memory"].values())
                    for kind in ("uss", "rss")
                ),
            ]
            for row in scenarios
        ],
    )
    counted = markdown_table(
        [
            {
                "scenario": row["name"],
                "tokens decided / by vLLM": (
                    f"{one['tokens_decided']:,.0f} / {one['tokens_generated']:,.0f}"
                ),
                "rows / by vLLM": f"{one['rows']:,.0f} / {one['rows_by_vllm']:,.0f}",
                "layers saved": f"{one['layers_saved']:.0%}",
            }
            for row in scenarios
            if (one := row.get("counters")) is not None
        ],
    )
    lines = [requests, "", counted, "", EXPLAINED, "", *_waits(report)]
    lines += _remarks(report)
    problems = report["problems"]
    lines += ["", *(f"**{problem}**" for problem in problems)] if problems else []
    return "\n".join(lines) + "\n"


def _waits(report: Mapping[str, Any]) -> list[str]:
    """How long the good clients of a soak waited, by kind, and how memory grew."""
    soaks = [row for row in report["scenarios"] if "waits" in row and "samples" in row]
    if not soaks:
        return []
    columns = ["soak", "questions to", "answers", "median", "p99", "worst", "nobody answered for"]
    cells = []
    for row in soaks:
        waits = row["waits"]
        silence = f"{waits['longest_silence_seconds']:.1f}"
        for kind, one in {"all": waits, **waits["kinds"]}.items():
            seconds = (f"{one[f'{key}_seconds']:.2f}" for key in ("median", "p99", "worst"))
            last = silence if kind == "all" else ""
            cells.append([row["name"], kind, f"{one['answers']:,}", *seconds, last])
    grown = {row["name"]: growth_once_settled(row["samples"]) for row in soaks}
    told = [f"{name} {mib:+.0f}" for name, mib in grown.items() if mib is not None]
    memory = (
        f"MiB gained after {SETTLED_SECONDS / 60:.0f} minutes: {', '.join(told) or 'too short'}."
    )
    return [markdown_grid(columns, cells), "", f"Seconds that good clients waited. {memory}", ""]


def _remarks(report: Mapping[str, Any]) -> list[str]:
    found = {row["name"]: row for row in report["scenarios"]}
    lines = []
    if "growth" in (soak := found.get("soak", {})):
        lines += [
            f"Soak: {soak['requests_per_second']:.0f} requests/s, as many as come in "
            f"{soak['hours_at_5_a_second']:.2f} hours at 5 a second; MiB per 10,000 requests: USS "
            f"{soak['growth']['uss_all']:+.1f}, after the first half minute "
            f"{soak['growth']['uss_after_half_a_minute']:+.1f}.",
            "",
        ]
    for row in report["scenarios"]:
        if "done" in row:
            done = "; ".join(f"{what}: {count:,}" for what, count in sorted(row["done"].items()))
            captured = f"Requests captured: {row.get('captured', 0):,}."
            lines += [f"Beside questions: {done}. {captured}", ""]
    return lines[:-1] if lines else []
