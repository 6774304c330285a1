"""The tables of the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.reports.shares import clopper_pearson, share_in, spelled, verdict
from vllm_adainfer.offline.reports.speedup import Speedup

TITLES = {
    "words": "TF-IDF, logistic regression",
    "embeddings": "MiniLM embeddings, logistic regression",
    "table": "shad0w 0.4.0, its table",
    "student": "MiniLM, fine-tuned",
    "cut": "first third of the layers, fine-tuned",
    "static": "static truncation",
    "adainfer": "AdaInfer as published (no bound)",
    "adainfer_labels": "AdaInfer's rule among the labels (no bound)",
    "calm": "CALM",
    "exits": "**exits (ours)**",
    "both": "**MiniLM, fine-tuned, then exits (ours)**",
}


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """The shares spared with each number of prompts, and the times after one of them."""
    return "\n".join(f"## {one['task']}\n\n{_shares(one)}\n{_times(one)}" for one in reports)


def _shares(report: Mapping[str, Any]) -> str:
    stock = report["times"]["stock"]
    rate = report["at_once"] / statistics.median(stock["seconds"])
    rows = []
    for name, title in TITLES.items():
        for row in (row for row in report["rows"] if row["name"] == name):
            # A classifier needs the answers alone, exits the states as well.
            recorded = name in ("exits", "both", "static", "adainfer", "adainfer_labels", "calm")
            each = report["recording_seconds"] if recorded else 1 / rate
            minutes = (row["seconds"] + row["prompts"] * each) / 60
            rows.append(
                {
                    "method": title,
                    "prompts": str(row["prompts"]),
                    "model spared (95 %)": share_in(row, "spared"),
                    "answers that differ (95 %)": changed(row, report),
                    "accuracy (95 %)": _of_tests(row["accuracy"], report),
                    "minutes to set up": f"{minutes:.1f}",
                }
            )

    alone = {row["prompts"]: row["alone"] for row in report["rows"] if row["name"] == "cut"}
    cut = "; ".join(
        f"{share_in(row, 'changed')} after {prompts} prompts" for prompts, row in alone.items()
    )
    return (
        f"{report['model']}, {report['test']} unseen prompts, at most {report['epsilon']:.0%} of "
        f"all answers may differ (exact bound, confidence 90 %); stock vLLM's accuracy is "
        f"{_of_tests(report['stock_accuracy'], report)}. Spared is the share of requests, or of "
        f"layers, that the model does not run. If the first {report['cut_layers']} of "
        f"{report['depth']} layers answered alone, this share of answers would differ: {cut}.\n\n"
        f"{markdown_table(rows, text_columns=1)}\n"
    )


def changed(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The share of answers that differ, marked where the bound is broken; see `mark`."""
    return share_in(row, "changed") + mark(row, report)


def mark(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """A word where more answers differ than were promised: of the share, or of its interval."""
    found, _, _ = verdict(row["changed"], row["changed_95"], report["epsilon"]).partition(" ")
    return {"within": "", "compatible": ", compatible", "above": ", **above**"}[found]


def _of_tests(share: float, report: Mapping[str, Any]) -> str:
    """A share of the tests, with its interval."""
    return spelled(share, clopper_pearson(share * report["test"], report["test"]))


def _times(report: Mapping[str, Any]) -> str:
    times, stock = report["times"], report["times"]["stock"]
    rows = []
    for name, title in {"stock": "stock vLLM", **TITLES}.items():
        if name not in times:
            continue
        own = times[name]
        rows.append(
            {
                "method": title,
                "requests/s": f"{report['at_once'] / statistics.median(own['seconds']):.0f}",
                "speed-up (95 %)": Speedup.of(stock["seconds"], own["seconds"]).text,
                "p50, ms": f"{own['p50_ms']:.1f}",
            }
        )

    return (
        f"After {report['timed']} prompts, {report['at_once']} prompts at once "
        f"({len(stock['seconds'])} rounds, in turn), and {report['alone']} one at a time; "
        f"{report['provenance']['cpu']}:\n\n{markdown_table(rows, text_columns=1)}\n"
    )
