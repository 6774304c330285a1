"""An artifact: what a policy is for, and what it promises. It is data only, never code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from vllm_adainfer.artifact.kinds import (
    BoundKind,
    Candidates,
    ClassifierKind,
    ProbeKind,
    Risk,
    features_of_risk,
)
from vllm_adainfer.artifact.label_subsets import MOST_LABELS
from vllm_adainfer.errors import AdaInferError

# What a policy can be for, and so the most of what a request names that is looked at.
MOST_ANSWERS = 1024  # tokens that are labels
MOST_CHOICES = 256
MOST_CHOICE_CHARACTERS = 16_384  # of all choices


def are_exit_points(points: Sequence[int], layers: int) -> bool:
    """Whether `points` is not empty, ascends, and lies inside a model of so many layers."""
    inside = all(0 < point < layers for point in points)
    return bool(points) and inside and sorted(set(points)) == list(points)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Label(_Strict):
    """A label and the token that stands for it: its first one after the prompt."""

    name: str
    token_id: int = Field(ge=0)


class Choice(_Strict):
    """A text that requests with ``structured_outputs.choice`` choose from."""

    text: str = Field(min_length=1)
    token_ids: tuple[int, ...] = Field(
        min_length=1, description="Of the text, as the tokenizer writes it."
    )
    first_tokens: tuple[int, ...] = Field(
        description="The tokens that leave this choice alone if they come first, the one that "
        "answers it before the others; none if no first token decides it."
    )


def token_columns(choices: Sequence[Choice], undecided: tuple[int, ...]) -> list[tuple[int, ...]]:
    """By label, the first tokens that it stands for; those undecided come last, if there are any.

    A choice that no first token decides has no label.
    """
    return [tokens for tokens in (*(one.first_tokens for one in choices), undecided) if tokens]


class Level(_Strict):
    """One certified row of the epsilon table: a bound, what it costs and what it saves."""

    epsilon: float = Field(gt=0, lt=1)
    disagreement: float = Field(description="On the held-out rows.")
    risk: float = Field(
        description="Mean loss on them: the disagreement, the accuracy lost, or the share of "
        "answers whose probabilities move too far."
    )
    bound: float = Field(description="Upper confidence bound of the risk, <= epsilon.")
    layers_saved: float = Field(description="Share of layers, on the same rows.")


class Question(_Strict):
    """A question that calibration has seen."""

    name: str
    ends: tuple[tuple[int, ...], ...] = Field(
        min_length=1, description="Token ids that its prompts end with, one row for each wording."
    )
    certified: tuple[float, ...] = Field(
        default=(),
        description="The epsilons certified for it alone; none where the mixture is certified.",
    )


class Adapter(_Strict):
    """A LoRA adapter that a policy belongs to.

    Attributes:
        name: by which requests name it.
        fingerprint: see `vllm_adainfer.artifact.adapter_fingerprint`.

    """

    name: str = Field(min_length=1)
    fingerprint: str


class ArtifactConfig(_Strict):
    """``config.json``: the model a policy belongs to, and the bounds it was certified for."""

    schema_version: Literal[1] = 1
    base_model: str
    architecture: str
    layers: int = Field(gt=1)
    hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=1)
    head_size: int | None = Field(
        None, gt=0, description="Size of the LM head's input, if it is not the hidden size."
    )
    weights_fingerprint: str
    adapter: Adapter | None = Field(
        None, description="The LoRA adapter of the requests that it decides; none: the base model."
    )
    exit_points: tuple[int, ...] = Field(min_length=1)
    probe: ProbeKind
    candidates: Candidates
    labels: tuple[Label, ...] = ()
    features: tuple[str, ...]
    classifier: ClassifierKind
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    risk: Risk = Field(
        "disagreement",
        description="What epsilon bounds: the share of changed answers, the accuracy lost, or the "
        "share of answers that change or of which a probability moves by more than the tolerance.",
    )
    tolerance: float | None = Field(
        None, gt=0, lt=1, description="How far a label's probability may move."
    )
    label_mass: bool = Field(
        False,
        description="Whether the tolerance is also for probabilities over the whole vocabulary.",
    )
    label_pool: bool = Field(
        False,
        description="Whether a request may be about any two or more of the labels: its own.",
    )
    choices: tuple[Choice, ...] = Field(
        default=(),
        description="The texts that its requests choose from. The labels are then those that a "
        "first token can decide, and one more for first tokens that decide none, if there are any.",
    )
    undecided: tuple[int, ...] = Field(
        default=(), description="First tokens that decide no choice."
    )
    questions: tuple[Question, ...] = Field(
        default=(), description="Those of the requests it was calibrated on that can be recognised."
    )
    by_question: bool = Field(
        False,
        description="Whether each question keeps the bounds on its own; others run all layers.",
    )
    bound: BoundKind = "exact"
    max_tokens: int = Field(
        1, ge=1, description="Tokens generated per prompt; 1: the bound is for one-token requests."
    )
    levels: tuple[Level, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ArtifactConfig:
        points = self.exit_points
        if not are_exit_points(points, self.layers):
            raise ValueError(f"exit_points {points} must ascend between 1 and {self.layers - 1}")
        if (self.candidates == "labels") != bool(self.labels):
            raise ValueError('there must be labels if and only if candidates = "labels"')
        if len(self.labels) > MOST_ANSWERS:
            raise ValueError(f"there are at most {MOST_ANSWERS} labels")
        if len(self.labels) == 1:
            raise ValueError("there is nothing to decide among fewer than two labels")
        if self.probe == "label-head" and self.candidates != "labels":
            raise ValueError('a label-head needs candidates = "labels"')
        if (self.risk == "probability") != (self.tolerance is not None):
            raise ValueError('there must be a tolerance if and only if risk = "probability"')
        if self.risk == "probability" and (self.probe != "label-head" or self.max_tokens > 1):
            raise ValueError('risk = "probability" needs a label-head and max_tokens = 1')
        if self.features != features_of_risk(self.risk):
            raise ValueError(
                f"features must be {features_of_risk(self.risk)} where risk = {self.risk!r}"
            )
        if self.label_mass and self.risk != "probability":
            raise ValueError('label_mass needs risk = "probability"')
        if self.label_pool and (self.probe != "label-head" or self.max_tokens > 1):
            raise ValueError("label_pool needs a label-head and max_tokens = 1")
        if self.label_pool and len(self.labels) > MOST_LABELS:
            raise ValueError(f"a label pool has at most {MOST_LABELS} labels")
        self._check_choices()
        epsilons = {level.epsilon for level in self.levels}
        for question in self.questions:
            if self.by_question != bool(question.certified):
                raise ValueError("questions must have epsilons if and only if by_question is set")
            if not epsilons.issuperset(question.certified):
                raise ValueError(f"levels lack an epsilon of the question {question.name!r:.80}")
            if not all(question.ends):
                raise ValueError(f"an end of the question {question.name!r:.80} has no tokens")
        if self.by_question and not self.questions:
            raise ValueError("by_question needs questions")
        if not all(token_id < self.vocab_size for token_id in self.label_ids):
            raise ValueError(f"token ids of labels must be below vocab_size, {self.vocab_size}")
        if len(set(self.label_ids)) != len(self.labels):
            raise ValueError("each label needs a token id of its own")
        return self

    def _check_choices(self) -> None:
        if not self.choices:
            if self.undecided:
                raise ValueError("undecided needs choices")
            return
        if self.probe != "label-head" or self.max_tokens > 1 or self.label_pool:
            raise ValueError("choices need a label-head, max_tokens = 1 and no label_pool")
        if self.risk == "probability":
            raise ValueError('choices do not go with risk = "probability"')
        characters = sum(len(choice.text) for choice in self.choices)
        if len(self.choices) > MOST_CHOICES or characters > MOST_CHOICE_CHARACTERS:
            raise ValueError(
                f"there are at most {MOST_CHOICES} choices, of {MOST_CHOICE_CHARACTERS} characters "
                "in all"
            )
        columns = token_columns(self.choices, self.undecided)
        if self.label_ids != tuple(column[0] for column in columns):
            raise ValueError(
                "labels must be the first of the choices' first tokens, in their order"
            )
        tokens = [token for column in columns for token in column]
        if len(set(tokens)) != len(tokens) or not all(t < self.vocab_size for t in tokens):
            raise ValueError("first tokens must differ, and be below vocab_size")

    @property
    def label_ids(self) -> tuple[int, ...]:
        """Token ids of the labels, in the order of the probe's scores."""
        return tuple(label.token_id for label in self.labels)

    @property
    def num_tags(self) -> int:
        """How many rows of thresholds there are: the levels, of each question or of all."""
        return len(self.levels) * (len(self.questions) if self.by_question else 1)

    def tag_of(self, level: int, question: int | None) -> int | None:
        """The row of thresholds of a level for a question; None if it is not certified for it.

        Args:
            level: index among the levels.
            question: index among the questions; None if it is not known.

        """
        if not self.by_question:
            return level
        if question is None:
            return None
        if self.levels[level].epsilon not in self.questions[question].certified:
            return None
        return question * len(self.levels) + level

    def level_of(self, epsilon: float | None) -> int:
        """The row of the epsilon table that promises `epsilon` (None: the artifact's own).

        Returns:
            the index of the loosest level within `epsilon`; -1, never exit, if `epsilon` is 0.

        Raises:
            AdaInferError: no level is certified for an epsilon this small.

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

        Of a multimodal model depth, width and vocabulary are those of its language model.

        Raises:
            AdaInferError: its architecture, depth, width or vocabulary differs.

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

    def check_weights(self, fingerprint: str) -> None:
        """Compare with the fingerprint of the loaded weights.

        Raises:
            AdaInferError: the weights or their dtype are not those of the calibration.

        """
        if fingerprint != self.weights_fingerprint:
            raise AdaInferError(
                f"the artifact was calibrated for other weights of this architecture "
                f"({self.base_model}): its weights fingerprint is {self.weights_fingerprint}, "
                f"the served model's is {fingerprint}: calibrate for this checkpoint and dtype"
            )


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact.

    Attributes:
        config: of ``config.json``.
        tensors: of ``policy.safetensors``.
        digest: of both files, see `vllm_adainfer.artifact.digest.files_digest`; empty for one that
            does not come from files.

    """

    config: ArtifactConfig
    tensors: dict[str, Tensor]
    digest: str = ""
