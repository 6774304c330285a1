"""Benchmarks are run by hand; these tests notice when the package moves what they use."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import pytest

from benchmarks.common.report_files import add_report

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
SCRIPTS = [path for path in FILES if "__main__" in path.read_text()]


def imported(path: Path) -> Any:
    """The module in a file of benchmarks; some set variables for engines, which are undone."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [*sys.path]):
        return importlib.import_module(name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path):
    assert imported(path).__doc__


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_its_own_path_in_its_docstring(path):
    assert f"benchmarks/{path.relative_to(ROOT / 'benchmarks')}" in imported(path).__doc__


def test_a_task_measured_again_keeps_its_place_among_the_others(tmp_path):
    output = tmp_path / "result.json"
    for task, value in ("SST-2", 1), ("TREC", 2), ("SST-2", 3):
        add_report(output, {"task": task, "value": value}, str)
    assert [(one["task"], one["value"]) for one in json.loads(output.read_text())] == [
        ("SST-2", 3),
        ("TREC", 2),
    ]


def test_the_parts_of_a_step_that_are_timed_exist():
    timed = imported(ROOT / "benchmarks" / "offline" / "bench_step_cost.py").timed
    with timed() as times:
        assert not times


def test_drafts_that_a_benchmark_wants_refused_take_the_place_of_those_that_were_learnt():
    refused_drafts = imported(ROOT / "benchmarks" / "offline" / "refused_drafts.py")
    answers = refused_drafts.Answers()
    with refused_drafts.drafting(token=7, count=3):
        assert answers.draft((1,), 0.5, longest=2, end=0) == [7, 7]
    assert answers.draft((1,), 0.5, longest=2, end=0) == []


@pytest.mark.parametrize("text", ["Acting was not bad.", "Rain in London, 12 dead", "who is Ann?"])
def test_an_object_that_the_writer_learns_is_one_that_its_requests_ask_for(text):
    writer = imported(ROOT / "benchmarks" / "offline" / "train_writer.py")
    requests = imported(ROOT / "benchmarks" / "offline" / "object_requests.py")
    for about, label in ("review", "positive"), ("news", "technology"), ("question", "human"):
        asked = requests.kinds()[about][2]["response_format"]["json_schema"]["schema"]
        learnt = writer.object_about(about, text, label)
        jsonschema.validate(learnt, asked)
        assert list(learnt) == asked["required"]


@pytest.mark.parametrize(
    ("seconds", "said"), [((1.0, 1.1, 0.9), "none"), ((2.0, 2.1, 1.9), "clearly beyond the aim")]
)
def test_a_report_on_structured_answers_says_which_aims_were_missed(seconds, said):
    """Objects of mixed fields are to be answered as fast as by stock."""
    report = imported(ROOT / "benchmarks" / "offline" / "structured_report.py")

    def times(*seconds: float) -> dict[str, Any]:
        return {"seconds": seconds, "p50_ms": seconds, "steps": 3, "tokens": 9}

    counts = {"drafted": 8, "kept": 4}
    stock, ours = times(*6 * [1.0]), times(*2 * seconds) | counts
    both = {"stock": stock, "adainfer": ours}
    part = {
        "kind": "reason last",
        "backend": "xgrammar",
        "first": both,
        "in_flight": [{"number": number, "objects": 1, **both} for number in (1, 4, 16, 64)],
        "texts": {"compared": 9, "differ": 1, "stock_compared": 9, "stock_differ": 2},
    }
    table = report.table({"parts": [part], "refusals": []})
    assert said in table.splitlines()[-1]
    assert "0.50 of 8" in table


def server_with(worst_ms: list[float], lost: int = 0) -> dict[str, Any]:
    """A server's results in which one thing was sent in as many sizes."""
    cells = [
        {"size": 64 * 10**place, "worst_ms": worst, "median_ms": worst, "hostile": {"HTTP 200": 1}}
        for place, worst in enumerate(worst_ms)
    ]
    row = {"base": 64, "cells": [{**cell, "hostile_longest_seconds": 1.0} for cell in cells]}
    if len(cells) < 4:
        row["stopped"] = "the server stays busy"
    source = {"git": "abc", "cpu": "a processor", "time": "now"}
    return {
        "quiet": {"worst_ms": 1.0, "median_ms": 1.0},
        "things": {"headers": row},
        "requests": {"wrong": 0, "lost": lost, "errors": {}},
        "note": "",
        "provenance": source,
    }


STOCK = [50.0, 60.0, 300.0, 5000.0]


@pytest.mark.parametrize(
    ("ours", "problems"),
    [
        (server_with(STOCK), []),
        (server_with([200.0, 200.0, 500.0, 9000.0]), []),
        (server_with([50.0, 60.0, 601.0, 5000.0]), ["headers, 6,400: 601 ms, stock 300 ms"]),
        (server_with([50.0, 311.0, 300.0, 5000.0]), ["headers, 640: 311 ms, stock 60 ms"]),
        (server_with([50.0, 60.0]), ["headers: the server stays busy"]),
        (server_with(STOCK, lost=2), ["2 requests of good clients were lost ({})"]),
    ],
)
def test_hostile_growth_is_judged_by_stock_at_the_same_size(ours, problems):
    growth = imported(ROOT / "benchmarks" / "soak" / "bench_hostile_growth.py")
    servers = {"stock": server_with(STOCK), "ours": ours}
    assert growth.problems_of("ours", servers) == problems
    report = {"clients": 8, "seconds": 4, "servers": servers, "problems": {"ours": problems}}
    assert growth.table(report).count("**") == 2 * len(problems)
