"""The report of `bench_serve.py`: medians over rounds, a table and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.intervals import never_exiting, share_of
from benchmarks.common.report_files import as_png
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.reports.speedup import Speedup

STOCK, OURS, NEVER = "stock", "adainfer", "never exiting"
# Figures of ``vllm bench serve``, under its names; E2EL is end-to-end latency.
FIGURES = (
    "request_throughput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_e2el_ms",
    "p50_e2el_ms",
    "p99_e2el_ms",
)
IN_TABLE = FIGURES[0], "mean_ttft_ms", "p50_e2el_ms", "p99_e2el_ms"


def rate_row(rate: float, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The row for one rate: medians over rounds, and all rounds."""
    row: dict[str, Any] = {"rate": rate if math.isfinite(rate) else "inf"}
    for name, done in runs.items():
        medians = {key: statistics.median(run[key] for run in done) for key in FIGURES}
        row[name] = {**medians, "failed": sum(run["failed"] for run in done), "runs": list(done)}
    saved = statistics.median(run["layers_saved"] for run in runs[OURS])
    row[OURS]["layers_saved"] = saved
    return row | ratio_of(row, "p50_e2el_ms", NEVER).entries("never_exit")


def ratio_of(row: Mapping[str, Any], key: str, server: str = OURS) -> Speedup:
    """That of a figure, a server's / stock's, in pairs of one round each."""
    return Speedup.of(*([run[key] for run in row[name]["runs"]] for name in (server, STOCK)))


def name_of(rate: float | str) -> str:
    """A rate as shown in the table and the plot."""
    return "all at once" if rate == "inf" else f"{rate:g}"


def table(report: Mapping[str, Any]) -> str:
    """Markdown: the setup, a row per rate, and how many answers differ."""
    rows = [
        [
            name_of(row["rate"]),
            *(
                f"{row[STOCK][key]:.1f} / {row[OURS][key]:.1f} = {ratio_of(row, key).bold}"
                for key in IN_TABLE
            ),
            never_exiting(row),
            share_of(row[OURS]["layers_saved"], report["requests"], 0),
        ]
        for row in report["rates"]
    ]
    sent = "one label out, by `vllm bench serve`"
    if "moves" in report["answers"]:
        sent = "a request of `/generative_scoring` each"
    lines = [
        f"{report['model']}, {report['data']}: at each rate {report['requests']} prompts of "
        f"{report['prompt_tokens_mean']:.0f} tokens, {sent}. Medians of {report['rounds']} "
        "interleaved rounds, stock / ours = ratio of pairs. Prefix cache "
        f"{report['prefix_cache']}; no row repeats within a run. For one token, the time to first "
        "token (TTFT) is the total latency.",
        "",
        markdown_grid(
            [
                "requests/s sent",
                "requests/s answered",
                "mean TTFT, ms",
                "p50 latency, ms",
                "p99 latency, ms",
                "never exiting, p50 latency",
                "layers saved (95 %)",
            ],
            rows,
            text_columns=0,
        ),
        "",
        differences(report),
    ]
    return "\n".join(lines) + "\n"


def differences(report: Mapping[str, Any]) -> str:
    """The share of answers that differ from full depth and from stock, or the moves of scores."""
    answers, bound = report["answers"], f"{report['epsilon']:.0%} at delta {report['delta']:g}"
    if "moves" not in answers:
        ours, stock, rounding = (
            share_of(answers[name], answers["n"])
            for name in (
                "disagreement",
                "disagreement_with_stock",
                "full_depth_disagreement_with_stock",
            )
        )
        return (
            f"Of {answers['n']} answers, {ours} differ from full depth (bound {bound}; in brackets "
            f"the 95 % interval), {stock} from stock vLLM's, and full depth itself differs from "
            f"stock in {rounding} (rounding)."
        )
    ours, alone = (
        f"by {moves['mean']:.3f} on average, {moves['p95']:.3f} at the 95th percentile, "
        f"{moves['largest']:.3f} at most, "
        f"{share_of(moves['beyond_tolerance'], answers['n'])} by more than {answers['tolerance']:g}"
        for moves in (answers["moves"], answers["moves_of_stock_alone"])
    )
    return (
        f"The scores of {answers['n']} prompts differ from stock's {ours} (bound {bound}, against "
        f"full depth). Stock's own scores differ {alone} when prompts are sent one at a time "
        "(rounding)."
    )


def plot(report: Mapping[str, Any]) -> bytes:
    """PNG: p50 and p99 latency by rate, with medians as lines and rounds as dots."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    rows = report["rates"]
    places = range(len(rows))
    for name, label, colour in ((STOCK, "stock", "C1"), (OURS, "with the plugin", "C0")):
        for percentile, style in (("p50", "o-"), ("p99", "s--")):
            key = f"{percentile}_e2el_ms"
            medians = [row[name][key] for row in rows]
            axes.plot(places, medians, style, color=colour, label=f"{percentile}, {label}")
            rounds = [(place, run[key]) for place in places for run in rows[place][name]["runs"]]
            axes.plot(*zip(*rounds, strict=True), ".", color=colour, alpha=0.4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(places, [name_of(row["rate"]) for row in rows])
    axes.set_xlabel("requests/s sent")
    axes.set_ylabel("latency of a request, ms")
    asked = "/generative_scoring" if "moves" in report["answers"] else "one label out"
    axes.set_title(f"{report['model']}, {report['data']}, {asked}")
    axes.grid(axis="y", which="both", linewidth=0.3)
    axes.legend()
    return as_png(figure, report["provenance"])
