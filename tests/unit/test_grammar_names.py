"""However many grammars clients send, counters have few names for them."""

from __future__ import annotations

from vllm_adainfer.drafts.grammars import MOST_NAMED, OTHERS, Grammar, Grammars


def test_grammars_beyond_the_first_with_drafts_are_counted_together():
    grammars = Grammars()
    many = [Grammar(str(number)) for number in range(3 * MOST_NAMED)]
    names = [grammars.counted_as(one) for one in [*many, *many]]
    first = [one.name for one in many[:MOST_NAMED]]
    assert names == 2 * [*first, *[OTHERS] * (2 * MOST_NAMED)]
