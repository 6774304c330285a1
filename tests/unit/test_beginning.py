"""From where on whole prompts of a kind are read: behind what all of them begin with."""

from __future__ import annotations

import pytest

from vllm_adainfer.auto.beginning import PROMPTS, Beginning


def pooled_from(prompts: list[list[int]]) -> int | None:
    beginning = Beginning()
    for prompt in prompts:
        beginning.see(prompt)
    return beginning.pooled_from


@pytest.mark.parametrize(
    ("shared", "shortest", "expected"),
    [(0, 9, 1), (1, 9, 1), (5, 9, 5), (5, 1, 5), (5, 0, 4)],
    ids=["nothing", "one token", "a template", "a template and a word", "one is the template"],
)
def test_it_is_behind_the_tokens_that_all_share_and_before_the_end_of_the_shortest(
    shared, shortest, expected
):
    template = list(range(shared))
    prompts = [[*template, 100 + n, *range(9)][: max(shared + 9, 1)] for n in range(PROMPTS - 1)]
    last = [*template, 99, *range(9)][: max(shared + shortest, 1)]
    assert pooled_from([*prompts, last]) == expected


def test_it_is_unknown_until_enough_different_prompts_came():
    prompts = [[1, 2, n] for n in range(PROMPTS)]
    assert pooled_from(prompts[:-1] * 3) is None
    assert pooled_from([*prompts[:-1] * 3, prompts[-1]]) == 2
