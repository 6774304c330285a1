"""Tables are plain text of the width of their content, wherever they are printed."""

from __future__ import annotations

import pytest

from vllm_adainfer.offline.tables import aligned, markdown_table, text_table

LONG = "word " * 60


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")


def test_numbers_are_on_the_right_and_text_is_on_the_left():
    table = text_table(["engine", "requests/s"], [["stock", "9.5"], ["ours", "12.0"]], 1)
    assert table.splitlines() == [
        "engine   requests/s",
        "───────────────────",
        "stock           9.5",
        "ours           12.0",
    ]


def test_markdown_has_a_header_and_a_row_a_line():
    table = markdown_table(["task", "share"], [["cr", "1%"], ["mean of 1", ""]])
    assert table.splitlines() == [
        "| task      | share |",
        "|-----------|-------|",
        "| cr        |    1% |",
        "| mean of 1 |       |",
    ]


def test_names_and_facts_stand_in_two_columns():
    assert aligned([("model", "tiny"), ("classifier", "svm")]).splitlines() == [
        "model       tiny",
        "classifier  svm",
    ]


@pytest.mark.parametrize("lay_out", [text_table, markdown_table])
def test_nothing_is_wrapped_cut_coloured_or_read_as_markup(lay_out):
    cell = f"{LONG}[bold]:smile: [0, 1]"
    [*_, last] = lay_out(["a", "b"], [["1", cell]]).splitlines()
    assert cell in last
    assert "\x1b" not in last
