"""A request's own settings, in its ``extra_args``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import CONFIG_KEY
from vllm_adainfer.settings.instruments import RequestInstruments
from vllm_adainfer.strict import Strict

# Keys of a request's extra_args.
EXIT_ARG = "adainfer"
EPSILON_ARG = "adainfer_epsilon"


class RequestKeys(Strict):
    """The documented keys in ``extra_args`` (HTTP: ``vllm_xargs``); an unknown key is an error."""

    adainfer: bool | None = Field(
        None, description="0 runs the request at full depth; 1 lets it exit."
    )
    adainfer_policy: str | None = Field(None, description="Name of the policy that decides.")
    adainfer_epsilon: float | None = Field(
        None, ge=0, lt=1, strict=True, description="Replaces the switch's epsilon."
    )


class RequestSettings(RequestKeys, RequestInstruments):
    """A request's settings as the engine reads them: its documented keys, and the instruments."""


def read_request(arguments: Mapping[str, Any] | None) -> RequestSettings:
    """The settings among a request's ``extra_args``; keys that do not begin with ours are ignored.

    An AdaInferError if one that begins with ``adainfer`` is unknown, or its value is invalid.
    """
    ours = {k: v for k, v in (arguments or {}).items() if k.startswith(CONFIG_KEY)}
    if not ours:
        return NO_REQUEST_SETTINGS
    try:
        return RequestSettings.model_validate(ours)
    except ValidationError as error:
        problem = error.errors()[0]
        where = problem["loc"][0] if problem["loc"] else "a key of extra_args"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(RequestKeys.model_fields)
            raise AdaInferError(
                f"{_shown(where)} is not a key that vllm-adainfer knows; its keys are {known}"
            ) from None
        raise AdaInferError(f"{where} = {_shown(problem['input'])}: {problem['msg']}") from None


def _shown(value: Any) -> str:
    """The repr of `value`, truncated."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # thousands of digits or levels
        return f"a value of type {type(value).__name__}"


NO_REQUEST_SETTINGS = RequestSettings.model_validate({})
