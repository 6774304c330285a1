"""The demo's real model, calibrated and served: `vllm bench serve` with and without the plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom

from tests.e2e.test_cli import command, of_a_user
from vllm_adainfer.offline.demo.run import LABELS

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serving" / "bench_serve.py"
REQUESTS = 60
pytestmark = pytest.mark.full  # ten minutes of a real model


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    """What the benchmark has measured, as a user would run it.

    It fails by itself where a request failed or was not answered by one label, where the counters
    of `/metrics` are not those of its requests, and where no layers were skipped.
    """
    folder = tmp_path_factory.mktemp("demo")
    shipped = files("vllm_adainfer.offline.demo")
    template = folder / "template.txt"
    template.write_text(shipped.joinpath("template.txt").read_text())
    for name in ("calibration", "test"):
        (folder / f"{name}.jsonl").write_text(shipped.joinpath(f"{name}.jsonl").read_text())
    model, policy = str(folder / "model"), str(folder / "policy")
    command("fetch-demo-model", "--output", model)
    command(
        "calibrate", "--model", model, "--data", str(folder / "calibration.jsonl"),
        "--template", f"@{template}", "--labels", ",".join(LABELS), "--output", policy,
        compiled=True,
    )  # fmt: skip
    arguments = [
        "--model", model, "--artifact", policy, "--data", str(folder / "test.jsonl"),
        "--template", f"@{template}", "--output", str(folder / "serve.json"),
        "--rates", "inf", "--requests", str(REQUESTS), "--rounds", "1",
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments],
        env=of_a_user(compiled=True),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "serve.json").read_text())
    return found


def test_every_request_of_both_servers_is_answered_and_one_of_them_skips_layers(report):
    [rate] = report["rates"]
    for server in ("stock", "adainfer"):
        assert [run["completed"] for run in rate[server]["runs"]] == [REQUESTS]
        assert rate[server]["failed"] == 0
    assert 0.1 < rate["adainfer"]["layers_saved"] < 1


def most_within(epsilon: float, rows: int) -> int:
    """The most answers that may change: more come one time in twenty if the share is the bound."""
    return int(binom.ppf(0.95, rows, epsilon))


def test_answers_agree_with_full_depth_within_the_bound(report):
    answers, epsilon = report["answers"], report["epsilon"]
    rows = answers["n"]
    assert most_within(epsilon, rows) < 2 * epsilon * rows, "too few prompts to see twice the bound"
    assert round(answers["disagreement"] * rows) <= most_within(epsilon, rows)
