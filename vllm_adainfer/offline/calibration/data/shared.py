"""The tokens that all prompts share: those of the template, the chat template and the question."""

from __future__ import annotations

import string
from collections.abc import Sequence
from datetime import date
from typing import Any

from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.offline.calibration.data.examples import Example, render_chat, shared_start

DAYS = date(2001, 1, 2), date(2002, 11, 23)  # that differ in day, month and year


def shared_tokens(
    examples: Sequence[Example], tokenizer: Any, template: str | None = None
) -> SharedTokens:
    """The tokens that the prompts of `examples` all begin and end with.

    With a `template`, a format string, only tokens of its own text count, as `tokenizer` encodes
    that text alone. They are then also in prompts whose text was tokenised apart from the template,
    as by ``/generative_scoring``. Where the chat template writes today's date, only tokens before
    it count.
    """
    prompts = [example.token_ids for example in examples]
    before, after = ([], []) if template is None else [[part] for part in _ends_of(template)]
    starts = prompts + [tokenizer.encode(text) for text in before]
    start = prompts[0][: shared_start(starts)]
    start = start[: _place_of_date(start, tokenizer)]
    ends = [prompt[len(start) :] for prompt in prompts]
    ends += [tokenizer.encode(text) for text in after]
    length = shared_start([end[::-1] for end in ends])
    end = prompts[0][len(prompts[0]) - length :]
    return SharedTokens(start=tuple(start), end=tuple(end))


def pooled_from(examples: Sequence[Example], shortest: int) -> int:
    """The position after the tokens that all begin with: at least 1, and less than `shortest`.

    `shortest` is the length of the shortest prompt that is recorded. The first token is never
    pooled: it attracts attention, and its state is an outlier.
    """
    shared = shared_start([example.token_ids for example in examples])
    return max(1, min(shared, shortest - 1))


def _ends_of(template: str) -> tuple[str, str]:
    """The text before the first field of a format string, and the text after its last."""
    parts = [*string.Formatter().parse(template)]
    fields = [place for place, (_, field, _, _) in enumerate(parts) if field is not None]
    if not fields:
        return template, template
    before = "".join(text for text, *_ in parts[: fields[0] + 1])
    return before, "".join(text for text, *_ in parts[fields[-1] + 1 :])


def _place_of_date(start: Sequence[int], tokenizer: Any) -> int | None:
    """Where today's date stands in `start`, which a chat template may have written; None: nowhere.

    Templates get the date by ``strftime_now``, a function of transformers.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    message = {"role": "user", "content": "a"}
    try:
        first, second = (
            tokenizer.encode(
                render_chat(tokenizer, [message], strftime_now=day.strftime),
                add_special_tokens=False,
            )
            for day in DAYS
        )
    except ValueError:  # the template rejects the message
        return None
    place = shared_start([first, second])
    is_dated = first != second and list(start[:place]) == first[:place]
    return place if is_dated else None
