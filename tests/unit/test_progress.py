"""Progress in a log: a line at the start, then one every half minute, and one at the end."""

from __future__ import annotations

import pytest

from vllm_adainfer.offline import progress as module
from vllm_adainfer.offline.progress import SECONDS, progress, say


class Clock:
    """Stands still between the steps."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    monkeypatch.setattr(module.tqdm, "monitor_interval", 0)  # no thread
    return clock


@pytest.mark.parametrize("disabled", ["1", None])
def test_a_log_gets_a_line_every_half_minute_with_the_time_left(
    capsys, monkeypatch, clock, disabled
):
    """Also where TQDM_DISABLE keeps the bars of vLLM and transformers out of the log."""
    if disabled is not None:
        monkeypatch.setenv("TQDM_DISABLE", disabled)
    with progress(total=12, desc="evaluate", unit="run") as done:
        for _ in range(12):
            clock.now += SECONDS / 3
            done.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "evaluate: 0 of 12, 00:00 elapsed, ? left",
        "evaluate: 3 of 12, 00:30 elapsed, 01:30 left",
        "evaluate: 6 of 12, 01:00 elapsed, 01:00 left",
        "evaluate: 9 of 12, 01:30 elapsed, 00:30 left",
        "evaluate: 12 of 12, 02:00 elapsed, 00:00 left",
    ]


def test_a_terminal_gets_a_bar_in_one_place(capsys, monkeypatch, clock):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress(range(3), desc="fit", unit="layer")) == [0, 1, 2]
    drawn = capsys.readouterr().err
    assert "fit: 100%" in drawn
    assert drawn.count("\n") == 1  # where it ends


def test_what_has_no_steps_is_said_once(capsys):
    say("starting stock vLLM")
    assert capsys.readouterr().err == "starting stock vLLM ...\n"
