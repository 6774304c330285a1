"""How probable the values of an object's fields are, by the tokens of answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.drafts.fields import Token, probabilities_by_json
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.progress import say
from vllm_adainfer.promise.promise import Promise

BEST_TOKENS = 20  # vLLM's default `--max-logprobs`


def best_tokens(values: Iterable[Collection[Any]]) -> int:
    """How many tokens are asked for at each place, given the values of each field.

    At least as many as a client gets.
    """
    return max(BEST_TOKENS, *map(len, values))


def values_of_answers(
    objects: Objects, codes: Sequence[int], answers: Sequence[Iterable[Any]], tokenizer: Any
) -> Tensor:
    """fp32 [answers, values of all fields], how probable each value of a field is by an answer.

    Read at the tokens that decide it, behind the fields as they were written; those of a field
    sum to 1. A value that begins with none of the best tokens has nothing. Of a field that cannot
    be read, the value that was written has all of it.

    `codes` say what was written, see `ByField.code`; `answers` have, for each token, vLLM's
    log-probabilities by token, that of the token itself first.
    """
    texts: dict[int, str] = {}

    def text_of(token: int) -> str:
        if token not in texts:
            texts[token] = tokenizer.decode([token])
        return texts[token]

    def token_of(others: Mapping[int, Any]) -> Token:
        known = {token: one.logprob for token, one in others.items()}
        written = next(iter(known))
        by_text = {text_of(token): one for token, one in known.items()}
        return Token(text_of(written), known[written], by_text)

    fields = {field.path: [one.text for one in field.values] for field in objects.fields}
    found = torch.zeros(len(codes), len(objects.labels))
    unread = 0
    for row, (code, answer) in enumerate(zip(codes, answers, strict=True)):
        read = probabilities_by_json([token_of(others) for others in answer], fields)
        start = 0
        for place, (path, values) in zip(objects.link.places(code), fields.items(), strict=True):
            shares = read.get(path, {})
            unread += values[place] not in shares
            if values[place] not in shares:
                shares = {values[place]: 1.0}
            own = torch.tensor([shares.get(value, 0.0) for value in values])
            found[row, start : start + len(values)] = own / own.sum()
            start += len(values)
    if unread:
        say(
            f"the probabilities of {unread} of {len(codes) * len(fields)} values cannot be read "
            "from the tokens of their answers: what was written counts as certain"
        )
    return found


def check_tells(objects: Objects, promise: Promise) -> None:
    """Check that each object tells the probabilities that are promised of its fields.

    It does if the values of a field differ at one token. If some of them differ from each other
    only later, an object with yet another one tells how probable these are together.

    An AdaInferError if a field does not.
    """
    if not promise.reads_probabilities:
        return
    named = {objects.at(label)[0] for label in promise.named}
    for field in (objects.fields[one] for one in sorted(named) or range(len(objects.fields))):
        written = [one.written for one in field.values]
        alike_until = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*written, strict=False))
        at = len([*alike_until])
        firsts = [own[at : at + 1] for own in written]
        if len(written) > 1 and (() in firsts or len(set(firsts)) < len(firsts)):
            alike = next(one for one in firsts if one == () or firsts.count(one) > 1)
            some = [
                value.text
                for value, first in zip(field.values, firsts, strict=True)
                if first == alike
            ]
            raise AdaInferError(
                f"{promise.option} needs values of {field.path} that differ at one token, and "
                f"{', '.join(some)} begin alike where others do not: an object with another value "
                "does not tell how probable each of these is. Rename one, or drop "
                f"{promise.option}"
            )
