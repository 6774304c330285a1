"""Answers requests that the engine cannot serve with a 400.

vLLM lets custom logits processors validate the parameters of each request on arrival
(``LogitsProcessor.validate_params``). Ours does nothing else: workers drop it before they build
their samplers, see `vllm_adainfer.engine.worker.worker`.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)

from vllm_adainfer.engine.admission.admission import Admission, check_request
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm import SamplingParams

_numbers = itertools.count()


class RequestCheck(V1LogitsProcessor, V2LogitsProcessor):
    """Subclassed for each engine, with its admission, because vLLM names no engine to the check."""

    admission: ClassVar[Admission]

    @classmethod
    @override
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ``ValueError``, which vLLM turns into a 400, for requests that are refused."""
        try:
            check_request(sampling_params, cls.admission)
        except AdaInferError as error:
            raise ValueError(str(error)) from None


def use_check(admission: Admission) -> str:
    """The qualified name of a logits processor that checks requests by `admission`."""
    name = f"RequestCheck{next(_numbers)}"
    check = type(name, (RequestCheck,), {"admission": admission})
    setattr(sys.modules[__name__], name, check)
    return f"{__name__}:{name}"
