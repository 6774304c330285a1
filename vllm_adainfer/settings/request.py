"""A request's own settings, in its ``extra_args``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import CONFIG_KEY

# Keys of a request's extra_args.
EXIT_ARG = "adainfer"
EPSILON_ARG = "adainfer_epsilon"
SCRIPT_ARG = "adainfer_exit"
ROW_ARG = "adainfer_row"


class RequestSettings(BaseModel):
    """A request's settings in ``extra_args`` (``vllm_xargs``); an unknown key is an error.

    Keys that do not begin with ``adainfer`` are ignored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adainfer: bool | None = Field(None, description="0 runs at full depth, 1 may exit.")
    adainfer_policy: str | None = Field(None, description="Name of the policy that decides.")
    adainfer_epsilon: float | None = Field(
        None, ge=0, lt=1, strict=True, description="Replaces the switch's epsilon."
    )
    adainfer_exit: int | None = Field(
        None, strict=True, description="With `exit_script`: the exit point at which to leave."
    )
    adainfer_row: int | None = Field(
        None, strict=True, description="While recording: the row of the calibration data."
    )


def read_request(arguments: Mapping[str, Any] | None) -> RequestSettings:
    """Our settings in `arguments`, a request's ``extra_args``.

    Raises:
        AdaInferError: a key of ours is unknown or its value is not valid.

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
            known = ", ".join(RequestSettings.model_fields)
            raise AdaInferError(
                f"{_shown(where)} is not a key that vllm-adainfer knows; its keys are {known}"
            ) from None
        raise AdaInferError(f"{where} = {_shown(problem['input'])}: {problem['msg']}") from None


def _shown(value: Any) -> str:
    """`value` as Python writes it, cut if long."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # thousands of digits or levels
        return f"a value of type {type(value).__name__}"


NO_REQUEST_SETTINGS = RequestSettings.model_validate({})
