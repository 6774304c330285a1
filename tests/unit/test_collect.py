from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.collect import rows_at
from vllm_adainfer.offline.calibration.record.objects import room_for_answers

# Text and position of each row that decides an answer.
ROWS = [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 4)]


def found(rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [rows[row] for row in rows_at(ROWS, recorded(rows))]


def recorded(rows: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    tags, positions = torch.tensor(rows).T
    return {"tags": tags, "positions": positions}


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_came_in_any_order_are_told_by_text_and_position(seed):
    order = np.random.default_rng(seed).permutation(len(ROWS))
    assert found([ROWS[place] for place in order]) == ROWS


def test_rows_beyond_the_end_of_a_text_shift_nothing():
    assert found([*ROWS[:2], (0, 4), *ROWS[2:], (2, 5)]) == ROWS


def test_of_a_row_that_came_again_the_last_counts():
    assert rows_at(ROWS, recorded([*ROWS, ROWS[3]])).tolist() == [0, 1, 2, 7, 4, 5, 6]


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        (ROWS[:1], "1 of 7 rows that decide an answer .* first at position 2 of prompt 1"),
        (ROWS[3:5], "2 of 7 rows that decide an answer .* first at position 1 of prompt 2"),
    ],
)
def test_an_answer_without_a_row_is_an_error(lost, sentence):
    with pytest.raises(AdaInferError, match=sentence):
        found([row for row in ROWS if row not in lost])


def test_an_object_has_the_room_that_the_longest_prompt_leaves_in_the_context():
    """In whole blocks, as vLLM's lengths are rounded up to them."""
    examples = [Example(f"line {n}", "", [1] * n, None) for n in (3, 100, 7)]
    assert room_for_answers(256, examples) == 156
    assert room_for_answers(300, examples) == 156
    with pytest.raises(AdaInferError, match=r"^line 100: .* no room for an object .* of 100"):
        room_for_answers(100, examples)
