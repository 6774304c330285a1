"""`make gpu`: a step that fails stops no other, and the end says what became of each."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from benchmarks import gpu_steps
from benchmarks.gpu_steps import Step


@pytest.fixture
def device(monkeypatch):
    """A GPU, as far as the steps ask."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")


def test_a_step_that_fails_stops_no_other(device, monkeypatch, capsys):
    steps = [
        Step("fails", ("-c", "raise SystemExit(3)")),
        Step("cannot run", ("-c", "raise SystemExit(4)"), lambda: "something is missing"),
        Step("passes", ("-c", "")),
    ]
    monkeypatch.setattr(gpu_steps, "STEPS", steps)
    with pytest.raises(typer.Exit) as ended:
        gpu_steps.main(dry=False, only_kernels=False)
    assert ended.value.exit_code == 1
    said = capsys.readouterr().out
    for row in ("failed (3)", "skipped: something is missing", "passed", "a GPU"):
        assert row in said


def test_without_a_failure_it_ends_well(device, monkeypatch, capsys):
    monkeypatch.setattr(gpu_steps, "STEPS", [Step("passes", ("-c", ""))])
    gpu_steps.main(dry=False, only_kernels=False)
    assert "passed" in capsys.readouterr().out


def test_without_a_gpu_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu_steps.main(dry=False, only_kernels=False)
    assert "sees no GPU through torch" in capsys.readouterr().out


@pytest.mark.full
def test_each_step_can_begin():
    """Tests are collected, and every command line is one that its program takes."""
    done = subprocess.run(
        [sys.executable, gpu_steps.__file__, "--dry"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("passed") == len(gpu_steps.STEPS)


@pytest.mark.full
def test_a_dry_run_finds_a_command_line_that_no_program_takes():
    step = Step("wrong", ("benchmarks/offline/bench_throughput.py", "--no-such-option", "1"))
    assert gpu_steps.run(step, dry=True)[1].startswith("failed")
