"""The fields of an artifact's config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.artifact.fields import (
    MOST_ANSWERS,
    MOST_PROMISES,
    Adapter,
    Choice,
    Label,
    LabelBound,
    LastToken,
    Level,
    Question,
    SharedTokens,
    Student,
)
from vllm_adainfer.artifact.kinds import (
    LABEL_HEADS,
    BoundKind,
    Candidates,
    ClassifierKind,
    ProbeKind,
    ScoreHead,
)
from vllm_adainfer.artifact.outputs import AnyOutput, Choices, LabelPool, Objects, Scores, Tokens
from vllm_adainfer.promise.kinds import AnyPromise
from vllm_adainfer.strict import Strict


class ConfigFields(Strict):
    """The model and requests that a policy is for, and the bounds it was certified for.

    Probes: "lens" is the tuned lens (Belrose et al. 2023, arXiv 2303.08112), an affine map fitted
    at each exit point in front of the model's own final norm and LM head; "logit-lens" applies
    those two without a map; "label-head" is a linear head on the hidden state with one row for each
    label; "pooled-label-head" reads the mean of the states of all tokens of the prompt beside it,
    or at `branches` each of these states.
    """

    schema_version: Literal[2] = 2
    base_model: str
    architecture: str
    layers: int = Field(gt=1)
    hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=1)
    head_size: int | None = Field(
        None, gt=0, description="Input size of the LM head, if it is not the hidden size."
    )
    weights_fingerprint: str
    engine_options: EngineOptions = Field(
        default_factory=EngineOptions,
        description="How vLLM ran the weights, as far as they do not show it.",
    )
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
    shared: SharedTokens = Field(
        SharedTokens(),
        description="The tokens that all prompts of the calibration begin and end with. Requests "
        "whose prompts do not have them run all layers.",
    )
    branches: tuple[int, ...] = Field(
        default=(),
        description="With a pooled-label-head, the exit points where a branch, a small transformer "
        "layer over the states of all tokens of the prompt, decides in place of a head.",
    )
    output: AnyOutput = Field(description="What requests ask for that the policy serves.")
    features: tuple[str, ...]
    classifier: ClassifierKind
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    promise: AnyPromise = Field(description="What epsilon bounds.")
    label_bounds: tuple[LabelBound, ...] = Field(
        default=(),
        max_length=MOST_PROMISES,
        description="Promises about one label each, which hold beside epsilon: all of them "
        "together with probability 1 - delta.",
    )
    never_early: tuple[str, ...] = Field(
        default=(),
        max_length=MOST_ANSWERS,
        description="Labels that no early answer ever is: such requests run on.",
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
    largest_group: int | None = Field(
        None,
        ge=1,
        description="The most prompts that came together (as the questions of one request) in the "
        "part that fits. If there are several, the bound counts groups, and so does the monitor. "
        "None in artifacts that were made before this was kept.",
    )
    any_exit_point: bool = Field(
        False,
        description="Whether the bounds hold whichever exit point is asked, so that a decode step "
        "on a GPU may ask at one alone; else an exit point is asked where all before it were.",
    )
    max_tokens: int = Field(
        1, ge=1, description="Tokens generated per prompt in calibration; 1: one-token answers."
    )
    levels: tuple[Level, ...] = Field(min_length=1)

    @property
    def has_label_heads(self) -> bool:
        """Whether the probes score the labels alone, without the model's head."""
        return self.probe in LABEL_HEADS

    @property
    def is_pooled(self) -> bool:
        """Whether the probes read the whole prompt."""
        return self.probe == "pooled-label-head"

    @property
    def labels(self) -> tuple[Label, ...]:
        """The answers, if there is a fixed set of them."""
        return self.output.labels

    @property
    def candidates(self) -> Candidates:
        """The tokens that the probes score."""
        return self.output.candidates if isinstance(self.output, Tokens) else "labels"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The texts that requests choose from; empty where they do not."""
        return self.output.choices if isinstance(self.output, Choices) else ()

    @property
    def undecided(self) -> tuple[int, ...]:
        """The first tokens that leave several choices open."""
        return self.output.undecided if isinstance(self.output, Choices) else ()

    @property
    def objects(self) -> Objects | None:
        """The objects that requests ask for; None where they ask for something else."""
        return self.output if isinstance(self.output, Objects) else None

    @property
    def score_head(self) -> ScoreHead | None:
        """What turns the scores of a classifier into probabilities; None for tokens."""
        return self.output.score_head if isinstance(self.output, Scores) else None

    @property
    def label_pool(self) -> bool:
        """Whether each request names its own labels, two or more of the policy's."""
        return isinstance(self.output, LabelPool)

    @property
    def label_ids(self) -> tuple[int, ...]:
        """Token ids of the labels, in the order of the probe's scores."""
        return tuple(label.token_id for label in self.labels)

    @property
    def never_settled(self) -> tuple[int, ...]:
        """Places of the labels that no early answer is; with choices also of the undecided one."""
        never = [i for i, label in enumerate(self.labels) if label.name in self.never_early]
        if self.undecided:
            never.append(len(self.labels) - 1)
        return tuple(never)
