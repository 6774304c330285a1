"""The generated part of `docs/results.md`: a summary, then sections by topic."""

from __future__ import annotations

from benchmarks.front_page import load
from benchmarks.quoted_tables import (
    families,
    long_prompts,
    probabilities,
    questions,
    quoted,
    recurrent,
    states,
)
from benchmarks.results_speed import generation_table, startup_line, throughput_table
from benchmarks.results_summary import measured, summary
from benchmarks.results_tables import choices_table, suite_table, workloads
from benchmarks.serving.serve_report import table as serve_table


def results_page() -> str:
    """The generated part of the page."""
    return "\n".join([summary(), *(line for part in sections() for line in ("", *part))])


def sections() -> list[list[str]]:
    """Each section with its heading, its tables, and where and when these were measured."""
    return [
        section("One label", workloads(), "sst2_six_shot", "demo", "demo_amx"),
        section(None, suite_table("suite_fine_tuned"), "suite_fine_tuned"),
        section(
            "The paper's suite", suite_table("suite_smollm2_instruct"), "suite_smollm2_instruct"
        ),
        section(None, suite_table("suite_smollm2_squad"), "suite_smollm2_squad"),
        section("How often a bound is broken", quoted("coverage"), "coverage"),
        section("A server's latency", latency("serve"), "serve"),
        section("Choices", choices_table(), "choices_exits"),
        section("Structured answers", quoted("structured"), "structured"),
        section("Objects under one bound", quoted("objects"), "objects"),
        section("Label probabilities", probabilities(), "probabilities"),
        section(None, latency("scoring"), "scoring"),
        section("Decision questions", questions(), "questions"),
        section(None, states(), "states"),
        section("Promises", quoted("promises"), "promises"),
        section("Students and branches", quoted("trained_probes"), "trained_probes"),
        section("Classifiers", quoted("classify"), "classify"),
        section("Rerankers", quoted("rerank"), "rerank"),
        section("A server that calibrates itself", quoted("auto"), "auto"),
        section("Generated text", generation_table(), "generation"),
        section("Families of models", families(), "families"),
        section(None, long_prompts(), "long_prompts"),
        section(None, recurrent(), "recurrent"),
        section("Scripted exits", throughput_table(), "throughput"),
        section(None, startup_line(), "startup"),
    ]


def section(heading: str | None, lines: list[str], *names: str) -> list[str]:
    """A part of the page; `names` are those of its results."""
    return [*([f"## {heading}", ""] if heading else []), *lines, "", measured(*names)]


def latency(name: str) -> list[str]:
    """Latency and throughput of a server, by rate, and their plot."""
    plot = f"![Latency of a server by request rate](../benchmarks/results/{name}.png)"
    return [*serve_table(load(name)).rstrip().splitlines(), "", plot]
