"""The config of an artifact: what its policy is for, and what it promises. Data, never code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import model_serializer, model_validator

from vllm_adainfer.artifact.config_fields import ConfigFields
from vllm_adainfer.artifact.config_rules import broken_rules
from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.artifact.version_1 import tagged
from vllm_adainfer.errors import AdaInferError

LAST_TOKEN = "last-token"  # the part of a pooled policy for prompts it cannot see as a whole


def policy_of(part: str) -> str:
    """The name of the policy that a part of this name, see `ArtifactConfig.parts`, is of."""
    return part.removesuffix(f":{LAST_TOKEN}")


REPEATED = ("candidates", "labels")  # of the output
UNKNOWN_GROUP = 16  # answers of a group that are watched where no one knows how large groups were


class ArtifactConfig(ConfigFields):
    """The model and requests that a policy is for, and the bounds it was certified for."""

    @model_validator(mode="after")
    def _consistent(self) -> ArtifactConfig:
        if broken := broken_rules(self):
            raise ValueError(broken[0])
        names = [label.name for label in self.labels]
        self.__dict__["promise"] = self.promise.about(names, self.output.link, self.vocab_size)
        self.parts("")  # which validates them
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _of_any_version(cls, values: Any, read: Callable[[Any], ArtifactConfig]) -> ArtifactConfig:
        if not isinstance(values, dict):
            return read(values)
        if values.get("schema_version") == 1:
            return read(tagged(values))
        said = {name: values[name] for name in REPEATED if name in values}
        config = read({name: one for name, one in values.items() if name not in said})
        if any(one != config._repeated[name] for name, one in said.items()):
            raise ValueError("labels and candidates must be those of output")
        return config

    @model_serializer(mode="wrap")
    def _with_repeated(self, written: Callable[[ArtifactConfig], dict[str, Any]]) -> dict[str, Any]:
        return written(self) | self._repeated

    @property
    def _repeated(self) -> dict[str, Any]:
        """What programs read from the file by its names of version 1."""
        labels = [label.model_dump() for label in self.labels]
        return dict(zip(REPEATED, (self.candidates, labels), strict=True))

    @property
    def probe_inputs(self) -> tuple[ProbeInput, ...]:
        """The input of the probe at each exit point."""
        states = ProbeInput.PROMPT if self.is_pooled else ProbeInput.LAST_TOKEN
        special = dict.fromkeys(self.branches, ProbeInput.OWN_STATES)
        if self.student is not None:
            special[0] = ProbeInput.TEXT
        return tuple(special.get(layer, states) for layer in self.exit_points)

    @property
    def all_exit_points(self) -> tuple[int, ...]:
        """The exit points of all parts, ascending."""
        return tuple(
            sorted({point for part in self.parts("").values() for point in part.exit_points})
        )

    def parts(self, name: str) -> dict[str, ArtifactConfig]:
        """The policies that this config describes, each on its own, by name.

        One of this `name`; of a pooled policy also that of its heads for the last token.
        """
        own = self.last_token
        if own is None:
            return {name: self}
        alone: dict[str, Any] = {
            "probe": "label-head",
            "pooled_from": None,
            "last_token": None,
            "branches": (),
            "student": self.student if 0 in own.exit_points else None,
            "exit_points": own.exit_points,
            "levels": own.levels,
        }
        if self.by_question:
            alone["questions"] = [
                question.model_copy(update={"certified": own.certified[question.name]})
                for question in self.questions
                if question.name in own.certified
            ]
        last = ArtifactConfig.model_validate({**dict(self), **alone})
        return {name: self, f"{name}:{LAST_TOKEN}": last}

    @property
    def most_together(self) -> int:
        """How many requests that come together are watched as one group; 1: each by itself.

        The bound of one-token answers is "exact" only if all prompts came alone.
        """
        if self.largest_group is not None:
            return self.largest_group
        return 1 if self.bound == "exact" or self.max_tokens > 1 else UNKNOWN_GROUP

    @property
    def num_threshold_rows(self) -> int:
        """Rows of the tensor of thresholds: one per level, or per question and level."""
        return len(self.levels) * (len(self.questions) if self.by_question else 1)

    def threshold_row(self, level: int, question: int | None) -> int | None:
        """The row of the thresholds for a level and a question; None if it is not certified.

        Both are indices; None is an unknown question.
        """
        if not self.by_question:
            return level
        if question is None:
            return None
        if self.levels[level].epsilon not in self.questions[question].certified:
            return None
        return question * len(self.levels) + level

    def level_of(self, epsilon: float | None) -> int:
        """The index of the loosest level within `epsilon`; None is the artifact's own epsilon.

        It is -1, never exit, if `epsilon` is 0.
        An AdaInferError if no level is certified for an epsilon this small.
        """
        wanted = self.epsilon if epsilon is None else epsilon
        if wanted == 0:
            return -1
        fitting = [i for i, level in enumerate(self.levels) if level.epsilon <= wanted + 1e-12]
        if not fitting:
            strictest = min(level.epsilon for level in self.levels)
            raise AdaInferError(
                f"epsilon {wanted:g} is stricter than the artifact's strictest certified bound "
                f"{strictest:g}: ask for at least that, or calibrate with more rows"
            )
        return max(fitting, key=lambda i: self.levels[i].epsilon)

    def check_served_by(self, hf_config: Any) -> None:
        """Compare with the Hugging Face config of the model about to be served.

        For a multimodal model, depth, width and vocabulary are those of its language model.

        An AdaInferError if its architecture, depth, width or vocabulary differs.
        """
        text_config = hf_config.get_text_config()
        served = {
            "architecture": (hf_config.architectures or ["none"])[0],
            "layers": text_config.num_hidden_layers,
            "hidden_size": text_config.hidden_size,
            "vocab_size": text_config.vocab_size,
        }
        for name, value in served.items():
            if value != getattr(self, name):
                raise AdaInferError(
                    f"the artifact was calibrated for {self.base_model} with {name} = "
                    f"{getattr(self, name)}, but the served model has {name} = {value}: "
                    "calibrate for this model"
                )

    def check_rows_go_on(self, own_kv_layers: int) -> None:
        """Check that a pooled policy finds all rows of a prompt at its exit points.

        Only the last row of a prompt goes on below the `own_kv_layers`, the first ones, which write
        keys and values.

        An AdaInferError if it does not.
        """
        if self.is_pooled and self.exit_points[-1] > own_kv_layers:
            raise AdaInferError(
                f"a pooled-label-head reads all tokens of a prompt, and only the last one goes on "
                f"after layer {own_kv_layers} of this model, where layers begin to share keys and "
                f"values: exit points {list(self.exit_points)} must not lie after it: calibrate "
                "again"
            )

    def check_options(self, served: EngineOptions) -> None:
        """Compare with the options of the engine about to serve.

        An AdaInferError if it computes something else of the weights; the message names the option.
        """
        if reason := self.engine_options.why_not_served_by(served):
            raise AdaInferError(f"the artifact for {self.base_model} was calibrated {reason}")

    def check_weights(self, fingerprint: str | None) -> None:
        """Compare with the fingerprint of the loaded weights.

        An AdaInferError if the weights or their dtype are not those of the calibration.
        """
        if fingerprint != self.weights_fingerprint:
            asked = self.engine_options.dtype
            raise AdaInferError(
                f"the artifact was calibrated for other weights of this architecture "
                f"({self.base_model}): its weights fingerprint is {self.weights_fingerprint}, "
                f"the served model's is {fingerprint}: calibrate for this checkpoint and dtype"
                + ("" if asked is None else f", or serve with --dtype {asked}")
            )
