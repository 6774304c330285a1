"""What a policy promises, in words."""

from __future__ import annotations

from vllm_adainfer.artifact.config import ArtifactConfig


def wrong_in_words(config: ArtifactConfig) -> str:
    """Which answers of a policy for probabilities count as wrong."""
    assert config.tolerance is not None
    where = " (among the labels or in the whole vocabulary)" if config.label_mass else ""
    return (
        f"another best label than full depth's, or a label's probability{where} that moves by more "
        f"than {config.tolerance:g}"
    )


def each_for_itself(config: ArtifactConfig) -> str:
    """How the confidence of a table of bounds is meant."""
    confidence = f"at confidence {1 - config.delta:.0%}"
    if len(config.levels) == 1 and not config.by_question:
        return f"The bound holds {confidence}."
    questions = " of each question" if config.by_question else ""
    return (
        f"Each epsilon{questions} holds by itself {confidence}, not all at once: choose the one to "
        "serve before the savings are known, or take the confidence for less."
    )


def after_which_text(config: ArtifactConfig) -> list[str]:
    """What a policy for generated text is calibrated on; nothing for one-token answers."""
    if config.max_tokens == 1:
        return []
    return [
        "The bound is about tokens that follow the full model's text, as calibration generated it. "
        "Served tokens follow text with early tokens in it, which it does not cover: `evaluate` "
        f"measures that. Exits stop after {config.max_tokens} tokens, as many as calibration "
        "generated."
    ]
