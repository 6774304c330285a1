from __future__ import annotations

import pytest

from vllm_adainfer.offline.evaluation.sequences import compare, has_number


def test_texts_are_compared_to_the_first_token_that_differs():
    found = compare([[1, 2, 3], [1, 2, 3], [1, 2], [9]], [[1, 2, 3], [1, 2, 4], [1, 2, 3], [1]])
    assert found["same"] == 0.25
    assert found["disagreement"] == 3 / (3 + 3 + 3 + 1)
    assert found["first_divergence"] == pytest.approx((2 + 2 + 0) / 3)


def test_equal_texts_diverge_nowhere():
    found = compare([[1], [2, 3]], [[1], [2, 3]])
    assert [found[name] for name in ("disagreement", "same", "first_divergence")] == [0, 1, None]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so it is 12.", "12", True),
        ("12 eggs, then 13", "12", False),
        ("that makes $1,200.", "1200", True),
        ("x = -3", "-3", True),
        ("it is 2.50", "2.5", True),
        ("no number", "1", False),
        ("", "1", False),
    ],
)
def test_the_last_number_is_the_answer(text, answer, right):
    assert has_number(text, answer) == right
