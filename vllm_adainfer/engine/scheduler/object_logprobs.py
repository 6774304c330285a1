"""The log-probabilities of an early object's tokens, by how probable its heads find each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vllm_adainfer.artifact.outputs import DecidedField, Objects

Alternatives = Mapping[int, float]  # token -> log-probability at one place


def logprobs_of_object(
    objects: Objects, places: Sequence[int], value_logprobs: Sequence[float], end: int
) -> list[Alternatives]:
    """What may stand at each place of the object with these values, and at its end.

    A value has all of its probability on the way in which it is written. Where several values
    begin alike, the token that they share has the sum of theirs, and what follows is given that. At
    other places there is one token, whose log-probability is 0.
    """
    found: list[Alternatives] = [{token: 0.0} for token in objects.start]
    first = 0
    for field, place in zip(objects.fields, places, strict=True):
        found += _of_field(field, place, value_logprobs[first : first + len(field.values)])
        first += len(field.values)
    return [*found, {end: 0.0}]


def _of_field(
    field: DecidedField, place: int, value_logprobs: Sequence[float]
) -> Iterator[Alternatives]:
    """At each token of the value in this place; that of the value itself comes first."""
    possible: Sequence[int] = range(len(field.values))
    for at, token in enumerate(field.values[place].written):
        shares: dict[int, float] = {token: -np.inf}
        for one in possible:
            for other in field.values[one].written[at : at + 1]:
                share = np.logaddexp(shares.get(other, -np.inf), value_logprobs[one])
                shares[other] = float(share)
        total = np.logaddexp.reduce([*shares.values()])
        yield {other: float(share - total) for other, share in shares.items()}
        possible = [one for one in possible if field.values[one].written[at : at + 1] == (token,)]
