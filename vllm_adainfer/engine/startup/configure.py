"""Config time: check the engine switch, and select our model class, worker and scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config_rules import are_exit_points
from vllm_adainfer.auto.cores import note_cores
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.engine.admission.admission import Admission, why_choices_run_on
from vllm_adainfer.engine.classes import GPU_WORKER, SCHEDULER, own_kv_layers, worker_class
from vllm_adainfer.engine.compat.compilation import find_compiled_code_again
from vllm_adainfer.engine.compat.config import (
    engine_options_of,
    has_custom_worker,
    leave_full_graphs_to_segments,
    use_model_class,
)
from vllm_adainfer.engine.compat.drafts import default_penalties
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.pinned_artifacts import pin_artifacts
from vllm_adainfer.engine.scheduler.line_files import check_directory
from vllm_adainfer.engine.startup.banner import (
    audit_notice,
    auto_notice,
    capture_notice,
    policy_banner,
)
from vllm_adainfer.engine.startup.refusals import (
    refuse_policy,
    refuse_torn_captures,
    refuse_unsupported,
)
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)


def configure(vllm_config: VllmConfig, settings: Settings, model_class: str) -> Admission:
    """Check the engine's settings and the artifacts, then select our three classes.

    Returns the admission of requests, for the frontend. An AdaInferError if a setting of the engine
    rules out early exits, or an artifact cannot be served by it.
    """
    refuse_unsupported(vllm_config, model_class, settings)
    configs = pin_artifacts(vllm_config, settings)
    text_config = vllm_config.model_config.hf_text_config
    options = engine_options_of(vllm_config)
    for name, config in configs.items():
        config.check_served_by(vllm_config.model_config.hf_config)
        config.check_options(options)
        config.check_rows_go_on(own_kv_layers(text_config) or text_config.num_hidden_layers)
        refuse_policy(name, config, vllm_config, settings)
    _check_fixed_exit_points(vllm_config, settings)
    admission = Admission.from_config(vllm_config, settings, configs)
    _log_policies(vllm_config, settings, admission)
    use_model_class(vllm_config, model_class)
    if worker_class() == GPU_WORKER:
        leave_full_graphs_to_segments(vllm_config)
    find_compiled_code_again()
    vllm_config.parallel_config.worker_cls = worker_class()
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    return admission


def configure_scheduler(vllm_config: VllmConfig, settings: Settings) -> None:
    """Select our scheduler for keys that need no policy: capture, kinds, answers sped up."""
    if settings.capture is not None:
        _select_scheduler(vllm_config, "capture")
        refuse_torn_captures(vllm_config)
        check_directory("capture", settings.capture.directory)
        logger.warning("%s", capture_notice(settings.capture))
    if settings.audit is not None:
        check_directory("audit", settings.audit.directory)
        logger.info("%s", audit_notice(settings.audit))
    if settings.auto is not None:
        _select_scheduler(vllm_config, "auto")
        _refuse_replicas(vllm_config)
        AutoDirectory(settings.auto.directory).create()
        note_cores()
        logger.warning("%s", auto_notice(settings.auto))
    if settings.finish_choices:
        _select_scheduler(vllm_config, "finish_choices")
    if settings.finishes_choices:
        logger.info("AdaInfer ends requests with a grammar once it leaves only one answer")
    if settings.draft_structure:
        _select_scheduler(vllm_config, "draft_structure")
        if settings.runs_stock and not has_custom_worker(vllm_config):
            vllm_config.parallel_config.worker_cls = worker_class(has_exits=False)
        for name, value in default_penalties(vllm_config).items():
            logger.warning(
                "requests get %s=%g from the model's generation config, and answers with it are "
                "not drafted: start with --generation-config vllm, or send another value",
                name,
                value,
            )


def _select_scheduler(vllm_config: VllmConfig, key: str) -> None:
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        raise AdaInferError(
            f'vllm-adainfer: "{key}" needs our scheduler, which a custom --scheduler-cls '
            f'replaces: drop it, or drop "{key}" from additional_config'
        )
    if vllm_config.model_config.is_diffusion:
        raise AdaInferError(
            f'vllm-adainfer: a diffusion model has a scheduler of its own, without "{key}": drop '
            f'"{key}" from additional_config'
        )
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER


def _refuse_replicas(vllm_config: VllmConfig) -> None:
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise AdaInferError(
            'vllm-adainfer: "auto" counts the requests of one engine: serve with '
            "--data-parallel-size 1, and start each replica as a server with a directory of its own"
        )


def _check_fixed_exit_points(vllm_config: VllmConfig, settings: Settings) -> None:
    depth = vllm_config.model_config.hf_text_config.num_hidden_layers
    for key in "exit_script", "exit_points":
        layers = getattr(settings, key)
        if layers is not None and not are_exit_points(layers, depth):
            raise AdaInferError(
                f"additional_config: adainfer.{key} must ascend between 0 and {depth - 1}, got "
                f"{list(layers)}"
            )


def _log_policies(vllm_config: VllmConfig, settings: Settings, admission: Admission) -> None:
    """Log what is active, and which requests run at full depth against expectation."""
    reason = why_choices_run_on(vllm_config, settings)
    for name, config in admission.policies.configs.items():
        mode = vllm_config.model_config.logprobs_mode
        logger.info("%s", policy_banner(name, config, settings, mode))
        if config.choices and reason is not None:
            logger.warning("policy %s: requests run at full depth, because %s", name, reason)
    for names in admission.policies.ambiguous:
        logger.warning(
            "policies %s serve the same kind of request: only requests that name one with "
            "adainfer_policy exit early",
            ", ".join(names),
        )
    text_config = vllm_config.model_config.hf_text_config
    if settings.is_empty:
        logger.info(
            "AdaInfer is on without a policy: prompt tokens that are not sampled stop after layer "
            "%s of %s, where layers begin to share keys and values; the answers are those of full "
            "depth",
            own_kv_layers(text_config),
            text_config.num_hidden_layers,
        )
    if settings.exit_points is not None:
        logger.info(
            "AdaInfer serves policies bundled with LoRA adapters, with exits after layers %s",
            ", ".join(map(str, settings.exit_points)),
        )
    if settings.exit_script is not None:
        logger.warning("AdaInfer follows an exit script, for benchmarks: its answers mean nothing")
