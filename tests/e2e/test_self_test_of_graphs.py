"""The self-test finds faults of graphs of segments, and steps then run without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.faults import (
    FAULTS_OF_GRAPHS,
    answers_are_right,
    captured_over_its_input,
    found,
    next_row,
)
from tests.e2e.recorded_graphs import Recorded, recorded_engine
from tests.e2e.scripted import parts
from tests.full import needed
from tests.triton_on_cpu import IS_V2

pytestmark = pytest.mark.skipif(not IS_V2, reason="Model Runner V1 captures no segments")


@pytest.fixture(scope="module")
def graphed(tiny_model: Path, policy_from_zero: Path) -> Iterator[Any]:
    with recorded_engine(tiny_model, policy_from_zero, "FLEX_ATTENTION", sizes=(2, 8)) as engine:
        yield engine


@pytest.mark.full
@pytest.mark.parametrize("tested", ["graphed"], indirect=True)
def test_nothing_is_found_where_nothing_is_wrong(tested):
    graphs = parts(tested)[0].graphs
    assert found(tested) == []
    assert parts(tested)[0].graphs is graphs is not None


@pytest.mark.full
@pytest.mark.parametrize("tested", ["graphed"], indirect=True)
def test_without_exits_there_are_no_graphs_of_segments(tested, reference, monkeypatch):
    """They would find no metadata for the whole batch."""
    model, _, _ = parts(tested)
    next_row(monkeypatch)
    assert found(tested) == ["exits"]
    assert model.graphs is None
    assert answers_are_right(tested, reference)


@pytest.mark.parametrize("tested", ["graphed"], indirect=True)
@pytest.mark.parametrize(
    "fault",
    needed([captured_over_its_input], of=FAULTS_OF_GRAPHS),
    ids=lambda fault: fault.__name__,
)
def test_where_graphs_of_segments_are_wrong_steps_run_without(
    tested, reference, fault, monkeypatch
):
    fault(monkeypatch)
    assert found(tested) == ["segment_graphs"]
    Recorded.replays.clear()
    assert answers_are_right(tested, reference)
    assert not Recorded.replays
