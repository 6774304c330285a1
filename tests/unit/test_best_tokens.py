"""A grammar's mask decides a greedy token, though hardly any row is masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_adainfer.engine.runner.v1_best_tokens import UNREAD, best_tokens, mask_places

ROWS, TOKENS = 40, 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("allowed", [0.0, 0.1, 0.9, 1.0])
def test_a_row_gets_the_first_of_its_likeliest_allowed_tokens(allowed, dtype):
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.integers(0, 9, (ROWS, TOKENS))).to(dtype)  # with many ties
    bits = random.random((ROWS, TOKENS)) < allowed
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    places = random.permutation(ROWS)
    places[::5] = -1
    legal = np.where((places == -1)[:, None], True, bits[places])
    expected = np.where(legal, logits.float().numpy(), -np.inf).argmax(1)
    found = best_tokens(logits, masks, places, lambda some: some.argmax(-1))
    assert found.tolist() == expected.tolist()


def test_masks_come_in_an_order_of_their_own_and_some_rows_have_none():
    places = mask_places(["a", "b", "c"], {"b": [7, 7], "c": [7]}, ["c", "gone", "a"])
    assert places.tolist() == [3, -1, -1, -1, 0, 1]


@pytest.mark.parametrize("unread", [[], [0, 3], [0, 1, 2, 3]], ids=str)
def test_rows_whose_tokens_count_for_nothing_are_not_looked_at(unread):
    logits, masks = torch.eye(4, 32), np.full((4, 1), -1, dtype=np.int32)
    places, seen = np.arange(4), list[int]()

    def best_of(some: torch.Tensor) -> torch.Tensor:
        seen.extend(some.argmax(-1).tolist())
        return some.argmax(-1)

    places[unread] = UNREAD
    found = best_tokens(logits, masks, places, best_of)
    assert len(found) == 4
    assert seen == [row for row in range(4) if row not in unread]
    assert found[seen].tolist() == seen
