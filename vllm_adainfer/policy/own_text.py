"""The text that a student reads of a prompt, tokenised once, when the request arrives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from vllm_adainfer.artifact.fields import SharedTokens, Student

# Caps on what a client's prompt costs on arrival, as multiples of the tokens that a student reads.
MOST_PROMPT_TOKENS = 4  # tokens to decode
MOST_CHARACTERS = 16  # characters to tokenise
TextReader: TypeAlias = Callable[[Sequence[int]], tuple[int, ...]]
NOT_TEXT = "\N{REPLACEMENT CHARACTER}"  # stands in decoded text for bytes that are no UTF-8


def decoding_digest(tokenizer: Any) -> str:
    """SHA-256, in hex digits, of how a model's tokenizer decodes 1,024 evenly spaced tokens."""
    size = len(tokenizer)
    tokens = range(0, size, max(1, size // 1024))
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in tokens]
    return hashlib.sha256("\0".join(map(str, texts)).encode()).hexdigest()


def text_reader(
    decode: Callable[[Sequence[int]], str], student: Student, shared: SharedTokens, tokenizer: str
) -> TextReader:
    """A function that reads a prompt as one student does; calibration and serving both use it.

    It gives the student's tokens, none for a prompt that skips the student. Prompts without the
    `shared` tokens, which all begin and end with, skip it, because they may ask another question,
    which the student does not read. So do prompts with no text of their own between them, or with
    invalid UTF-8. Long texts are cut, in the same way in calibration and in serving.

    `decode` is the served model's tokenizer, from token ids to text without special tokens;
    `tokenizer` is the student's, the JSON of a ``tokenizer.json``.
    """
    own_tokenizer = Tokenizer.from_str(tokenizer)
    own_tokenizer.no_padding()
    own_tokenizer.enable_truncation(student.most_tokens)

    def read(prompt: Sequence[int]) -> tuple[int, ...]:
        if not shared.are_in(prompt):
            return ()
        first, end = len(shared.start), len(prompt) - len(shared.end)
        cut = first + MOST_PROMPT_TOKENS * student.most_tokens
        text = decode(prompt[first : min(end, cut)]) if first < end else ""
        if cut < end:
            text = text.rstrip(NOT_TEXT)  # the first bytes of a character
        if NOT_TEXT in text or not text.strip():
            return ()
        return tuple(own_tokenizer.encode(text[: MOST_CHARACTERS * student.most_tokens]).ids)

    return read
