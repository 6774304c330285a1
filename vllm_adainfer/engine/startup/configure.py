"""Config time: select model class, worker and scheduler for the switch, or refuse it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import ArtifactConfig, are_exit_points
from vllm_adainfer.artifact.promise import wrong_in_words
from vllm_adainfer.engine.admission.admission import Admission, why_choices_run_on
from vllm_adainfer.engine.classes import GPU_WORKER, SCHEDULER, own_kv_layers, worker_class
from vllm_adainfer.engine.compat.config import leave_full_graphs_to_segments, use_model_class
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.pinned_artifacts import pin_artifacts
from vllm_adainfer.engine.startup.refusals import refuse_unsupported
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)


def configure(vllm_config: VllmConfig, settings: Settings, model_class: str) -> Admission:
    """Check the engine's settings and the artifacts, then select our three classes.

    Returns:
        the admission, which decides which requests may exit.

    Raises:
        AdaInferError: these settings of the engine rule out early exits, or an artifact is for
            another model.

    """
    refuse_unsupported(vllm_config, model_class, settings)
    hf_config = vllm_config.model_config.hf_config
    configs = pin_artifacts(vllm_config, settings, lambda config: config.check_served_by(hf_config))
    refuse_unknown_questions(settings, configs)
    logprobs_mode = vllm_config.model_config.logprobs_mode
    admission = Admission.from_config(vllm_config, settings, configs)
    reason = why_choices_run_on(vllm_config, settings)
    for name, config in configs.items():
        logger.info("%s", banner(name, config, settings, logprobs_mode))
        if config.choices and reason is not None:
            logger.warning("policy %s: requests run at full depth, because %s", name, reason)
    for names in admission.policies.ambiguous:
        logger.warning(
            "policies %s serve the same kind of request: only requests that name one with "
            "adainfer_policy exit early",
            ", ".join(names),
        )
    depth = vllm_config.model_config.hf_text_config.num_hidden_layers
    for key in "exit_script", "exit_points":
        layers = getattr(settings, key)
        if layers is not None and not are_exit_points(layers, depth):
            raise AdaInferError(
                f"additional_config: adainfer.{key} must ascend between 1 and {depth - 1}, got "
                f"{list(layers)}"
            )
    if settings.is_bare:
        logger.info(
            "AdaInfer is on without a policy: rows of prompts that decide nothing stop after "
            "layer %s of %s, where layers begin to share keys and values; the answers are those of "
            "full depth",
            own_kv_layers(vllm_config.model_config.hf_text_config),
            depth,
        )
    if settings.exit_points is not None:
        logger.info(
            "AdaInfer serves policies that come with LoRA adapters, with exits after layers %s",
            ", ".join(map(str, settings.exit_points)),
        )
    if settings.exit_script is not None:
        logger.warning("AdaInfer follows an exit script, for benchmarks: its answers mean nothing")
    use_model_class(vllm_config, model_class)
    if worker_class() == GPU_WORKER:
        leave_full_graphs_to_segments(vllm_config)
    vllm_config.parallel_config.worker_cls = worker_class()
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    return admission


def banner(
    name: str, config: ArtifactConfig, settings: Settings, logprobs_mode: str = "raw_logprobs"
) -> str:
    """The log line that says what is active; `logprobs_mode` is the engine's."""
    level = config.level_of(settings.epsilon)
    who = {
        "greedy": "greedy requests",
        "all": "all requests",
        "opt-in": 'requests with "adainfer": 1',
        "known": "greedy requests that ask a question known from calibration",
    }[settings.requests]
    tokens = "one token" if config.max_tokens == 1 else "any number of tokens"
    among = ""
    if config.choices:
        tokens, among = "a choice", f" among {', '.join(repr(one.text) for one in config.choices)}"
    elif config.candidates == "labels":
        names = ", ".join(label.name.strip() for label in config.labels)
        among = f" among {'two or more of ' if config.label_pool else ''}{names}"
    text = (
        f"AdaInfer is on: policy {name}, {config.probe} probe after layers "
        f"{', '.join(map(str, config.exit_points))} of {config.layers}, for {who} for "
        f"{tokens}{among}"
    )
    if config.risk == "probability":
        text += _probabilities_served(config, settings, logprobs_mode)
    if level < 0:
        return f"{text}; epsilon is 0, so no request exits unless it asks for its own bound"
    certified = config.levels[level]
    risk = {
        "disagreement": "disagreement",
        "accuracy": "accuracy lost",
        "probability": "of the answers wrong",
    }[config.risk]
    meaning = f"; wrong: {wrong_in_words(config)}" if config.risk == "probability" else ""
    if config.by_question:
        meaning += f"; for each of {len(config.questions)} questions, others run all layers"
    elif config.label_pool:
        meaning += "; over the mixture of questions it was calibrated on"
    watched = f"shadow rate {settings.shadow_rate:g}"
    if settings.shadow_rate and config.risk == "accuracy":
        watched += (
            " (the right answers are unknown in service: shadow requests measure disagreement, "
            "which the accuracy lost cannot exceed, and close no bound)"
        )
    return (
        f"{text}, at most {certified.epsilon:.3g} {risk} (confidence "
        f"{1 - config.delta:.0%}{meaning}), "
        f"{certified.layers_saved:.0%} of layers saved in calibration; kv {settings.kv}, {watched}"
    )


def _probabilities_served(config: ArtifactConfig, settings: Settings, logprobs_mode: str) -> str:
    """Which probabilities requests may exit with, and which full depth answers."""
    uncertified = (
        "the label mass is not certified, so requests for probabilities in the whole vocabulary "
        "run at full depth"
    )
    if logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
        return f", but not for probabilities, which --logprobs-mode {logprobs_mode} does not return"
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


def refuse_unknown_questions(settings: Settings, configs: Mapping[str, ArtifactConfig]) -> None:
    """Refuse ``"requests": "known"`` for a policy that knows no question.

    Raises:
        AdaInferError: there is one.

    """
    for name, config in configs.items():
        if settings.requests == "known" and not config.questions:
            raise AdaInferError(
                f'additional_config: adainfer.requests is "known", but policy {name} knows no '
                "question: calibrate it on requests whose prompts end with their question, or drop "
                '"requests"'
            )
