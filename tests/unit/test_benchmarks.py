"""Benchmarks are run by hand, so what they take hold of in the package is looked for here."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
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
