"""The log-probabilities of an early object: its heads' where tokens decide, 0 elsewhere."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.outputs import LogprobsLists

from vllm_adainfer.artifact.outputs import DecidedField, Objects, Value
from vllm_adainfer.drafts.fields import Token, probabilities
from vllm_adainfer.engine.compat.scheduler import replace_tokens, sampled_logprobs
from vllm_adainfer.engine.scheduler.object_logprobs import logprobs_of_object

# Two of the moods begin alike, and behind the common token one of them is short.
TEXTS = ['{"mood": "', "ne", "gative", 'utral", "seen": ', '", "seen": ', "positive", "t", "rue"]
TEXTS += ["false", "}", "<end>"]
START, NE, GATIVE, UTRAL, REST, POSITIVE, T, RUE, FALSE, CLOSE, END = range(len(TEXTS))


def field(path: str, guess: int, **values: tuple[int, ...]) -> DecidedField:
    found = [Value(text=one, written=own) for one, own in values.items()]
    return DecidedField(path=path, values=tuple(found), guess=guess)


MOODS = {
    '"negative"': (NE, GATIVE, REST),
    '"neutral"': (NE, UTRAL),
    '"positive"': (POSITIVE, REST),
}
OBJECTS = Objects(
    schema_digest="0" * 64,
    start=(START,),
    fields=(
        field("mood", 0, **MOODS),
        field("seen", 0, false=(FALSE, CLOSE), true=(T, RUE, CLOSE)),
    ),
)
SHARES = [0.3, 0.2, 0.5, 0.9, 0.1]
LOGPROBS = [math.log(one) for one in SHARES]


def shares(*places: int) -> list[tuple[str, dict[str, float]]]:
    """Each token, and how probable it and the others at its place are."""
    found = logprobs_of_object(OBJECTS, places, LOGPROBS, END)
    assert [next(iter(one)) for one in found] == [*OBJECTS.written(places), END]
    return [
        (TEXTS[next(iter(one))], {TEXTS[token]: round(math.exp(p), 6) for token, p in one.items()})
        for one in found
    ]


def test_a_value_with_a_token_of_its_own_is_decided_there():
    assert shares(2, 0) == [
        (TEXTS[START], {TEXTS[START]: 1}),
        ("positive", {"positive": 0.5, "ne": 0.5}),
        (TEXTS[REST], {TEXTS[REST]: 1}),
        ("false", {"false": 0.9, "t": 0.1}),
        ("}", {"}": 1}),
        ("<end>", {"<end>": 1}),
    ]


def test_values_that_begin_alike_are_decided_where_they_part():
    assert shares(1, 1) == [
        (TEXTS[START], {TEXTS[START]: 1}),
        ("ne", {"ne": 0.5, "positive": 0.5}),
        (TEXTS[UTRAL], {TEXTS[UTRAL]: 0.4, "gative": 0.6}),
        ("t", {"t": 0.1, "false": 0.9}),
        ("rue", {"rue": 1}),
        ("}", {"}": 1}),
        ("<end>", {"<end>": 1}),
    ]


@pytest.mark.parametrize("places", [(0, 0), (1, 1)])
def test_a_client_reads_the_probabilities_of_the_heads(places):
    """By the same rules as those of an object of full depth."""
    answer = []
    for one in logprobs_of_object(OBJECTS, places, LOGPROBS, END)[:-1]:
        texts = {TEXTS[token]: logprob for token, logprob in one.items()}
        answer.append(Token(*next(iter(texts.items())), texts))
    values = {one.path: [value.text for value in one.values] for one in OBJECTS.fields}
    found = probabilities(answer, values)
    assert found == {
        "mood": pytest.approx({"negative": 0.3, "neutral": 0.2, "positive": 0.5}),
        "seen": pytest.approx({"false": 0.9, "true": 0.1}),
    }


def of_step(starts: list[int] | None) -> Any:
    """What a step sampled for three requests, with the two best tokens beside each."""
    rows = 5 if starts else 3
    lists = LogprobsLists(
        np.arange(3 * rows, dtype=np.int32).reshape(rows, 3),
        -np.arange(3.0 * rows, dtype=np.float32).reshape(rows, 3),
        np.arange(1, rows + 1),
        starts,
    )
    sampled = [[7, 8], [9], [3, 4]] if starts else [[7], [9], [3]]
    names = ["a", "b", "c"]
    places = {name: place for place, name in enumerate(names)}
    return SimpleNamespace(
        logprobs=lists, req_ids=names, req_id_to_index=places, sampled_token_ids=sampled
    )


@pytest.mark.parametrize("starts", [None, [0, 2, 3], [0, 2, 3, 5]])
def test_they_stand_in_place_of_what_was_sampled_and_those_of_others_stay(starts):
    output: Any = of_step(starts)
    before = {name: sampled_logprobs(output, name) for name in "abc"}
    request: Any = SimpleNamespace(request_id="b", num_computed_tokens=9, num_stale_output_tokens=0)
    scheduled = SimpleNamespace(scheduled_spec_decode_tokens={"b": [5, 5]})
    written = [{4: -0.5, 6: -0.1, 2: -3.0}, {1: 0.0}]
    replace_tokens(scheduled, output, request, output.sampled_token_ids[1], [4, 1], written)
    assert output.sampled_token_ids[1] == [4, 1]
    ids, values, ranks, _ = sampled_logprobs(output, "b")
    assert ids.tolist()[0] == [4, 6, 4], "the token itself, and the best ones"
    assert values[0].tolist() == pytest.approx([-0.5, -0.1, -0.5])
    assert ids[1, :2].tolist() == [1, 1]
    assert ids[1, 2] != 1
    assert values[1].tolist() == [0, 0, -np.inf], "nothing else may stand there"
    assert ranks.tolist() == [2, 1]
    assert (ids.dtype, values.dtype) == (before["b"][0].dtype, before["b"][1].dtype)
    for name in "ac":
        for own, other in zip(sampled_logprobs(output, name)[:3], before[name][:3], strict=True):
            assert np.array_equal(own, other)
