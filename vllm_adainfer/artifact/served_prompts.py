"""Which prompts a policy serves, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_adainfer.artifact.fields import SharedTokens

LONGEST = 60  # characters of a text that are quoted


def served_prompts(
    shared: SharedTokens, decode: Callable[[Sequence[int]], str] | None = None
) -> str:
    """The prompts with these tokens, as a phrase that goes on after "prompts".

    `decode` is the model's tokenizer, from token ids to text; None gives numbers of tokens.
    """
    if not shared:
        return "of any kind (those of the calibration share no tokens)"
    parts = []
    if shared.start:
        parts.append(f"begin with {_quoted(shared.start, decode, slice(-LONGEST, None))}")
    if shared.end:
        parts.append(f"end with {_quoted(shared.end, decode, slice(LONGEST))}")
    return f"that {' and '.join(parts)}, as all those of the calibration do"


def _quoted(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str] | None, kept: slice
) -> str:
    """The part of a text that lies next to what differs."""
    if decode is None:
        return f"the same {len(tokens)} tokens"
    text = decode(tokens)
    cut = "" if len(text) <= LONGEST else "the text that has "
    return f"{cut}{text[kept]!r}"
