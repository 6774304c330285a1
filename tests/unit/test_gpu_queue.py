"""Two queues, by hand: what the host does is hidden unless it waits for the device."""

from __future__ import annotations

import pytest

from benchmarks.gpu_queue import Queues, steady


def step_of(host: float, *segments: float, after: float = 0.0) -> object:
    """Host work, then device work, with a read (and more host work) between segments."""

    def step(queues: Queues) -> None:
        queues.work(host)
        queues.launch(segments[0])
        for segment in segments[1:]:
            queues.read(0)
            queues.work(after)
            queues.launch(segment)

    return step


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (step_of(3, 10), 10),  # the host is hidden
        (step_of(12, 10), 12),  # the device is
        (step_of(3, 6, 4), 10),  # after the read the device has 4 left, the host 3 to do
        (step_of(7, 6, 4), 13),  # 6 until the read, then the host's 7, of which 4 are hidden
        (step_of(7, 6, 4, after=2), 15),  # the device waits for those 2 as well
        (step_of(7, 10, 0), 17),  # a read at the end: one after the other
        (step_of(3, 4, 4, 2, after=1), 13),  # and 1 of the host's 3 is not hidden
    ],
)
def test_a_repeated_step(step, seconds):
    assert steady(step) == pytest.approx(seconds)


def test_a_read_takes_its_own_time():
    def step(queues: Queues) -> None:
        queues.launch(5)
        queues.read(2)

    assert steady(step) == 7


def test_the_host_runs_ahead_by_one_step_only():
    """The third step begins when the first has run, not before."""
    queues, begun = Queues(), []

    def step(queues: Queues) -> None:
        begun.append(queues.host)
        queues.work(1)
        queues.launch(10)

    for _ in range(4):
        queues.step(step)
    assert begun == [0, 1, 11, 21]


def test_what_is_enqueued_piece_by_piece_takes_the_longer_of_both():
    queues = Queues(delay=1)
    queues.launch(10, host=3)  # begins after the delay
    assert (queues.host, queues.device, queues.idle) == (3, 11, 1)
    queues.launch(2, host=20)  # the last piece is enqueued at 23
    assert (queues.host, queues.device, queues.idle) == (23, 24, 12)
