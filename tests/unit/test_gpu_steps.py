"""`make gpu`: steps that end in time, each by itself; its table claims no more than was run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import gpu_steps
from benchmarks.gpu_step_results import read_result, run_command
from benchmarks.gpu_steps import Step, needs_nothing

MOST_MINUTES, MOST_OF_A_STEP = 50, 9
SUMMARY = "SKIPPED [1] tests/a.py:3: no such backend\n== {} in 3.20s ==\nengines started: 2\n"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A GPU, as far as the steps ask, and other steps."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_steps, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(gpu_steps, "RESULTS", tmp_path)

    def use(*steps: Step) -> None:
        monkeypatch.setattr(gpu_steps, "STEPS", list(steps))

    return use


def step(name: str, code: str, minutes: int = 1, lacks: Any = needs_nothing, **more: Any) -> Step:
    return Step(name, "something", minutes, ("-c", code), lacks, **more)


def ran(**options: Any) -> int:
    """The exit status."""
    try:
        gpu_steps.main(
            **{"dry": False, "only_kernels": False, "step": None, "list_": False} | options
        )
    except typer.Exit as ended:
        return int(ended.exit_code)
    return 0


def test_all_steps_fit_an_hour_and_each_the_limit_of_a_command():
    assert sum(one.minutes for one in gpu_steps.STEPS) <= MOST_MINUTES
    assert all(0 < one.minutes <= MOST_OF_A_STEP for one in gpu_steps.STEPS)
    assert len({one.name for one in gpu_steps.STEPS}) == len(gpu_steps.STEPS)


def test_a_step_that_fails_stops_no_other_and_the_file_has_the_table(steps, capsys, tmp_path):
    steps(
        step("fails", "raise SystemExit(3)"),
        step("cannot run", "raise SystemExit(4)", lacks=lambda: "something is missing"),
        step("passes", ""),
    )
    assert ran() == 1
    said = capsys.readouterr().out
    for row in ("failed (3)", "skipped: something is missing", "passed", "a GPU", "at most 3 min"):
        assert row in said
    assert (tmp_path / "gpu_steps.md").read_text() in said


def test_without_a_failure_it_ends_well(steps, capsys):
    steps(step("passes", ""))
    assert ran() == 0
    assert "passed" in capsys.readouterr().out


def test_one_step_runs_by_itself_and_the_table_keeps_the_others(steps, tmp_path):
    steps(step("first", ""), step("second", "raise SystemExit(3)"), step("third", ""))
    assert ran(step="first") == 0
    assert ran(step="second") == 1
    table = (tmp_path / "gpu_steps.md").read_text()
    results = [line.split("|")[3].strip() for line in table.splitlines() if "something" in line]
    assert results == ["passed", "failed (3)", "not run"]


def test_a_step_that_is_not_there_is_named_with_those_that_are(steps):
    steps(step("first", ""))
    with pytest.raises(typer.BadParameter, match="no step other; steps: first"):
        ran(step="other")


def test_the_list_runs_nothing(steps, capsys):
    steps(step("first", "raise SystemExit(3)", minutes=7))
    assert ran(list_=True) == 0
    assert capsys.readouterr().out.split() == ["first", "7", "min", "something"]


def test_a_step_ends_after_its_minutes_with_the_processes_that_it_started(tmp_path):
    """As engines are; otherwise they would keep the device."""
    log, began = tmp_path / "log", time.monotonic()
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    code = start.format("import time; print('on', flush=True); time.sleep(30)")
    assert run_command([sys.executable, "-c", code], log, 3, {}, quiet=True) is None
    assert time.monotonic() - began < 20
    assert log.read_text() == "on\n"
    assert read_result(None, "", tested=True, watched=True).outcome.startswith("failed: not done")


@pytest.mark.parametrize(
    ("code", "counts", "outcome"),
    [
        (0, "12 passed", "passed: 12 passed"),
        (0, "12 passed, 30 deselected", "passed: 12 passed"),
        (0, "10 passed, 2 skipped", "in part: 10 passed, 2 skipped (no such backend)"),
        (0, "2 skipped", "skipped: no such backend"),
        (0, "30 deselected", "skipped: no such backend"),
        (1, "1 failed, 11 passed", "failed (1): 1 failed, 11 passed"),
        (1, "3 passed, 2 errors", "failed (1): 3 passed, 2 errors"),
    ],
)
def test_skipped_tests_are_not_told_as_passed(code, counts, outcome):
    assert read_result(code, SUMMARY.format(counts), tested=True, watched=False).outcome == outcome


def test_waits_for_the_device_are_counted_where_engines_warn_of_them():
    warned = 3 * "a.py:7: UserWarning: called a synchronizing CUDA operation (Triggered …)\n"
    assert read_result(0, warned, tested=False, watched=True).syncs == 3
    assert read_result(0, warned, tested=False, watched=False).syncs is None


def test_the_table_tells_what_engines_said_of_their_start(steps, tmp_path):
    line = "INFO 12-02 [monitor.py:53] torch.compile took 41.20 s in total"
    steps(step("start", f"print({line!r})", lacks=lambda: None))
    ran()
    assert "- start: torch.compile took 41.20 s in total" in (tmp_path / "gpu_steps.md").read_text()


@pytest.mark.parametrize(
    ("made", "watched"),
    [
        (step("tests", "", lacks=lambda: None), True),
        (step("time", "", lacks=lambda: None, is_timed=True), False),
        (step("kernels", ""), False),
    ],
    ids=["engines", "timed engines", "kernels"],
)
def test_engines_that_are_tested_warn_of_waits_and_log_much(steps, tmp_path, made, watched):
    named = "import os; print(os.environ.get('VLLM_GPU_SYNC_CHECK'))"
    steps(Step(made.name, made.shows, 1, ("-c", named), made.lacks, made.is_timed))
    ran()
    log = (tmp_path / "rows" / f"{made.name}.log").read_text()
    assert log == ("warn\n" if watched else "None\n")


def test_without_a_gpu_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran()
    assert "sees no GPU through torch" in capsys.readouterr().out


def program_of(step: Step) -> str:
    """The file of a step's tests, or its program."""
    return next((one for one in step.arguments if "/" in one), step.name)


@pytest.mark.full
def test_each_step_can_begin(steps, capsys):
    """Tests are collected, and every program takes its command line: here one of each program."""
    steps(*{program_of(step): step for step in gpu_steps.STEPS}.values())
    assert ran(dry=True) == 0
    assert capsys.readouterr().out.count("| passed") == len(gpu_steps.STEPS)


@pytest.mark.parametrize("step", [one for one in gpu_steps.STEPS if "-k" in one.arguments])
def test_what_a_step_selects_is_among_its_tests(step):
    words = {*step.arguments[step.arguments.index("-k") + 1].split()} - {"or", "not"}
    tests = Path(gpu_steps.ROOT, program_of(step)).read_text()
    assert words
    assert all(word in tests for word in words)


@pytest.mark.full
def test_a_dry_run_finds_a_command_line_that_no_program_takes():
    arguments = "benchmarks/offline/bench_throughput.py", "--no-such-option", "1"
    wrong = Step("wrong", "something", 1, arguments)
    assert gpu_steps.run(wrong, dry=True).outcome.startswith("failed")
