"""Requests that ask us for what there is not are refused by vLLM's frontend, with a 400.

vLLM lets custom logits processors look at the parameters of each request when it arrives
(``LogitsProcessor.validate_params``). We hand it one that does this and nothing else: workers drop
it before they build their samplers, see `vllm_adainfer.engine.worker`.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, ClassVar

from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)

from vllm_adainfer.engine.admission import Admission
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm import SamplingParams

_numbers = itertools.count()


class RequestCheck(V1LogitsProcessor, V2LogitsProcessor):
    """One engine's, by a subclass: vLLM calls `validate_params` without saying which engine's."""

    admission: ClassVar[Admission]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ``ValueError``, which vLLM makes a 400 of."""
        try:
            cls.admission.check(sampling_params)
        except AdaInferError as error:
            raise ValueError(str(error)) from None


def use_check(admission: Admission) -> str:
    """What to put among a model's logits processors so that `admission` checks its requests."""
    name = f"RequestCheck{next(_numbers)}"
    check = type(name, (RequestCheck,), {"admission": admission})
    setattr(sys.modules[__name__], name, check)
    return f"{__name__}:{name}"
