"""The log lines that say what is active when an engine starts."""

from __future__ import annotations

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.scope import if_partly_cached
from vllm_adainfer.artifact.words import (
    outputs_in_words,
    probabilities_in_words,
    probes_in_words,
    promise_in_words,
)
from vllm_adainfer.settings.engine import Audit, Auto, Capture, Settings

WHO = {
    "greedy": "greedy requests",
    "all": "all requests",
    "opt-in": 'requests with "adainfer": 1',
    "known": "greedy requests with a question known from calibration",
}
PROBABILITY_MODES = "raw_logprobs", "processed_logprobs"


def policy_banner(
    name: str, config: ArtifactConfig, settings: Settings, logprobs_mode: str = "raw_logprobs"
) -> str:
    """The line about one policy; `logprobs_mode` is the engine's."""
    text = (
        f"AdaInfer is on: policy {name}, {probes_in_words(config)}, for {_whose(config, settings)} "
        f"for {outputs_in_words(config)}"
    )
    if config.shared:
        text += f", {_with_prompts(config, settings)}"
    if config.student is not None:
        text += f", with a student ({config.student.name}) before the first layer"
    if config.is_pooled:
        cached = if_partly_cached(config)
        text += f" (those with tokens of their own in the prefix cache {cached})"
    served = probabilities_in_words(config)
    if served and config.score_head is None and logprobs_mode not in PROBABILITY_MODES:
        text += (
            f", but not for probabilities, which --logprobs-mode {logprobs_mode} does not return"
        )
    elif served:
        text += f" ({served})"
    level = config.level_of(settings.epsilon)
    if level < 0:
        return f"{text}; epsilon is 0, so no request exits unless it sets its own epsilon"
    certified = config.levels[level]
    shadow = f"shadow rate {settings.shadow_rate:g}"
    if settings.shadow_rate and not config.promise.closes:
        shadow += (
            " (the right answers are unknown in service: shadow requests measure disagreement, "
            "which the accuracy lost cannot exceed, so they never stop exits)"
        )
    return (
        f"{text}, {promise_in_words(config, certified.epsilon)}, "
        f"{certified.layers_saved:.0%} of layers saved in calibration; kv {settings.kv}, {shadow}"
    )


def _whose(config: ArtifactConfig, settings: Settings) -> str:
    """Whose requests a policy serves; a classifier draws nothing, so all of its are greedy."""
    if config.score_head is not None and settings.requests == "greedy":
        return WHO["all"]
    return WHO[settings.requests]


def _with_prompts(config: ArtifactConfig, settings: Settings) -> str:
    """Which prompts may exit."""
    start, end = len(config.shared.start), len(config.shared.end)
    tokens = f"the {start} first and {end} last tokens that all prompts of the calibration share"
    if settings.prompts == "calibrated":
        return f"whose prompts have {tokens}"
    student = ", and its student is not asked" if config.student is not None else ""
    return (
        f'with any prompt ("prompts": "any"): of those without {tokens}, nothing is promised'
        f"{student}"
    )


def capture_notice(capture: Capture) -> str:
    """The line about captured requests."""
    return (
        f"AdaInfer captures {capture.rate:.3g} of the requests, the latest {capture.limit} of each "
        f"engine, in {capture.directory}: these are users' data on disk; drop "
        '"capture" from additional_config to capture none'
    )


def audit_notice(audit: Audit) -> str:
    """The line about the audit."""
    return (
        f"AdaInfer writes where each answer came from, the latest {audit.limit} of each engine, to "
        f"{audit.directory}"
    )


def auto_notice(auto: Auto) -> str:
    """The line about a server that calibrates itself, or only watches."""
    if not auto.watch:
        return (
            "AdaInfer calibrates itself: recurring requests for one label or one of several texts "
            f"are recorded in {auto.directory} (states of prompts count as prompts), and may exit "
            f"once a policy is certified for them. Of all requests of a kind, at most "
            f"{auto.epsilon:.2g} are answered otherwise than at full depth (confidence "
            f"{1 - auto.delta:.0%}, at every moment, for any traffic). This is a long-run bound "
            "over all of them: it says nothing of a single hour, a subset, or accuracy. "
            '"watch": true changes no answer'
        )
    return (
        f"AdaInfer counts which kinds of one-answer requests come, in {auto.directory}, and "
        f"changes no answer: vllm-adainfer kinds {auto.directory} prints them"
    )
