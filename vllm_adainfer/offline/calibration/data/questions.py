"""The questions of requests: a name for each, and the tokens by which serving recognises it.

A request's prompt holds a state and a question about it. The end that all prompts share belongs to
the chat template. The question is the last paragraph before it if enough prompts have that
paragraph, else the last line if enough have that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.policy.questions import End

T = TypeVar("T")

LONGEST_NAME = 300  # characters of a question's name that are kept
OTHERS = "other questions"
SEEN = 20  # a question's wording must occur in at least this many prompts


def with_questions(examples: Sequence[Example], tokenizer: Any) -> list[Example]:
    """Add the wording of each prompt's question, and name the question by it if it has no name."""
    wordings = _wordings([example.text for example in examples], tokenizer.all_special_tokens)
    return [
        replace(example, question=example.question or wording[:LONGEST_NAME], wording=wording)
        for example, wording in zip(examples, wordings, strict=True)
    ]


def _wordings(texts: Sequence[str], special_tokens: Sequence[str]) -> list[str]:
    """The question of each text; the template's end, from a special token on, is not part of it."""
    shared = "".join(common_end(texts))
    before = [text[: len(text) - len(shared)] for text in texts]
    for token in special_tokens:
        shared = shared.partition(token)[0]
    paragraphs = _frequent(before, lambda text: text.rpartition("\n\n")[2])
    lines = _frequent(before, lambda text: text.rpartition("\n")[2])
    own = [paragraph or line for paragraph, line in zip(paragraphs, lines, strict=True)]
    # Where no prompt has a question of its own, the part that all share is the question.
    rest = OTHERS if any(own) else _last_paragraph(shared) or OTHERS
    return [rest if part is None else _last_paragraph(part + shared) for part in own]


def _frequent(texts: Sequence[str], part_of: Callable[[str], str]) -> list[str | None]:
    """The part of each text, None where too few texts have it."""
    parts = [part_of(text) for text in texts]
    counts = Counter(parts)
    return [part if counts[part] >= SEEN else None for part in parts]


def _last_paragraph(text: str) -> str:
    return text.strip().rpartition("\n\n")[2]


def common_end(prompts: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """The longest end that all `prompts` share."""
    length = 0
    for tokens in zip(*(reversed(prompt) for prompt in prompts), strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return tuple(prompts[0][len(prompts[0]) - length :])


def ends_of(examples: Sequence[Example]) -> dict[str, tuple[End, ...]]:
    """By question, the ends by which to recognise its prompts, one for each wording.

    A question is left out if it is rare, or if prompts of others end like its own.
    """
    prompts: dict[tuple[str, str], list[Sequence[int]]] = defaultdict(list)
    for example in examples:
        assert example.question is not None
        assert example.wording is not None
        prompts[example.question, example.wording].append(example.token_ids)
    ends: dict[str, list[End]] = defaultdict(list)
    for (name, _), own in prompts.items():
        if len(own) >= SEEN:
            ends[name].append(common_end(own))
    askers = _askers(examples, ends)
    return {
        name: tuple(dict.fromkeys(own))
        for name, own in ends.items()
        if all(askers[end] == {name} for end in own)
    }


def _askers(
    examples: Sequence[Example], ends: Mapping[str, Sequence[End]]
) -> Mapping[End, set[str | None]]:
    """The questions whose prompts have each end; all prompts have the empty one."""
    askers: dict[End, set[str | None]] = {end: set() for own in ends.values() for end in own}
    lengths = {len(end) for end in askers}
    for example in examples:
        for length in lengths:
            end = tuple(example.token_ids[len(example.token_ids) - length :])
            if end in askers:
                askers[end].add(example.question)
    if () in askers:
        askers[()].add(None)
    return askers
