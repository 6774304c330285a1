"""vLLM's options that change what a checkpoint computes, and that its weights do not show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from vllm_adainfer.strict import Strict

# By field, the option of vLLM. `calibrate` has the first three.
OPTIONS = {
    "dtype": "--dtype",
    "quantization": "--quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
    "quantization_config": "--quantization-config",
    "kv_cache_dtype_skip_layers": "--kv-cache-dtype-skip-layers",
}
CALIBRATED_WITH = ("dtype", "quantization", "kv_cache_dtype")
# Keys of a config that make a classifier of a model. Artifacts that do not keep the config were
# calibrated with those that they need, without saying so.
OF_CLASSIFIERS = {"classifier_from_token", "is_original_qwen3_reranker", "method", "problem_type"}


class EngineOptions(Strict):
    """How an engine runs a checkpoint; by default as vLLM does without options.

    Attributes:
        dtype: None for the checkpoint's own, if that has 16 bits: vLLM takes it without the option.
            It is not compared: the fingerprint of the weights is of their dtype, too.
        quantization: the method that quantises plain weights while they are loaded; None if none
            does, also where the checkpoint itself is quantised.
        quantization_config: what was changed in that method.
        kv_cache_dtype: None for the model's own.
        kv_cache_dtype_skip_layers: layers that keep the model's own, separated by commas.
        hf_overrides: what was changed in the model's config, as far as it changes the computation.
        hf_config: the values of the resulting config that are not the defaults of its class; None
            in an artifact that was made before they were kept, or by hand.

    """

    dtype: str | None = None
    quantization: str | None = None
    quantization_config: str | None = None
    kv_cache_dtype: str | None = None
    kv_cache_dtype_skip_layers: str | None = None
    hf_overrides: Mapping[str, Any] = Field(default_factory=dict)
    hf_config: Mapping[str, Any] | None = None

    def why_not_served_by(self, served: EngineOptions) -> str | None:
        """Why a policy with these options is not for an engine that is `served` with others.

        Returns:
            what differs and what to do, to follow "the artifact was calibrated"; None if nothing
            differs.

        """
        for field, option in OPTIONS.items():
            own, other = getattr(self, field), getattr(served, field)
            if own == other or field == "dtype":
                continue
            with_it = "calibrate with it, or " if field in CALIBRATED_WITH else ""
            if own is None:
                return f"without {option}; the server has {option} {other}: {with_it}serve without"
            if other is None:
                return (
                    f"with {option} {own}; the server has none: serve with it, or calibrate again"
                )
            return f"with {option} {own}; the server has {option} {other}: serve with {own}"
        if self.hf_config is None or served.hf_config is None:
            return self._why_not_overridden_by(served.hf_overrides)
        keys = sorted(
            key
            for key in {*self.hf_config, *served.hf_config}
            if self.hf_config.get(key) != served.hf_config.get(key)
        )
        if not keys:
            return None
        own, other = (
            ", ".join(f"{key} = {json.dumps(values.get(key)):.120}" for key in keys)
            for values in (self.hf_config, served.hf_config)
        )
        return (
            f"with {own} in the model's config; the server's has {other}: calibrate with the "
            "--hf-overrides and the config.json that you serve with, or serve with those of the "
            "calibration"
        )

    def _why_not_overridden_by(self, overrides: Mapping[str, Any]) -> str | None:
        changed = {
            key: value
            for key, value in overrides.items()
            if key not in OF_CLASSIFIERS and self.hf_overrides.get(key) != value
        }
        if not changed:
            return None
        return (
            f"without --hf-overrides; the server has --hf-overrides '{json.dumps(changed)}': "
            "calibrate with it, or serve without"
        )

    @property
    def arguments(self) -> dict[str, str]:
        """The options that are not vLLM's defaults, by name, with their values."""
        given = {option: getattr(self, field) for field, option in OPTIONS.items()}
        if self.hf_overrides:
            given["--hf-overrides"] = json.dumps(self.hf_overrides)
        return {option: value for option, value in given.items() if value is not None}

    @property
    def flags(self) -> list[str]:
        """The same as parts of a command line."""
        return [part for option in self.arguments.items() for part in option]

    @property
    def in_words(self) -> str:
        """The same for a reader; empty if all are the defaults."""
        return " ".join(self.flags)
