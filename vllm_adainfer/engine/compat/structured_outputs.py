"""Structured outputs: grammars of choices, and what a grammar leaves open."""

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
    """Whether a request's grammar would accept `tokens` in sequence; its state does not change."""
    if not can_look_ahead(grammar):
        return False
    accepted: list[int] = grammar.validate_tokens(tokens)
    return accepted == tokens


def rest_of(grammar: Any, tokens: Sequence[int], end: int, longest: int) -> str | None:
    """The only text that can follow `tokens` and end an answer; its state does not change.

    None if several texts can follow, or none, or another token than `end` can end the answer; and
    within a character of several bytes, as the rest of it is no text. If what must come next is
    longer than `longest`, it is returned as it is, whatever may follow: finding it again in each
    step would take the square of its length.
    """
    if not can_look_ahead(grammar):
        return None
    try:
        if hasattr(grammar, "ll_matcher"):
            return _rest_by_guidance(grammar, tokens, longest)
        return _rest_by_xgrammar(grammar, tokens, end, longest)
    except UnicodeDecodeError:
        return None


def can_look_ahead(grammar: Any) -> bool:
    """Whether a request's grammar can accept any number of tokens and take them back.

    Those of outlines and lm-format-enforcer cannot: in vLLM 0.32 they roll back no further than its
    own speculative decoding needs, and raise beyond that.
    """
    from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    return isinstance(grammar, XgrammarGrammar | GuidanceGrammar)


def _rest_by_guidance(grammar: Any, tokens: Sequence[int], longest: int) -> str | None:
    matcher = grammar.ll_matcher.deep_copy()
    if not matcher.consume_tokens(list(tokens)):
        return None
    forced: bytes = matcher.compute_ff_bytes()
    if len(forced) > longest:
        return forced.decode()
    if forced and not matcher.consume_tokens(grammar.ll_tokenizer.tokenize_bytes(forced)):
        return None
    if not (matcher.is_stopped() and matcher.is_accepting()):
        return None
    return forced.decode()


def _rest_by_xgrammar(grammar: Any, tokens: Sequence[int], end: int, longest: int) -> str | None:
    matcher, accepted = grammar.matcher, 0
    try:
        for token in tokens:
            if matcher.is_terminated() or not matcher.accept_token(token):
                return None
            accepted += 1
        if matcher.is_terminated():  # by a stop token of the request's own
            return None
        forced: str = matcher.find_jump_forward_string()
        if len(forced) > longest:
            return forced
        if forced:
            if not matcher.accept_string(forced):
                return None
            accepted += 1
        return forced if _can_only_end(grammar, end) else None
    finally:
        matcher.rollback(accepted)


def _can_only_end(grammar: Any, end: int) -> bool:
    """Whether the `end` token is the only one that an xgrammar matcher allows next."""
    import torch

    if grammar.matcher.is_terminated() or not grammar.matcher.accept_token(end):
        return False
    grammar.matcher.rollback(1)
    mask = torch.zeros((1, -(-grammar.vocab_size // 32)), dtype=torch.int32)
    grammar.fill_bitmask(mask, 0)
    allowed = mask.nonzero()[:, 1].tolist()
    bit = 1 << end % 32
    return allowed == [end // 32] and int(mask[0, end // 32]) & 0xFFFFFFFF == bit
