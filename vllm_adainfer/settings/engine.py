"""The engine switch, ``additional_config={"adainfer": {...}}``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.instruments import SwitchInstruments
from vllm_adainfer.strict import Strict

CONFIG_KEY = "adainfer"
KILL_SWITCH = "VLLM_ADAINFER"
NO_POLICY = "full_depth"  # counts requests that may not exit as if it were a policy
DEFAULT_POLICY = "default"  # name of the policy where only one directory is given
# These work on vLLM's own model.
STOCK_KEYS = {"audit", "auto", "capture", "draft_structure", "finish_choices", "enabled"}
NOT_WITH_AUTO = {"artifact", "exit_points", "epsilon", "requests", "shadow_rate"}
AUTO_POINTS = 6  # evenly from 40 to 85 % of the layers; and one before the first layer
# Policy names appear in requests and in the labels of metrics.
PolicyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Capture(Strict):
    """A sample of the requests, kept on disk; see `vllm_adainfer.engine.scheduler.capture`."""

    directory: str = Field(
        min_length=1, description="Created if missing, accessible to this user only."
    )
    rate: float = Field(0.1, gt=0, le=1, description="Fraction of requests to keep.")
    limit: int = Field(
        2000, ge=1, description="Maximum number of requests kept for each engine; the latest stay."
    )


class Audit(Strict):
    """A line for each request that ends; see `vllm_adainfer.engine.scheduler.audit`."""

    directory: str = Field(
        min_length=1, description="Created if missing, accessible to this user only."
    )
    limit: int = Field(
        1_000_000,
        ge=1,
        description="Maximum number of lines kept for each engine; the latest stay.",
    )


class Auto(Strict):
    """A server that calibrates itself; see `vllm_adainfer.auto`."""

    directory: str = Field(
        min_length=1,
        description="Created if missing, accessible to this user only: it has states of prompts.",
    )
    watch: bool = Field(
        False,
        description="Only count which kinds of requests come. No answer changes, and the engine is "
        "otherwise stock vLLM.",
    )
    epsilon: float = Field(
        0.02, gt=0, lt=1, description="Bound on the share of changed answers, for each kind."
    )
    delta: float = Field(
        0.1, gt=0, lt=1, description="Probability with which a bound may ever be exceeded."
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="How far probabilities may move; an answer counts as changed if one moves "
        "further. Without it, requests that read probabilities run at full depth.",
    )
    full_depth_rate: float = Field(
        0.25,
        ge=0.03,
        lt=1,
        description="Share of the requests that run to full depth to be compared. It falls once "
        "the bound allows less.",
    )


class Switch(Strict):
    """The documented keys of the engine switch; an unknown key is an error."""

    artifact: str | dict[PolicyName, str] | None = Field(
        None,
        description="Directory or hub id of the artifact that `calibrate` wrote; or several, one "
        "per task, each under the name by which requests can choose it.",
    )
    exit_points: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="With LoRA adapters, alone or together with an artifact: layers after which "
        "requests may exit under a policy that vLLM loads with their adapter, from DIR/adainfer.",
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
        description="Which requests may exit: greedy ones; all, sampled ones included; those that "
        'opt in with extra_args={"adainfer": 1}; or greedy ones with a question known from '
        "calibration.",
    )
    prompts: Literal["calibrated", "any"] = Field(
        "calibrated",
        description="Which prompts may exit: those with the tokens that all prompts of the "
        "calibration begin and end with; or any, of which nothing is promised. A student is never "
        "asked about others.",
    )
    min_rows_saved: int | None = Field(
        None,
        ge=1,
        description="Number of tokens that must be ready to exit before the batch is compacted; "
        "fewer stay until more are ready. None compacts wherever that is faster.",
    )
    kv: Literal["exact"] = Field(
        "exact",
        description="What fills the KV cache of skipped layers when a request generates more "
        "tokens: `exact` computes what full depth would have written, together with the next token "
        "that runs those layers.",
    )
    shadow_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of the requests that may exit which run to full depth instead, to "
        "compare their early answers with those of full depth.",
    )
    capture: Capture | None = Field(
        None,
        description="Keep a sample of the requests as a batch file to calibrate on. Without an "
        "artifact the engine is otherwise stock vLLM.",
    )
    audit: Audit | None = Field(
        None,
        description="Write a line for each request that ends: its policy and bound, the layers "
        "that it ran, and its answer. `vllm-adainfer audit` sums the lines up.",
    )
    auto: Auto | None = Field(
        None,
        description="Find recurring one-answer requests, calibrate policies for them beside "
        "serving, and serve with these. Alone, without an artifact.",
    )
    finish_choices: bool | None = Field(
        None,
        description="Whether a request with a grammar (choice, JSON schema, regex, tool call) ends "
        "as soon as its tokens leave only one answer. None: unless the engine is stock vLLM. True "
        "also works alone.",
    )
    draft_structure: bool | None = Field(
        None,
        description="Whether answers to a grammar (JSON schema, regex, tool call, choice) are "
        "drafted from earlier ones and verified, many tokens a step. No answer changes. None: "
        "unless the engine is stock vLLM. True also works alone.",
    )

    @field_validator("kv", mode="before")
    @classmethod
    def _is_exact(cls, kv: Any) -> Any:
        if kv == "propagate":
            raise ValueError(
                "propagated keys and values are gone, as no bound covered them: drop the key, "
                'which is "exact"'
            )
        return kv


class Settings(Switch, SwitchInstruments):
    """The switch as the engine reads it: its documented keys, and the instruments."""

    @model_validator(mode="after")
    def _has_artifact_where_needed(self) -> Settings:
        if self.artifact == {}:
            raise ValueError('"artifact" names no artifact: give {"NAME": "DIR"}, or a directory')
        if isinstance(self.artifact, dict) and NO_POLICY in self.artifact:
            raise ValueError(f'"{NO_POLICY}" is a reserved name: give the artifact another one')
        if self.runs_stock:
            watches = self.capture is not None or self.auto is not None
            ends_early = self.finish_choices or self.draft_structure
            if self.enabled and not watches and not ends_early:
                raise ValueError('give "artifact": the directory that `calibrate` wrote')
            if others := self.model_dump(exclude_defaults=True).keys() - STOCK_KEYS:
                raise ValueError(
                    f'"{min(others)}" goes with "artifact": give the directory that `calibrate` '
                    'wrote, or only "capture"'
                )
        others = self.model_dump(exclude_defaults=True).keys() & NOT_WITH_AUTO
        if self.calibrates_itself and others:
            raise ValueError(
                f'"auto" makes its own policies, without "{min(others)}": drop one of them, or '
                'only watch, with "auto": {"directory": "DIR", "watch": true}'
            )
        return self

    @property
    def is_empty(self) -> bool:
        """Whether nothing is set, which suits models whose layers share keys and values."""
        return not self.model_dump(exclude_defaults=True)

    @property
    def replaces_model(self) -> bool:
        """Whether a key or an instrument needs a model with exit points."""
        given = self.artifact, self.exit_points, self.record, self.exit_script
        return self.calibrates_itself or any(one is not None for one in given)

    @property
    def calibrates_itself(self) -> bool:
        """Whether the server makes policies of its own traffic."""
        return self.auto is not None and not self.auto.watch

    @property
    def compares(self) -> bool:
        """Whether some requests run to full depth to compare both answers."""
        return self.shadow_rate > 0 or self.calibrates_itself or self.compare

    @property
    def runs_stock(self) -> bool:
        """Whether the engine runs vLLM's own model and worker; only the scheduler may be ours."""
        return not self.is_empty and not self.replaces_model

    @property
    def finishes_choices(self) -> bool:
        """Whether requests end once their grammar leaves one answer; never while recording."""
        if self.record is not None:
            return False
        return not self.runs_stock if self.finish_choices is None else self.finish_choices

    @property
    def drafts_structure(self) -> bool:
        """Whether structured answers are drafted; while recording, those of objects alone."""
        if self.record is not None:
            return bool(self.record_objects)
        return not self.runs_stock if self.draft_structure is None else self.draft_structure

    @property
    def artifacts(self) -> dict[str, str]:
        """Directory or hub id by policy name."""
        if isinstance(self.artifact, str):
            return {DEFAULT_POLICY: self.artifact}
        return dict(self.artifact or {})

    @model_validator(mode="after")
    def _has_one_source(self) -> Settings:
        instruments = self.record, self.exit_script
        if instruments == (None, None):
            for key in "record_lens", "record_pooled_from", "record_states", "record_objects":
                if getattr(self, key) is not None:
                    raise ValueError(f'"{key}" goes with "record": give both, or neither')
            return self
        if self.record_states is not None and self.record_pooled_from is None:
            raise ValueError('"record_states" goes with "record_pooled_from": give both')
        if self.artifact is not None or None not in instruments:
            raise ValueError(
                'give "artifact": the directory that `calibrate` wrote, without "record" and '
                '"exit_script"'
            )
        for key in "audit", "auto", "capture", "exit_points":
            if getattr(self, key) is not None:
                raise ValueError(
                    f'"{key}" goes with "artifact" or stands alone: drop it, or "record" and '
                    '"exit_script"'
                )
        for key in "finish_choices", "draft_structure":
            if getattr(self, key) and self.record is not None:
                raise ValueError(f'"{key}" and "record" do not go together: drop one')
        if self.exit_script is not None and (self.epsilon is not None or self.shadow_rate):
            raise ValueError('"epsilon" and "shadow_rate" go with "artifact", not "exit_script"')
        return self

    def fixed_exit_points(self, depth: int) -> tuple[int, ...]:
        """The exit points that the switch itself decides on; an artifact names its own.

        A server that calibrates itself has the same ones at each start, as its code is compiled
        for them. `depth` is the number of layers.
        """
        if self.calibrates_itself:
            spread = (depth * (0.4 + 0.45 * n / (AUTO_POINTS - 1)) for n in range(AUTO_POINTS))
            return tuple(sorted({0, *(min(max(1, round(one)), depth - 1) for one in spread)}))
        return self.exit_script or self.exit_points or ()


def is_killed() -> bool:
    """Whether the environment turns the plugin off."""
    return os.environ.get(KILL_SWITCH) == "0"


def read_settings(additional_config: Any) -> Settings | None:
    """The plugin's settings, if they are valid; None where stock vLLM is to run."""
    if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
        return None
    if is_killed():
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
        owners: dict[str, type[Strict]] = {"capture": Capture, "audit": Audit, "auto": Auto}
        owner = owners.get(str(problem["loc"][0]), Switch)
        known = ", ".join(sorted(owner.model_fields))
        return f"additional_config: {where} is not a known key; known keys: {known}"
    return f"additional_config: {where}: {problem['msg'].removeprefix('Value error, ')}"
