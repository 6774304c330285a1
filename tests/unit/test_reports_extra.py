"""Pages need the `reports` extra; nothing else does, and a command that lacks it says so first."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from tests.unit.test_layers import MODULES, imports
from vllm_adainfer.cli import app

PAGES = "vllm_adainfer.offline.reports"


@pytest.mark.parametrize("library", ["jinja2", "plotly"])
@pytest.mark.parametrize("command", ["evaluate", "inspect", "kinds", "demo"])
def test_a_command_without_the_extra_says_how_to_install_it_before_any_work(
    tmp_path, monkeypatch, command, library
):
    page = ["--html", str(tmp_path / "page.html")]
    nothing = str(tmp_path / "nothing")  # would be an error if it were read
    arguments = {
        "evaluate": ["--model", nothing, "--artifact", nothing, "--data", nothing, *page],
        "inspect": [nothing, *page],
        "kinds": [nothing, "--page"],
        "demo": ["--output", nothing],
    }[command]
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    done = CliRunner().invoke(app, [command, *arguments])
    assert done.exit_code == 1
    assert done.stderr.strip() == (
        f"error: an HTML page needs {library}: pip install 'vllm-adainfer[reports]'"
    )
    assert not list(tmp_path.iterdir())


def test_only_pages_import_what_the_extra_installs():
    for module in MODULES:
        roots = {name.partition(".")[0] for name in imports(module)}
        if not module.startswith(PAGES):
            assert not roots & {"jinja2", "markupsafe", "plotly", "matplotlib"}, module


def test_a_page_of_an_artifact_without_its_details_is_refused_before_engines_start(
    tmp_path, tiny_model, tiny_policy, monkeypatch
):
    started = "vllm_adainfer.offline.evaluation.evaluate.start_engine"
    monkeypatch.setattr(started, lambda *_, **__: pytest.fail("an engine has started"))
    options = {"--model": tiny_model, "--artifact": tiny_policy, "--html": tmp_path / "page.html"}
    words = [str(word) for pair in options.items() for word in pair]
    done = CliRunner().invoke(app, ["evaluate", *words, "--data", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 1
    assert "calibration.json does not hold rows" in done.stderr
