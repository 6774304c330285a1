"""Structured outputs: grammars of choices."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from vllm_adainfer.artifact.fields import MOST_CHOICE_CHARACTERS, MOST_CHOICES

ROOT = "root ::= "
BETWEEN = " | "
LITERAL = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
# Each character may be escaped, as in \u001f, and each choice has quotes and a bar around it.
LONGEST_GRAMMAR = 6 * MOST_CHOICE_CHARACTERS + 5 * MOST_CHOICES + len(ROOT)


def choices_of(choice: Sequence[str] | None, grammar: str | None) -> list[str] | None:
    """The texts that a request chooses from, by two fields of its ``structured_outputs``.

    vLLM 0.32's frontend replaces ``choice`` by a grammar, in place, if the backend is xgrammar
    (`validate_xgrammar_grammar`), so choices are also recovered from such a grammar. None if the
    request is restricted in another way, or by more than `MOST_CHOICES` texts, or more than
    `MOST_CHOICE_CHARACTERS` in all: it runs as in stock vLLM then. The time is linear in these
    limits, whatever a client sends.
    """
    choices = _choices_in(grammar or "") if choice is None else choice
    if choices is None or len(choices) > MOST_CHOICES:
        return None
    return list(choices) if sum(map(len, choices)) <= MOST_CHOICE_CHARACTERS else None


def _choices_in(grammar: str) -> list[str] | None:
    """The choices of a grammar that vLLM 0.32's `choice_as_grammar` wrote; None for any other."""
    from vllm.v1.structured_output.utils import choice_as_grammar

    if len(grammar) > LONGEST_GRAMMAR or not grammar.startswith(ROOT):
        return None
    choices: list[str] = []
    place = len(ROOT)
    while len(choices) <= MOST_CHOICES and (literal := LITERAL.match(grammar, place)):
        try:  # its escapes are JSON's
            choices.append(json.loads(literal[0]))
        except ValueError:
            return None
        place = literal.end()
        if place == len(grammar):
            return choices if choice_as_grammar(choices) == grammar else None
        if not grammar.startswith(BETWEEN, place):
            return None
        place += len(BETWEEN)
    return None


def accepts_all(grammar: Any, tokens: list[int]) -> bool:
    """Whether a request's grammar would accept `tokens` in sequence; its state does not change.

    False for the backends of outlines and lm-format-enforcer: in vLLM 0.32 they roll back no
    further than speculation needs, and raise beyond that.
    """
    from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    if not isinstance(grammar, XgrammarGrammar | GuidanceGrammar):
        return False
    return grammar.validate_tokens(tokens) == tokens
