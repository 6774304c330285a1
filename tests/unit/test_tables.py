"""Tables are plain text of the width of their content, wherever they are printed."""

from __future__ import annotations

import pytest

from vllm_adainfer.offline.facts.document import Table, as_markdown, as_text, markdown_table

LONG = "word " * 60


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")


def test_numbers_are_on_the_right_and_text_is_on_the_left():
    rates = {"stock": "9.5", "ours": "12.0"}
    rows = [{"engine": name, "requests/s": rate} for name, rate in rates.items()]
    table = as_text([Table(rows, 1)])
    assert table.splitlines() == [
        "engine   requests/s",
        "───────────────────",
        "stock           9.5",
        "ours           12.0",
    ]


def test_markdown_has_a_header_and_a_row_a_line():
    table = markdown_table([{"task": "cr", "share": "1%"}, {"task": "mean of 1", "share": ""}])
    assert table.splitlines() == [
        "| task      | share |",
        "|-----------|-------|",
        "| cr        |    1% |",
        "| mean of 1 |       |",
    ]


def test_names_and_facts_stand_in_two_columns():
    assert as_text([{"model": "tiny", "classifier": "svm"}]).splitlines() == [
        "model       tiny",
        "classifier  svm",
    ]


@pytest.mark.parametrize("lay_out", [as_text, as_markdown])
def test_nothing_is_wrapped_cut_coloured_or_read_as_markup(lay_out):
    cell = f"{LONG}[bold]:smile: [0, 1]"
    [*_, last] = lay_out([Table([{"a": "1", "b": cell}])]).splitlines()
    assert cell in last
    assert "\x1b" not in last
