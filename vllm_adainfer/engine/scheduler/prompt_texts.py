"""The text of a prompt that a student reads, tokenised once, when the request arrives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_adainfer.artifact.files import load_student_tokenizer
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.running import Running
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.own_text import decoding_digest, text_reader
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.v1.request import Request


def texts_for_students(
    vllm_config: VllmConfig, settings: Settings, admission: Admission
) -> Callable[[Request, Running], Mapping[str, tuple[int, ...]]]:
    """What says `Running.texts` of a request, for the students of an engine's policies."""
    readers = {}
    for name, config in admission.policies.configs.items():
        if config.student is None:
            continue
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        if config.student.decoding not in (None, decoding_digest(tokenizer)):
            raise AdaInferError(
                f"policy {name}: this engine's tokenizer decodes prompts into other texts than "
                "that of the calibration, and the student reads texts: serve with the same "
                "tokenizer, or calibrate again"
            )
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        own = load_student_tokenizer(settings.artifacts[name])
        readers[name] = text_reader(decode, config.student, config.shared, own)

    def of(request: Request, resolved: Running) -> Mapping[str, tuple[int, ...]]:
        prompt = request.prompt_token_ids
        is_text = prompt and not request.mm_features and request.prompt_embeds is None
        if not is_text or not resolved.may_exit:  # images and embeddings are no text
            return {}
        names = admission.policies.selectable(resolved, request.lora_request)
        return {name: readers[name](prompt) for name in names if name in readers}

    return of
