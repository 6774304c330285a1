"""Of what is sampled at the rows of drafts, exactly what step by step would be sampled is kept."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

from vllm_adainfer.engine.runner.v1_drafts import REFUSED, Drafts, Samples

TOKENS = 1, 2
DRAFTS = [draft for length in range(3) for draft in product(TOKENS, repeat=length)]
PAIRS = [pair for pair in product(DRAFTS, repeat=2) if any(pair)]
FEW = [((), (1,)), ((1, 2), (2,)), ((1, 1), (1, 2)), ((2,), ())]


def drafts_of(pair: tuple[tuple[int, ...], ...]) -> Drafts:
    tokens = torch.tensor([token for draft in pair for token in draft])
    return Drafts.of(list(map(len, pair)), tokens)


def step_by_step(draft: tuple[int, ...], would: tuple[int, ...]) -> list[int]:
    """What a request gets that `would` sample these tokens after the draft's own."""
    kept = []
    for place, token in enumerate(would[: len(draft) + 1]):
        kept.append(token)
        if place == len(draft) or token != draft[place]:
            break
    return kept


def kept_of(output: SamplerOutput) -> list[list[int]]:
    return [
        [token for token in row if token != REFUSED] for row in output.sampled_token_ids.tolist()
    ]


def test_the_rows_of_a_draft_stand_behind_one_another():
    drafts = drafts_of(((), (1, 2), (2,)))
    assert drafts.first_rows.tolist() == [0, 1, 4]
    assert drafts.rows_at(torch.tensor([[1, 2], [2, 1], [0, 0]])).tolist() == [3, 5, 0]
    assert drafts.tokens.tolist() == [[REFUSED] * 2, [1, 2], [2, REFUSED]]


@pytest.mark.parametrize("pair", PAIRS)
def test_of_the_likeliest_tokens_those_up_to_the_first_difference_are_kept(pair):
    drafts = drafts_of(pair)
    for would in product(product(TOKENS, repeat=3), repeat=2):
        rows = [
            token for draft, own in zip(pair, would, strict=True) for token in own[: len(draft) + 1]
        ]
        found = kept_of(drafts.kept_of(torch.tensor(rows)))
        assert found == [step_by_step(*one) for one in zip(pair, would, strict=True)]


def logprobs_at(places: list[list[int]], tokens: list[int]) -> LogprobsTensors:
    """The log-probability says where it was sampled."""
    where = [[10.0 * request + column, -1.0] for request, column in places]
    ids = [[token, 7] for token in tokens]
    return LogprobsTensors(
        torch.tensor(ids, dtype=torch.int32), torch.tensor(where), torch.tensor(tokens)
    )


@pytest.mark.parametrize("with_generators", product([False, True], repeat=2))
@pytest.mark.parametrize("pair", PAIRS)
def test_samples_are_those_of_steps_of_one_token_and_generators_draw_for_these_alone(
    pair, with_generators
):
    drafts = drafts_of(pair)
    generators = {place: torch.Generator() for place, has in enumerate(with_generators) if has}
    for would in product(product(TOKENS, repeat=3), repeat=2):
        first = [own[0] for own in would]
        places = [[0, 0], [1, 0]]
        sampled = SamplerOutput(torch.tensor(first)[:, None], logprobs_at(places, first))
        samples = Samples(sampled, drafts)
        drawn = places.copy()
        for open_places in samples.open_places(generators):
            new = open_places.tolist()
            tokens = [would[request][column] for request, column in new]
            assert new, "an empty batch cannot be sampled"
            assert not any(place in drawn for place in new)
            drawn += new
            samples.put(open_places, torch.tensor(tokens), logprobs_at(new, tokens))
        output = samples.output()
        expected = [step_by_step(*one) for one in zip(pair, would, strict=True)]
        assert kept_of(output) == expected
        for request, kept in enumerate(expected):
            columns = [column for place, column in drawn if place == request]
            if request in generators:
                assert columns == list(range(len(kept)))
            row = request * (max(map(len, pair)) + 1)
            assert output.logprobs_tensors is not None
            ids, scores, ranks = output.logprobs_tensors[:3]
            for column, token in enumerate(kept):
                assert ids[row + column].tolist() == [token, 7]
                assert scores[row + column].tolist() == [10.0 * request + column, -1.0]
                assert ranks[row + column] == token


@pytest.mark.parametrize("pair", FEW)
def test_without_log_probabilities_there_are_none(pair):
    samples = Samples(SamplerOutput(torch.tensor([[1], [2]]), None), drafts_of(pair))
    assert samples.output().logprobs_tensors is None
