from __future__ import annotations

from types import SimpleNamespace

from tests.conftest import skipped_for_programs


def test_a_run_ends_with_how_to_get_each_program_that_tests_were_skipped_without():
    reasons = [
        "Skipped: install Chromium (apt-get install chromium)",
        "Skipped: needs a CUDA device",
        "Skipped: install Chromium (apt-get install chromium)",
        "Skipped: install Node (apt-get install nodejs)",
    ]
    reports = [SimpleNamespace(longrepr=("test_pages.py", 1, reason)) for reason in reasons]
    assert skipped_for_programs(reports) == [
        "skipped 2 of the tests: install Chromium (apt-get install chromium)",
        "skipped 1 of the tests: install Node (apt-get install nodejs)",
    ]
    assert skipped_for_programs([]) == []
