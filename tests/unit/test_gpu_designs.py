"""The model of steps on a GPU: what each design takes away is gone from its steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from benchmarks.gpu_costs import Counted, Llama
from benchmarks.gpu_designs import BUILT, DESIGNS, Step, break_even, decoding
from benchmarks.offline.llama_shapes import SHAPES

OURS = Counted(staging=26e-6, question=14e-6, cut=44e-6, tables=23e-6, ask=75e-6, decide=8e-6)
SMALL, LARGE = (Llama(SHAPES[name], 1) for name in ("llama-1b", "llama-8b"))


def steps_of(model: Llama, requests: int, tokens: int = 1, slower: float = 1.0) -> partial[Step]:
    return partial(Step, model, OURS, requests=requests, tokens=tokens, slower=slower)


def test_stock_hides_its_host_until_that_is_slower_than_the_device():
    times = [steps_of(SMALL, 64, slower=slower)(None).seconds(0) for slower in (0, 1, 4, 8)]
    assert times[0] == pytest.approx(times[1])
    assert times[3] == pytest.approx(2 * times[2])


def test_without_a_read_a_step_that_nobody_leaves_takes_what_its_device_takes():
    [design] = [design for design in DESIGNS if design.on_device]
    fast, slow = (steps_of(SMALL, 64, slower=slower)(design).seconds(0) for slower in (0, 1))
    assert slow == pytest.approx(fast)


def test_with_reads_the_host_is_seen():
    fast, slow = (steps_of(SMALL, 64, slower=slower)(DESIGNS[0]).seconds(0) for slower in (0, 1))
    assert slow > fast + 0.5e-3


@pytest.mark.parametrize("model", [SMALL, LARGE], ids=["1b", "8b"])
@pytest.mark.parametrize("column", ["none", "half", "all"])
def test_each_step_towards_fewer_waits_is_faster(model, column):
    table = decoding(steps_of(model, 64))
    a, b, c, e = (table[name][column] for name in "abce")
    assert a > b > c >= e


def test_prompts_replay_graphs_after_a_cut_only_in_padded_buffers():
    """Of 64 x 16 rows the last two fifths fit."""
    step = steps_of(SMALL, 64, 16)
    padded, launched = (step(replace(BUILT, padded=one)) for one in (True, False))
    assert padded.seconds(0) == launched.seconds(0)  # nothing was cut
    assert padded.seconds(0.2) < launched.seconds(0.2)


@pytest.mark.parametrize(
    ("stock", "none", "all_leave", "expected"),
    [(10, 11, 7, 0.1), (10, 10, 7, 0), (10, 13, 10, None)],
    ids=["a step in four", "asking is free", "never"],
)
def test_where_exits_break_even(stock, none, all_leave, expected):
    assert break_even(stock, none, all_leave, saved=0.4) == (expected and pytest.approx(expected))
