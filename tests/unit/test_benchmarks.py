"""Benchmarks are run by hand, so what they take hold of in the package is looked for here."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_finds_what_it_imports(monkeypatch, name):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with mock.patch.dict(os.environ):  # some set variables for engines
        assert importlib.import_module(name).__doc__


def test_the_parts_of_a_step_that_are_timed_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with mock.patch.dict(os.environ):
        timed = importlib.import_module("bench_step_cost").timed
    with timed() as times:
        assert not times


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
def test_hostile_growth_is_judged_by_stock_at_the_same_size(monkeypatch, ours, problems):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with mock.patch.dict(os.environ):
        growth = importlib.import_module("bench_hostile_growth")
    servers = {"stock": server_with(STOCK), "ours": ours}
    assert growth.problems_of("ours", servers) == problems
    report = {"clients": 8, "seconds": 4, "servers": servers, "problems": {"ours": problems}}
    assert growth.table(report).count("**") == 2 * len(problems)
