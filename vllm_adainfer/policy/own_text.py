"""The text that a student reads of a prompt, tokenised once, when the request arrives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from vllm_adainfer.artifact.fields import SharedTokens, Student

# Caps on what a client's prompt costs on arrival, as multiples of the tokens that a student reads.
MOST_PROMPT_TOKENS = 4  # tokens to decode
MOST_CHARACTERS = 16  # characters to tokenise
NOT_TEXT = "\N{REPLACEMENT CHARACTER}"  # stands in decoded text for bytes that are no UTF-8


def decoding_digest(tokenizer: Any) -> str:
    """SHA-256, in hex digits, of how a model's tokenizer decodes 1,024 evenly spaced tokens."""
    size = len(tokenizer)
    tokens = range(0, size, max(1, size // 1024))
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in tokens]
    return hashlib.sha256("\0".join(map(str, texts)).encode()).hexdigest()


class OwnText:
    """Reads prompts as one student does; calibration and serving both use it."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        student: Student,
        shared: SharedTokens,
        tokenizer: str,
    ) -> None:
        """Read what lies between the `shared` tokens that all prompts begin and end with.

        `decode` is the served model's tokenizer, from token ids to text without special tokens;
        `tokenizer` is the student's, the JSON of a ``tokenizer.json``.
        """
        self._decode = decode
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(student.most_tokens)
        self._shared = shared
        self._most_prompt_tokens = MOST_PROMPT_TOKENS * student.most_tokens
        self._most_characters = MOST_CHARACTERS * student.most_tokens

    def tokens_of(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The student's tokens for a prompt; empty for one that skips the student.

        Prompts without the shared tokens skip it, because they may ask another question, which the
        student does not read. So do prompts with no text of their own, or with invalid UTF-8. Long
        texts are cut, in the same way in calibration and in serving.
        """
        if not self._shared.are_in(prompt):
            return ()
        first, end = len(self._shared.start), len(prompt) - len(self._shared.end)
        cut = first + self._most_prompt_tokens
        text = self._decode(prompt[first : min(end, cut)]) if first < end else ""
        if cut < end:
            text = text.rstrip(NOT_TEXT)  # the first bytes of a character
        if NOT_TEXT in text or not text.strip():
            return ()
        return tuple(self._tokenizer.encode(text[: self._most_characters]).ids)
