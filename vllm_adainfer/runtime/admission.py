"""Admission: which requests may exit, decided from their sampling parameters alone.

The scheduler (for the prefix cache) and the worker (for the exit loop) ask the same question
and must get the same answer.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_adainfer.artifact import ArtifactConfig, load_artifact
from vllm_adainfer.compat import client_request_id, get_logger
from vllm_adainfer.config import Settings
from vllm_adainfer.decision.script import SCRIPT_LABELS
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm import SamplingParams

logger = get_logger(__name__)

FULL_DEPTH = -1
UNLIMITED = 1 << 62
EXIT_ARG = "adainfer"
EPSILON_ARG = "adainfer_epsilon"
ROW_ARG = "adainfer_row"
SCRIPT_ARG = "adainfer_exit"
DEEP_PROMPT_ARG = "adainfer_deep_prompt"  # set by the scheduler, see `with_deep_prompt`


@dataclass(frozen=True)
class Admitted:
    """What the worker remembers of a request.

    Attributes:
        tag: see `Admission.tag`.
        is_shadow: see `Admission.is_shadow`.
        prompt_len: tokens of its prompt.
        max_tokens: how many it will be asked for at most.
        deep_prompt: whether its prompt runs at full depth, whatever the tag.
        wants_prompt: whether it wants log-probabilities of its prompt's tokens.

    """

    tag: int
    is_shadow: bool
    prompt_len: int
    max_tokens: int
    deep_prompt: bool
    wants_prompt: bool


class Admission:
    """Gives each request a tag: `FULL_DEPTH`, or a number the policy knows."""

    def __init__(self, settings: Settings) -> None:
        self.records = settings.record is not None
        self._settings = settings
        self._config: ArtifactConfig | None = None
        self._default_tag = FULL_DEPTH
        if settings.artifact is not None:
            self._config = load_artifact(settings.artifact).config
            self._default_tag = self._config.level_of(settings.epsilon)
        self._label_ids = set(self._config.label_ids) if self._config else set()
        if settings.exit_script is not None:
            self._label_ids = set(SCRIPT_LABELS)

    def admit(self, request_id: str, params: SamplingParams | None, prompt_len: int) -> Admitted:
        """All that the worker is to remember of a request."""
        return Admitted(
            tag=self.tag(params),
            is_shadow=self.is_shadow(request_id),
            prompt_len=prompt_len,
            max_tokens=(params and params.max_tokens) or UNLIMITED,
            deep_prompt=has_deep_prompt(params),
            wants_prompt=params is not None and params.prompt_logprobs is not None,
        )

    def tag(self, params: SamplingParams | None) -> int:
        """The policy's number for a request with `params`, or `FULL_DEPTH`.

        With an artifact the number is a row of its epsilon table, while recording it is the
        row of the calibration data, and with a script the exit point (an index).
        """
        if params is None:
            return FULL_DEPTH
        arguments = params.extra_args or {}
        if self.records:
            return int(arguments.get(ROW_ARG, FULL_DEPTH))
        if self._config is None:
            return self._scripted(params)
        # The OpenAI API carries numbers or text; what is neither 1 nor absent means full depth.
        asked = arguments.get(EXIT_ARG, int(self._settings.requests != "opt-in"))
        if str(asked) not in ("1", "True"):
            return FULL_DEPTH
        plain = self._plain(params, self._config.max_tokens)
        if not (plain and self._same_candidates(params)):
            return FULL_DEPTH
        if EPSILON_ARG not in arguments:
            return self._default_tag
        return self._tag_of_epsilon(self._config, arguments[EPSILON_ARG])

    def _scripted(self, params: SamplingParams) -> int:
        """The exit point that a request names, if a label head could answer it."""
        layer = (params.extra_args or {}).get(SCRIPT_ARG)
        script = self._settings.exit_script or ()
        if layer is not None and layer not in script:
            logger.warning_once(
                "a request asked for adainfer_exit = %s, which is no exit point of the script: it "
                "runs at full depth",
                repr(layer),  # which vLLM remembers, so it must hash
            )
        if layer not in script or not self._same_candidates(params):
            return FULL_DEPTH
        return script.index(layer) if self._plain(params, UNLIMITED) else FULL_DEPTH

    def is_shadow(self, request_id: str) -> bool:
        """Whether a request, if it may exit, is to run to full depth and be compared instead.

        The id decides, so that a repeated run watches the same requests.
        """
        if not self._settings.shadow_rate:
            return False
        digest = hashlib.sha256(client_request_id(request_id).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < self._settings.shadow_rate

    def _plain(self, params: SamplingParams, max_tokens: int) -> bool:
        """Tokens chosen by the scores as they are: what a calibrated bound speaks of.

        Calibrated on one token it speaks of one token only; on more, of any number.
        """
        return (
            (params.max_tokens == 1 or max_tokens > 1)
            and (params.temperature == 0 or self._settings.requests == "all")
            and params.logprobs is None
            and params.prompt_logprobs is None
            and params.logprob_token_ids is None
            and not params.min_tokens
            and not params.logit_bias
            and not params.bad_words
            and params.structured_outputs is None
            and params.thinking_token_budget is None
            and params.repetition_penalty == 1
            and (params.max_tokens == 1 or not params.presence_penalty)
            and (params.max_tokens == 1 or not params.frequency_penalty)
        )

    def _same_candidates(self, params: SamplingParams) -> bool:
        """The request chooses among the tokens that the policy was calibrated on."""
        if params.allowed_token_ids is None:
            return not self._label_ids
        return bool(self._label_ids) and set(params.allowed_token_ids) == self._label_ids

    def _tag_of_epsilon(self, config: ArtifactConfig, epsilon: object) -> int:
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
            logger.warning_once(
                "a request asked for adainfer_epsilon = %s, which is no number: it runs at "
                "full depth",
                repr(epsilon),
            )
            return FULL_DEPTH
        try:
            return config.level_of(epsilon)
        except AdaInferError as error:
            logger.warning_once("a request runs at full depth: %s", str(error))
            return FULL_DEPTH


def with_deep_prompt(params: SamplingParams) -> SamplingParams:
    """A copy of `params` for which the worker runs the prompt at full depth."""
    params = copy.copy(params)  # the caller's object may serve other requests
    params.extra_args = {**(params.extra_args or {}), DEEP_PROMPT_ARG: 1}
    return params


def has_deep_prompt(params: SamplingParams | None) -> bool:
    """Whether `with_deep_prompt` has been here."""
    return params is not None and DEEP_PROMPT_ARG in (params.extra_args or {})
