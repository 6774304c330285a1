"""The config of an artifact: what its policy is for, and what it promises. Data, never code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from vllm_adainfer.artifact.fields import (
    MOST_ANSWERS,
    MOST_CHOICE_CHARACTERS,
    MOST_CHOICES,
    Adapter,
    Choice,
    Label,
    LastToken,
    Level,
    Question,
    Strict,
    Student,
    TokenId,
    token_columns,
)
from vllm_adainfer.artifact.kinds import (
    LABEL_HEADS,
    BoundKind,
    Candidates,
    ClassifierKind,
    ProbeInput,
    ProbeKind,
    Risk,
    features_of_risk,
)
from vllm_adainfer.artifact.label_subsets import MOST_LABELS
from vllm_adainfer.errors import AdaInferError

LAST_TOKEN = "last-token"  # the part of a pooled policy for prompts it cannot see as a whole


def are_exit_points(points: Sequence[int], layers: int) -> bool:
    """Whether `points` is not empty, ascends, and lies inside a model with this many layers.

    Exit point 0 comes before the first layer.
    """
    inside = all(0 <= point < layers for point in points)
    return bool(points) and inside and sorted(set(points)) == list(points)


class ArtifactConfig(Strict):
    """The model and requests that a policy is for, and the bounds it was certified for.

    Probes: "lens" is the tuned lens (Belrose et al. 2023, arXiv 2303.08112), an affine map fitted
    at each exit point in front of the model's own final norm and LM head; "logit-lens" applies
    those two without a map; "label-head" is a linear head on the hidden state with one row for each
    label; "pooled-label-head" reads the mean of the states of all tokens of the prompt beside it,
    or at `branches` each of these states.
    """

    schema_version: Literal[1] = 1
    base_model: str
    architecture: str
    layers: int = Field(gt=1)
    hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=1)
    head_size: int | None = Field(
        None, gt=0, description="Input size of the LM head, if it is not the hidden size."
    )
    weights_fingerprint: str
    adapter: Adapter | None = Field(
        None, description="The LoRA adapter of the policy's requests; None for the base model."
    )
    exit_points: tuple[int, ...] = Field(
        min_length=1,
        description="The numbers of layers after which a request may exit; 0 comes before the "
        "first layer.",
    )
    probe: ProbeKind
    pooled_from: int | None = Field(
        None,
        ge=1,
        description="The position from which on a pooled-label-head takes the mean: earlier tokens "
        "are the same in all prompts, or attract attention without meaning (the first).",
    )
    last_token: LastToken | None = Field(
        None,
        description="With a pooled-label-head, the heads for requests of which some tokens came "
        "from the prefix cache; without them, such a request runs all layers.",
    )
    student: Student | None = Field(
        None, description="The encoder that decides at exit point 0, in place of a head."
    )
    branches: tuple[int, ...] = Field(
        default=(),
        description="With a pooled-label-head, the exit points where a branch, a small transformer "
        "layer over the states of all tokens of the prompt, decides in place of a head.",
    )
    candidates: Candidates = Field(description="The tokens that the probe scores.")
    labels: tuple[Label, ...] = Field(default=(), max_length=MOST_ANSWERS)
    features: tuple[str, ...]
    classifier: ClassifierKind
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    risk: Risk = Field(
        "disagreement",
        description="What epsilon bounds: the share of answers that change, the accuracy lost, or "
        "the share of answers that change or whose label probabilities move by more than the "
        "tolerance.",
    )
    tolerance: float | None = Field(
        None, gt=0, lt=1, description="How far a label's probability may move."
    )
    label_mass: bool = Field(
        False,
        description="Whether the tolerance also covers probabilities over the whole vocabulary.",
    )
    label_pool: bool = Field(
        False, description="Whether each request names its own labels, two or more of these."
    )
    choices: tuple[Choice, ...] = Field(
        default=(),
        max_length=MOST_CHOICES,
        description="The texts that requests choose from. Labels then stand for the choices that "
        "a first token can decide on; one more stands for the undecided first tokens, if any.",
    )
    undecided: tuple[TokenId, ...] = Field(
        default=(), description="First tokens that leave several choices open."
    )
    questions: tuple[Question, ...] = Field(
        default=(), description="The questions that prompts can be recognised by."
    )
    by_question: bool = Field(
        False,
        description="Whether the bounds hold for each question alone. Requests with an unknown "
        "question then run all layers.",
    )
    bound: BoundKind = "exact"
    max_tokens: int = Field(
        1, ge=1, description="Tokens generated per prompt in calibration; 1: one-token answers."
    )
    levels: tuple[Level, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ArtifactConfig:
        broken = [rule for rule, holds in self._rules().items() if not holds]
        if broken:
            raise ValueError(broken[0])
        self.parts("")  # which validates them
        return self

    def _rules(self) -> dict[str, bool]:
        """What the fields must satisfy together, in words, and whether they do."""
        labels, pool, choices = self.labels, self.label_pool, bool(self.choices)
        probabilities, features = self.risk == "probability", features_of_risk(self.risk)
        head, pooled = self.has_label_heads, self.is_pooled
        special = probabilities or pool or choices
        columns = token_columns(self.choices, self.undecided)
        tokens = [t for column in columns for t in column] if choices else self.label_ids
        epsilons = {level.epsilon for level in self.levels}
        certified = [question.certified for question in self.questions]
        return {
            f"exit_points must ascend between 0 and {self.layers - 1}": are_exit_points(
                self.exit_points, self.layers
            ),
            "exit point 0 needs a student or a pooled-label-head: the last token alone says too "
            "little there": 0 not in self.exit_points or pooled or self.student is not None,
            "a student decides at exit point 0, so there must be one": (
                self.student is None or 0 in self.exit_points
            ),
            "a crf needs every exit point to be asked, and a student is not about every prompt": (
                self.student is None or self.classifier != "crf"
            ),
            "a student needs the label-heads' scores and max_tokens = 1": (
                self.student is None or (head and self.max_tokens == 1)
            ),
            'candidates = "labels" needs labels': bool(labels) or self.candidates != "labels",
            'labels need candidates = "labels"': not labels or self.candidates == "labels",
            "there is nothing to decide among fewer than two labels": len(labels) != 1,
            "pooled_from goes with a pooled-label-head, and that needs it": pooled
            == (self.pooled_from is not None),
            "a pooled-label-head needs max_tokens = 1: it reads prompts": (
                self.max_tokens == 1 or not pooled
            ),
            "branches must ascend and be among the exit points after the first layer": (
                sorted(set(self.branches)) == list(self.branches)
                and set(self.branches) <= set(self.exit_points) - {0}
            ),
            "branches go with a pooled-label-head": pooled or not self.branches,
            "last_token goes with a pooled-label-head": pooled or self.last_token is None,
            "a label-head needs labels": bool(labels) or not head,
            "token ids must be below vocab_size": max(tokens, default=0) < self.vocab_size,
            "each label needs a token id of its own": len(set(tokens)) == len(tokens),
            f"features must be {features} with this risk": self.features == features,
            'risk = "probability" needs a tolerance': bool(self.tolerance) or not probabilities,
            'tolerance needs risk = "probability"': self.tolerance is None or probabilities,
            'label_mass needs risk = "probability"': not self.label_mass or probabilities,
            'risk = "probability", label_pool and choices need a label-head': head or not special,
            'risk = "probability", label_pool and choices need max_tokens = 1': (
                self.max_tokens == 1 or not special
            ),
            f"a label pool has at most {MOST_LABELS} labels": len(labels) <= MOST_LABELS
            or not pool,
            "choices rule out label_pool": not choices or not pool,
            'choices rule out risk = "probability"': not choices or not probabilities,
            f"choices have at most {MOST_CHOICE_CHARACTERS} characters in all": (
                sum(len(choice.text) for choice in self.choices) <= MOST_CHOICE_CHARACTERS
            ),
            "labels must be the first of the choices' first tokens, in their order": (
                self.label_ids == tuple(column[0] for column in columns) or not choices
            ),
            "undecided needs choices": choices or not self.undecided,
            "by_question needs questions": bool(certified) or not self.by_question,
            "questions must have epsilons if and only if by_question is set": all(
                bool(own) == self.by_question for own in certified
            ),
            "epsilons of questions must be among those of the levels": all(
                epsilons.issuperset(own) for own in certified
            ),
        }

    @property
    def has_label_heads(self) -> bool:
        """Whether the probes score the labels alone, without the model's head."""
        return self.probe in LABEL_HEADS

    @property
    def is_pooled(self) -> bool:
        """Whether the probes read the whole prompt."""
        return self.probe == "pooled-label-head"

    @property
    def probe_inputs(self) -> tuple[ProbeInput, ...]:
        """What the probe of each exit point reads."""
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
    def label_ids(self) -> tuple[int, ...]:
        """Token ids of the labels, in the order of the probe's scores."""
        return tuple(label.token_id for label in self.labels)

    @property
    def num_threshold_rows(self) -> int:
        """Rows of the tensor of thresholds: one per level, or per question and level."""
        return len(self.levels) * (len(self.questions) if self.by_question else 1)

    def threshold_row(self, level: int, question: int | None) -> int | None:
        """The row of the thresholds for a level and a question; None if it is not certified.

        Args:
            level: index among the levels.
            question: index among the questions; None if the question is unknown.

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

        Returns:
            -1, never exit, if `epsilon` is 0.

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

        For a multimodal model, depth, width and vocabulary are those of its language model.

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

    def check_rows_go_on(self, own_kv_layers: int) -> None:
        """Check that a pooled policy finds all rows of a prompt at its exit points.

        Only the last row of a prompt goes on below the `own_kv_layers`, the first ones, which write
        keys and values.

        Raises:
            AdaInferError: it does not.

        """
        if self.is_pooled and self.exit_points[-1] > own_kv_layers:
            raise AdaInferError(
                f"a pooled-label-head reads all tokens of a prompt, and only the last one goes on "
                f"after layer {own_kv_layers} of this model, where layers begin to share keys and "
                f"values: exit points {list(self.exit_points)} must not lie after it: calibrate "
                "again"
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
