from __future__ import annotations

import numpy as np
import pytest

from vllm_adainfer.exits.batch.layout import RowLayout


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def rows_of(layout: RowLayout) -> list[tuple[int, int]]:
    """(request, position) of each row."""
    return list(zip(layout.row_requests.tolist(), layout.positions.tolist(), strict=True))


def test_positions_of_a_request_run_up_to_its_last_one():
    layout = RowLayout(ints(2, 0, 3, 1), ints(9, 5, 2, 40))
    assert rows_of(layout) == [(0, 8), (0, 9), (2, 0), (2, 1), (2, 2), (3, 40)]
    assert layout.present.tolist() == [0, 2, 3]
    assert layout.last_rows(ints(0, 2, 3)).tolist() == [1, 4, 5]
    assert layout.rows_of(ints(0, 3)).tolist() == [0, 1, 5]
    assert rows_of(layout.only(ints(2))) == [(2, 0), (2, 1), (2, 2)]


def test_a_layout_without_rows_has_none():
    layout = RowLayout(ints(0, 0), ints(3, 4))
    assert (layout.num_rows, layout.present.tolist(), layout.positions.tolist()) == (0, [], [])


@pytest.mark.parametrize("seed", range(40))
def test_regrouping_is_that_of_a_plain_list_of_rows(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 8))
    lens = generator.integers(0, 4, count)
    layout = RowLayout(lens, generator.integers(20, 60, count))
    leaving = np.flatnonzero((generator.random(count) < 0.3) & (lens > 0))
    waiting = np.where(lens > 0, generator.integers(0, 4, count), 0)
    waiting[leaving] = 0

    before = rows_of(layout)
    joining = [
        (
            request,
            int(layout.last_positions[request] - lens[request] - waiting[request] + 1 + place),
        )
        for request in range(count)
        for place in range(waiting[request])
    ]
    expected = sorted(row for row in before + joining if row[0] not in leaving)

    regrouped, rows = layout.regroup(leaving, waiting)
    assert rows_of(regrouped) == expected
    assert [(before + joining)[row] for row in rows] == expected


@pytest.mark.parametrize("seed", range(40))
def test_the_last_rows_of_each_request_are_those_of_a_plain_list(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 8))
    lens = generator.integers(0, 6, count)
    layout = RowLayout(lens, generator.integers(20, 60, count))
    counts = generator.integers(1, 8, count)
    before = rows_of(layout)
    for wanted, last in (
        (counts, layout.last_only(counts)),
        (ints(*[1] * count), layout.last_only()),
    ):
        expected = [
            row
            for request in range(count)
            for row in [one for one in before if one[0] == request][-int(wanted[request]) :]
        ]
        kept, rows = last
        assert rows_of(kept) == expected
        assert [before[row] for row in rows] == expected
