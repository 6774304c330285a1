"""Settings of the engine switch, ``additional_config={"adainfer": {...}}``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from vllm_adainfer.errors import AdaInferError

CONFIG_KEY = "adainfer"
KILL_SWITCH = "VLLM_ADAINFER"
NO_POLICY = "full_depth"  # policy name under which requests that may not exit are counted
DEFAULT_POLICY = "default"  # name of the only policy
ALONE = {"capture", "finish_choices", "enabled"}  # keys that need no artifact
# Policy names appear in requests and in the labels of metrics.
PolicyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class LensRecord(BaseModel):
    """The sums for a lens while recording; see `vllm_adainfer.exits.recorder.LensSums`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: int = Field(ge=2)
    prompts: int = Field(ge=1, description="Those with lower tags; the others are held out.")


class Capture(BaseModel):
    """A sample of the requests, kept on disk; see `vllm_adainfer.engine.scheduler.capture`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: str = Field(min_length=1, description="Made if it is not there, for this user only.")
    rate: float = Field(0.1, gt=0, le=1, description="Share of the requests that is kept.")
    limit: int = Field(
        2000, ge=1, description="Most requests of one engine that the directory keeps."
    )


class Settings(BaseModel):
    """The value of ``additional_config["adainfer"]``; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str | dict[PolicyName, str] | None = Field(
        None,
        description="Directory or hub id of the artifact that `calibrate` wrote; or several, one "
        "per task, by the names that requests may choose them by.",
    )
    record: tuple[int, ...] | None = Field(
        None,
        description="Instead of an artifact: run at full depth and keep the hidden states of "
        "sampled rows after these layers. Used by `calibrate`.",
    )
    record_lens: LensRecord | None = Field(
        None, description="With `record`: sums for a lens at the layers before the last."
    )
    exit_script: tuple[int, ...] | None = Field(
        None,
        description="Instead of an artifact, for benchmarks: exit points; a request leaves at the "
        'one it names with extra_args={"adainfer_exit": LAYER}. The answers mean nothing.',
    )
    exit_points: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="With LoRA adapters, in place of an artifact or beside it: layers after which "
        "requests may leave by a policy that vLLM loads with their adapter, from DIR/adainfer.",
    )
    enabled: bool = Field(True, description="False runs stock vLLM.")
    epsilon: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Bound on disagreement, no stricter than the artifact's strictest. "
        "None takes the artifact's default; 0 never exits.",
    )
    requests: Literal["greedy", "all", "opt-in", "known"] = Field(
        "greedy",
        description="Which requests may exit: greedy ones, sampled ones too, only those that ask "
        'for it with extra_args={"adainfer": 1}, or greedy ones that ask a question which '
        "calibration has seen.",
    )
    min_rows_saved: int | None = Field(
        None,
        ge=1,
        description="Token rows that must be ready to leave before the batch is compacted; "
        "fewer stay until more join them. None lets rows leave wherever that is faster.",
    )
    kv: Literal["exact", "propagate"] = Field(
        "exact",
        description="What the KV cache holds in the layers that a request with more tokens to come "
        "has skipped: what full depth would have written, computed later with the next token "
        "that runs them; or keys and values made from the state it left with.",
    )
    shadow_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Of the requests that may exit, the share that runs to full depth instead, "
        "to be compared with the early answers; 0 compares none.",
    )
    capture: Capture | None = Field(
        None,
        description="Keep a sample of the requests as a batch file, to calibrate on. Without an "
        "artifact the engine is otherwise stock vLLM.",
    )
    finish_choices: bool | None = Field(
        None,
        description="Whether a request with structured_outputs.choice ends as soon as the tokens "
        "sampled leave one choice. None: with an artifact or a script. True also works alone.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Settings:
        if self.artifact == {}:
            raise ValueError('"artifact" names no artifact: give {"NAME": "DIR"}, or a directory')
        if isinstance(self.artifact, dict) and NO_POLICY in self.artifact:
            raise ValueError(f'"{NO_POLICY}" is a reserved name: give the artifact another one')
        sources = self.artifact, self.record, self.exit_script
        given = sum(source is not None for source in sources)
        stands_alone = (
            self.capture is not None or self.finish_choices or self.exit_points is not None
        )
        if self.enabled and given != 1 and (given or not (stands_alone or self.is_bare)):
            raise ValueError('give "artifact": the directory that `calibrate` wrote')
        if self.exit_points is not None and (self.record, self.exit_script) != (None, None):
            raise ValueError(
                '"exit_points" goes with "artifact" or stands alone: drop it, or "record" and '
                '"exit_script"'
            )
        if self.finish_choices and self.record is not None:
            raise ValueError('"finish_choices" and "record" do not go together: drop one')
        if self.capture is not None and (self.record, self.exit_script) != (None, None):
            raise ValueError(
                '"capture" goes with "artifact" or stands alone: drop it, or "record" and '
                '"exit_script"'
            )
        if self.runs_stock and (others := self.model_dump(exclude_defaults=True).keys() - ALONE):
            raise ValueError(
                f'"{min(others)}" goes with "artifact": give the directory that `calibrate` wrote, '
                'or only "capture"'
            )
        if self.exit_script is not None and (self.epsilon is not None or self.shadow_rate):
            raise ValueError('"epsilon" and "shadow_rate" go with "artifact", not "exit_script"')
        if self.record is None and self.record_lens is not None:
            raise ValueError('"record_lens" goes with "record": give both, or neither')
        return self

    @property
    def is_bare(self) -> bool:
        """Whether nothing is set: for models that need no policy, as their layers share keys."""
        return not self.model_dump(exclude_defaults=True)

    @property
    def runs_stock(self) -> bool:
        """Whether the engine runs vLLM's own model and worker; only the scheduler may be ours."""
        sources = self.artifact, self.record, self.exit_script, self.exit_points
        return not self.is_bare and all(source is None for source in sources)

    @property
    def finishes_choices(self) -> bool:
        """Whether requests end once only one choice is left."""
        if self.finish_choices is None:
            return not self.runs_stock and self.record is None
        return self.finish_choices

    @property
    def artifacts(self) -> dict[str, str]:
        """Directory or hub id by the name of the policy."""
        if isinstance(self.artifact, str):
            return {DEFAULT_POLICY: self.artifact}
        return dict(self.artifact or {})


def read_settings(additional_config: Any) -> Settings | None:
    """The plugin's settings, or None if stock vLLM is to run.

    Raises:
        AdaInferError: a key is unknown or a value is not valid.

    """
    if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
        return None
    if os.environ.get(KILL_SWITCH) == "0":
        return None
    given = additional_config[CONFIG_KEY]
    if not isinstance(given, Mapping):
        raise AdaInferError(
            f'additional_config["{CONFIG_KEY}"] must be an object such as '
            f'{{"artifact": "DIR"}}, not {given!r}'
        )
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        raise AdaInferError(_first_problem(error)) from None
    return settings if settings.enabled else None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join([CONFIG_KEY, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        owner = Capture if problem["loc"][0] == "capture" else Settings
        known = ", ".join(sorted(owner.model_fields))
        return f"additional_config: {where} is not a known key; known keys: {known}"
    return f"additional_config: {where}: {problem['msg'].removeprefix('Value error, ')}"
