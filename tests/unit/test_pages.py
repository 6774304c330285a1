"""The HTML pages in a real browser: what they show, at which bound, and nothing from elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import LAYERS, tiny_config
from tests.unit import test_artifact_facts as artifact_facts
from tests.unit.test_evaluation_report import EXAMPLES, OURS, STRICT, one_round, share_of_1
from vllm_adainfer.offline.evaluation.report import build_report
from vllm_adainfer.offline.facts.document import Table
from vllm_adainfer.offline.reports.contents import artifact_page, evaluation_page
from vllm_adainfer.offline.reports.figures import axes, line, panel
from vllm_adainfer.offline.reports.page import html_page
from vllm_adainfer.offline.reports.views import View

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DETAILS = {
    **artifact_facts.DETAILS,
    "exit_points": [{**one, "leaving": 0.25} for one in artifact_facts.DETAILS["exit_points"]],
    "agreement": {"1": 0.5, "2": 0.8, "3": 0.9, "4": 0.95},
    "risk_curve": [
        {"threshold": None, "risk": 0.0, "bound": 0.01, "layers_saved": 0.0},
        {"threshold": 1.0, "risk": 0.02, "bound": 0.04, "layers_saved": 0.4},
    ],
    "provenance": {
        "cpu": "a processor",
        "versions": {"vllm": "1"},
        "gpu": None,
        "argv": ["a", "b"],
    },
}
HOSTILE = "</script><script>document.title = 'broken'</script><b>bold</b>"
VIEWS = (
    View(2, "'good'", 0.9, 0.8, 1.5, 1.0),
    View(LAYERS, "'bad'", 0.6, 0.2),
)
CHANGED = [
    dict(zip(("level", "place", "prompt", "full", "early", "views"), one, strict=True))
    for one in (
        (1, "line 1", f"a warm film {HOSTILE}", "'bad'", "'good'", VIEWS),
        (1, "line 3", "a cold film", "'good'", "'bad'", ()),
        (0, "line 7", "a long film", "'good'", "'bad'", ()),
    )
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("install Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path) -> Iterator[Any]:
    """Opens a page; at the end of the test it must have reported no error and fetched nothing."""
    tab = browser.new_page()
    errors: list[str] = []
    fetched: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else 0)
    tab.on("request", lambda request: fetched.append(request.url))

    def open_page(page: str) -> Any:
        path = tmp_path / "page.html"
        path.write_text(page)
        tab.goto(path.as_uri())
        return tab

    yield open_page
    assert errors == []
    assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
    tab.close()


@pytest.fixture
def report(tiny_model) -> dict[str, Any]:
    """At the stricter bound a quarter leaves after layer 3, at the other half after layer 2."""
    rounds = [one_round(5, {2: 2, LAYERS: 2})]
    path = Path("b/c.jsonl")
    return build_report("a", path, tiny_config(tiny_model), EXAMPLES, share_of_1, rounds)


def slide(tab: Any, level: int) -> None:
    tab.locator("#level").fill(str(level))


def shares(tab: Any) -> dict[str, float]:
    """What the figure of exits shows."""
    x, y = tab.evaluate("(({x, y}) => [[...x], [...y]])(document.getElementById('exits').data[0])")
    return dict(zip(x, y, strict=True))


def rows(tab: Any) -> list[str]:
    """The rows that the table of changed prompts shows."""
    return tab.locator("#changed > tbody > tr:visible > td:first-child").all_text_contents()


def test_the_slider_moves_numbers_figures_and_prompts(opened, report, tiny_model):
    tab = opened(evaluation_page(report, tiny_config(tiny_model), DETAILS, CHANGED))
    assert tab.locator("#level-name").text_content() == f"{100 * OURS:g} %"  # the artifact's own
    assert "2.00x" in tab.locator("#numbers").text_content()
    assert shares(tab) == {2: 50, LAYERS: 50}
    assert rows(tab) == ["line 1", "line 3"]
    slide(tab, 0)
    assert tab.locator("#level-name").text_content() == f"{100 * STRICT:g} %"
    assert "1.25x" in tab.locator("#numbers").text_content()
    assert shares(tab) == {3: 25, LAYERS: 75}
    assert rows(tab) == ["line 7"]


def test_prompts_are_searched_and_shown_as_text_with_what_the_policy_saw(
    opened, report, tiny_model
):
    tab = opened(evaluation_page(report, tiny_config(tiny_model), DETAILS, CHANGED))
    tab.locator("#search").fill("WARM")
    assert rows(tab) == ["line 1"]
    assert tab.locator("#shown").text_content() == "1 prompt"
    row = tab.locator("#changed > tbody > tr:visible")
    row.locator("summary").click()
    assert HOSTILE in row.locator("pre").text_content()
    assert tab.title() != "broken"
    assert row.locator("pre b").count() == 0
    views = row.locator(".views tbody tr")
    assert views.nth(0).locator("td").all_text_contents() == [
        *("'good'", "2", "0.900", "0.800", "1.50", "1.00")
    ]
    assert views.nth(1).locator("td").all_text_contents()[4:] == ["", ""]


@pytest.mark.parametrize("prompts", [None, []])
def test_without_prompts_there_is_no_table_and_without_changes_an_empty_one(
    opened, report, tiny_model, prompts
):
    tab = opened(evaluation_page(report, tiny_config(tiny_model), DETAILS, prompts))
    assert tab.locator("#changed").count() == (0 if prompts is None else 1)


def test_the_page_of_an_artifact_shows_what_calibration_has_seen(opened, tiny_model):
    tab = opened(artifact_page(tiny_config(tiny_model), DETAILS))
    assert shares(tab) == {2: 25, 3: 25, LAYERS: 50}
    assert "a processor" in tab.locator(".facts").last.text_content()
    assert "at most 5 % of the answers changed" in tab.locator(".facts").first.text_content()
    before = tab.locator("#numbers").text_content()
    slide(tab, 0)
    assert tab.locator("#numbers").text_content() != before


def test_figures_are_drawn_inside_their_frames(opened, report, tiny_model):
    tab = opened(evaluation_page(report, tiny_config(tiny_model), DETAILS, None))
    for figure in tab.locator("figure").all():
        frame, plot = figure.bounding_box(), figure.locator("svg.main-svg").first.bounding_box()
        assert plot["width"] > 100
        assert plot["x"] >= frame["x"]
        assert plot["x"] + plot["width"] <= frame["x"] + frame["width"]


def test_a_page_without_bounds_has_sections_of_facts_and_figures_alone(opened):
    chart = panel("chart", "Requests", [line(([1, 2], [3, 4]), "requests")], axes("", ""))
    table = Table([{"when": "now", "what": HOSTILE}])
    tab = opened(html_page("Kinds", "of a server", [("one", ["said", table], [chart])]))
    assert tab.locator("#level").count() == 0
    assert tab.locator("td").all_text_contents() == ["now", HOSTILE]
    assert tab.locator("#chart svg.main-svg").count() > 0
    assert tab.title() == "Kinds"


def test_what_the_page_reads_is_json(report, tiny_model):
    html = evaluation_page(report, tiny_config(tiny_model), DETAILS, CHANGED)
    data = html.split('type="application/json">')[1].split("</script>")[0]
    shown = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [name for name, _ in shown["levels"]] == ["2 %", "5 %"]
