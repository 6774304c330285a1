"""Compiled code is found by name, so segments that compile differently are named differently."""

from __future__ import annotations

from vllm_adainfer.models.segments import segment_class


def test_every_range_of_layers_and_the_final_norm_have_a_name_of_their_own():
    kinds = [
        (0, 3, 6, False),
        (3, 5, 6, False),
        (5, 6, 6, False),
        (5, 6, 6, True),
        (5, 6, 7, False),
    ]
    names = {segment_class(*kind).forward.__qualname__ for kind in kinds}
    assert len(names) == len(kinds)
