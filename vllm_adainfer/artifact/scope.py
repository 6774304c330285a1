"""The scope of a promise, in words: labels, prompts, texts, and each bound by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import SharedTokens, Student

LONGEST = 60  # characters of a text that are quoted


def student_in_words(student: Student) -> str:
    """Which encoder a student was trained from, and what it reads."""
    revision = "" if student.revision is None else f" at {student.revision}"
    return (
        f"{student.name}{revision} (license: {student.license or 'not named'}), trained on the "
        f"model's answers; it decides before the first layer, by up to {student.most_tokens} of "
        "its tokens of the prompt's own text"
    )


OTHERWISE = "are answered otherwise"


def about_labels(config: ArtifactConfig) -> list[str]:
    """What a policy promises about single labels, a phrase for each promise."""
    phrases = []
    for promise in config.label_bounds:
        label = promise.label.strip()
        share = f"at most {100 * promise.epsilon:g} % of the requests"
        if promise.kind == "recall":
            phrases.append(f"{share} that full depth answers with {label} {OTHERWISE}")
        else:
            phrases.append(f"{share} answered with {label} {OTHERWISE} at full depth")
    if config.never_early:
        labels = " or ".join(label.strip() for label in config.never_early)
        phrases.append(f"no early answer is {labels}: such requests run all layers")
    return phrases


def each_for_itself(config: ArtifactConfig) -> str:
    """What the confidence of the epsilon table covers: each bound alone, not all together."""
    confidence = f"at confidence {1 - config.delta:.0%}"
    if len(config.levels) == 1 and not config.by_question:
        return f"The bound holds {confidence}."
    if config.label_bounds:
        confidence += ", together with the promises about labels"
    questions = " of each question" if config.by_question else ""
    return (
        f"Each epsilon{questions} holds by itself {confidence}, not all at once: choose the one to "
        "serve before you see the savings, or expect less confidence."
    )


def not_seen_whole(config: ArtifactConfig) -> str:
    """What becomes of prompts that a pooled policy does not see as a whole; "" for another one."""
    if not config.is_pooled:
        return ""
    whose = (
        f"Prompts of at most {config.pooled_from} tokens, and those of which a token from that "
        "position on is in the prefix cache,"
    )
    own = config.last_token
    if own is None:
        return f"{whose} {if_partly_cached(config)}."
    bounds = "within the same bounds, which hold whichever heads decide a request"
    if not own.one_bound:
        bounds = "within bounds of their own, which cover no mixture of both (calibrate again)"
    return f"{whose} {if_partly_cached(config)}, {bounds}:"


def if_partly_cached(config: ArtifactConfig) -> str:
    """What a pooled policy makes of prompts that it does not see as a whole, as a verb."""
    if config.last_token is None:
        return "run all layers"
    points = ", ".join(map(str, config.last_token.exit_points))
    return f"are decided by the state of their last token alone, after layers {points}"


def after_which_text(config: ArtifactConfig) -> list[str]:
    """A paragraph on what a bound on generated text covers; nothing for one-token answers."""
    if config.max_tokens == 1:
        return []
    return [
        "The bound covers tokens that follow the full model's own text, as calibration generated "
        "it. Served tokens follow text with early tokens in it, which the bound does not cover: "
        f"`evaluate` measures their disagreement. Exits stop after {config.max_tokens} tokens, as "
        "many as calibration generated."
    ]


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
