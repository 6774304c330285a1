"""Everything that watches the scheduler.

The counters of the workers, structured answers that are drafted, objects that end early, the rest
of answers that are decided, the audit, the counts of kinds, the capture.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.compat.drafts import why_nothing_is_drafted
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.pinned_artifacts import served_configs
from vllm_adainfer.engine.scheduler.audit import Audit
from vllm_adainfer.engine.scheduler.capture import Capture
from vllm_adainfer.engine.scheduler.drafts import Drafts
from vllm_adainfer.engine.scheduler.kinds import KindCounts
from vllm_adainfer.engine.scheduler.objects import Guesses, RecordedGuesses, WrittenObjects
from vllm_adainfer.engine.scheduler.observer import Counters, Observer
from vllm_adainfer.engine.scheduler.rest_of_answer import RestOfAnswer, check_tokenizer
from vllm_adainfer.settings.engine import Settings

logger = get_logger(__name__)


def observers_of(vllm_config: VllmConfig, settings: Settings, scheduler: Any) -> list[Observer]:
    """What the engine switch asks to watch, of an `ObservedScheduler` that is being made.

    An AdaInferError if a directory cannot be written to, or this engine's tokenizer does not write
    the choices of a policy as in calibration.
    """
    model, engine = vllm_config.model_config, vllm_config.parallel_config.data_parallel_index
    observers: list[Observer] = [] if settings.runs_stock else [Counters()]
    if settings.drafts_structure:  # before other observers append to what was sampled
        reason = why_nothing_is_drafted(vllm_config)
        if reason is None:
            objects = objects_of(settings, scheduler)
            if isinstance(objects, WrittenObjects):
                observers.append(objects)
            observers.append(Drafts(scheduler, not current_platform.is_cpu(), objects))
            logger.info("AdaInfer drafts structured answers from earlier ones to the same grammar")
        else:
            logger.warning("structured answers are not drafted, because %s", reason)
    else:
        reason = '"draft_structure" is false'
    if reason is not None and scheduler.admission is not None:
        warn_of_inactive_objects(scheduler.admission, reason)
    if settings.finishes_choices:
        manager = scheduler.structured_output_manager
        for name, config in served_configs(vllm_config, settings).items():
            if config.choices:
                check_tokenizer(manager.tokenizer, name, config.choices)
        # Sampling masks are split by the number of tokens, and appended tokens have none.
        if not model.return_sampling_mask:
            observers.append(RestOfAnswer(manager, scheduler.max_model_len))
    if settings.audit is not None:
        depth = model.hf_text_config.num_hidden_layers
        tokenizer = scheduler.structured_output_manager.tokenizer
        observers.append(Audit(settings.audit, engine, depth, tokenizer))
    if settings.auto is not None:
        facts = {"model": model.served_model_name, "tokenizer": str(model.tokenizer)}
        calibrates = settings.calibrates_itself
        counts = KindCounts(settings.auto.directory, model.logprobs_mode, calibrates, **facts)
        if scheduler.admission is not None:
            scheduler.admission.arrival.narrowed = counts.narrowed
        observers.append(counts)
    if settings.capture is not None:
        observers.append(Capture(settings.capture, engine, model.served_model_name))
    return observers


def objects_of(settings: Settings, scheduler: Any) -> Guesses | None:
    """The objects that policies decide, or that are recorded; None if there are none.

    An AdaInferError if this engine's tokenizer does not write them as in calibration.
    """
    if settings.record_objects:
        return RecordedGuesses()
    if scheduler.admission is None or not scheduler.admission.has_objects:
        return None
    tokenizer = scheduler.structured_output_manager.tokenizer
    return WrittenObjects(scheduler.admission.policies.configs, tokenizer)


def warn_of_inactive_objects(admission: Admission, reason: str) -> None:
    """Say which policies decide nothing, because nothing is drafted for this `reason`."""
    names = [name for name, one in admission.policies.configs.items() if one.objects]
    if names:
        logger.warning(
            "AdaInfer decides no object by policy %s: it reads a guessed object behind each "
            "prompt, and none is drafted, because %s",
            ", ".join(names),
            reason,
        )
