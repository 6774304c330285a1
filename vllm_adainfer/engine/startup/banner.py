"""The log lines that say what is active when an engine starts."""

from __future__ import annotations

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.promise import about_labels, right_about, wrong_in_words
from vllm_adainfer.settings.engine import Audit, Auto, Capture, Settings

WHO = {
    "greedy": "greedy requests",
    "all": "all requests",
    "opt-in": 'requests with "adainfer": 1',
    "known": "greedy requests with a question known from calibration",
}
RISKS = {
    "disagreement": "disagreement",
    "accuracy": "accuracy lost",
    "probability": "of the answers wrong",
}


def policy_banner(
    name: str, config: ArtifactConfig, settings: Settings, logprobs_mode: str = "raw_logprobs"
) -> str:
    """The line about one policy; `logprobs_mode` is the engine's."""
    points = ", ".join(map(str, config.exit_points))
    text = (
        f"AdaInfer is on: policy {name}, {config.probe} probe after layers {points} of "
        f"{config.layers}{_branches(config)}, for {_whose(config, settings)} for {_outputs(config)}"
    )
    if config.shared:
        text += f", {_with_prompts(config, settings)}"
    if config.student is not None:
        text += f", with a student ({config.student.name}) before the first layer"
    if config.is_pooled:
        text += _if_partly_cached(config)
    if config.score_head is not None:
        text += f" ({right_about(config)})" if right_about(config) else ""
    elif config.risk == "probability":
        text += _probabilities_served(config, logprobs_mode)
    level = config.level_of(settings.epsilon)
    if level < 0:
        return f"{text}; epsilon is 0, so no request exits unless it sets its own epsilon"
    certified = config.levels[level]
    shadow = f"shadow rate {settings.shadow_rate:g}"
    if settings.shadow_rate and config.risk == "accuracy":
        shadow += (
            " (the right answers are unknown in service: shadow requests measure disagreement, "
            "which the accuracy lost cannot exceed, so they never stop exits)"
        )
    wrong = RISKS[config.risk] if config.top_k is None else "of the queries wrong"
    return (
        f"{text}, at most {certified.epsilon:.3g} {wrong} "
        f"(confidence {1 - config.delta:.0%}{_meaning(config)}), "
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


def _branches(config: ArtifactConfig) -> str:
    """Where branches decide in place of heads."""
    points = ", ".join(map(str, config.branches))
    return f" (a branch after {points})" if points else ""


def _if_partly_cached(config: ArtifactConfig) -> str:
    """What happens to requests that a pooled policy cannot read as a whole."""
    own = config.last_token
    if own is None:
        return " (those with tokens of their own in the prefix cache run all layers)"
    points = ", ".join(map(str, own.exit_points))
    return f" (those with tokens of their own in the prefix cache: label-head after {points})"


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
            f"{1 - auto.delta:.0%}, at every moment, for any traffic); nothing is promised about "
            'the next hour, a part of them, or accuracy. "watch": true changes no answer'
        )
    return (
        f"AdaInfer counts which kinds of one-answer requests come, in {auto.directory}, and "
        f"changes no answer: vllm-adainfer kinds {auto.directory} prints them"
    )


def _outputs(config: ArtifactConfig) -> str:
    """The outputs that a policy serves."""
    if config.choices:
        return f"a choice among {', '.join(repr(choice.text) for choice in config.choices)}"
    tokens = "one token" if config.max_tokens == 1 else "any number of tokens"
    if config.candidates != "labels":
        return tokens
    names = ", ".join(label.name.strip() for label in config.labels)
    if config.score_head is not None:
        what = "classes" if config.score_head == "sigmoids" else "class"
        return f"the {what} of a prompt among {names}"
    if config.label_pool:
        names = f"two or more of {names}"
    what = "among" if config.promises_best_label else "that read probabilities among"
    return f"{tokens} {what} {names}"


def _meaning(config: ArtifactConfig) -> str:
    """What the bound counts as wrong, and over which requests it holds."""
    text = f"; wrong: {wrong_in_words(config)}" if config.risk == "probability" else ""
    text += "".join(f"; {phrase}" for phrase in about_labels(config))
    if config.by_question:
        text += f"; for each of {len(config.questions)} questions, others run all layers"
    elif config.label_pool:
        text += "; over the mixture of questions it was calibrated on"
    return text


def _probabilities_served(config: ArtifactConfig, logprobs_mode: str) -> str:
    """Which probabilities requests may exit with, and which run at full depth."""
    uncertified = (
        "the label mass is not certified, so requests for probabilities in the whole vocabulary "
        "run at full depth"
    )
    if logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
        return f", but not for probabilities, which --logprobs-mode {logprobs_mode} does not return"
    if config.gates:
        return f" ({right_about(config)})"
    if logprobs_mode == "raw_logprobs" and not config.label_mass:
        return (
            f", but not for probabilities: {uncertified}, and those among the labels alone need "
            "--logprobs-mode processed_logprobs"
        )
    text = " and for their probabilities"
    if logprobs_mode == "raw_logprobs":
        return f"{text} in the whole vocabulary"
    if config.label_mass:
        return f"{text}, in the whole vocabulary or among the labels"
    return f"{text} among the labels ({uncertified})"
