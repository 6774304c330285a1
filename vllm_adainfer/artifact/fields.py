"""The parts of an artifact's config: labels, choices, questions, certified levels, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

from pydantic import Field

from vllm_adainfer.artifact.kinds import LabelBoundKind
from vllm_adainfer.strict import Strict

# Limits of a policy. A request that names more than this cannot match one, so it is not examined.
MOST_ANSWERS = 1024  # label tokens
MOST_CHOICES = 256
MOST_CHOICE_CHARACTERS = 16_384  # of all choices together
MOST_FIELDS = 64  # of an object
MOST_OBJECTS = 1 << 62  # their numbers are int64
MOST_PROMISES = 64  # about one label each
MOST_STUDENT_TOKENS = 512  # what a student reads of a prompt, in tokens of its own

T = TypeVar("T")
TokenId = Annotated[int, Field(ge=0)]


class Label(Strict):
    """A label and the token that stands for it: the first one after the prompt."""

    name: str
    token_id: TokenId


class Choice(Strict):
    """A text that requests with ``structured_outputs.choice`` choose from."""

    text: str = Field(min_length=1)
    token_ids: tuple[TokenId, ...] = Field(
        min_length=1, description="The text as the tokenizer encodes it."
    )
    first_tokens: tuple[TokenId, ...] = Field(
        description="The first tokens that rule out every other choice. The label's token comes "
        "first. Empty if no first token decides on this choice."
    )


class LabelBound(Strict):
    """A promise about one label, beside epsilon's about all answers.

    Attributes:
        kind: "recall" is about the requests that full depth answers with the label, "precision"
            about those that are answered with it.
        label: the name of the label.
        epsilon: the largest share of these requests whose answer is not full depth's.

    """

    kind: LabelBoundKind
    label: str = Field(min_length=1)
    epsilon: float = Field(gt=0, lt=1)

    def chosen_by(self, answers: T, full: T) -> T:
        """Whichever of `answers` and those at `full` depth must be the label for it to apply."""
        return full if self.kind == "recall" else answers


class LabelRisk(Strict):
    """The result of the held-out rows for a `LabelBound` at one level.

    Attributes:
        rows: the number of held-out rows that the promise is about.
        risk: the share of those with another answer than full depth's.
        bound: upper confidence bound on that share, at most `LabelBound.epsilon`.

    """

    rows: int = Field(ge=0)
    risk: float
    bound: float


class Level(Strict):
    """One certified row of the epsilon table: a bound, its risk and its savings."""

    epsilon: float = Field(gt=0, lt=1)
    disagreement: float = Field(description="On the held-out rows.")
    risk: float = Field(description="Mean loss on the held-out rows; see `ArtifactConfig.risk`.")
    bound: float = Field(description="Upper confidence bound on the risk, <= epsilon.")
    layers_saved: float = Field(description="Share of layers skipped on the held-out rows.")
    label_risks: tuple[LabelRisk, ...] = Field(
        default=(), description="One for each of `ArtifactConfig.label_bounds`, in their order."
    )


class Question(Strict):
    """A question in the calibration data."""

    name: str
    ends: tuple[Annotated[tuple[TokenId, ...], Field(min_length=1)], ...] = Field(
        min_length=1, description="Token ids that its prompts end with, one row per wording."
    )
    certified: tuple[float, ...] = Field(
        default=(), description="Epsilons certified for this question alone, with `by_question`."
    )


class SharedTokens(Strict):
    """The tokens that all prompts of the calibration begin and end with: template and question.

    A policy serves prompts that have them. Others may ask something else about the same text.

    Attributes:
        start: the token ids that they begin with.
        end: those that they end with.

    """

    start: tuple[TokenId, ...] = ()
    end: tuple[TokenId, ...] = ()

    def are_in(self, prompt: Sequence[int]) -> bool:
        """Whether `prompt`, token ids, begins and ends with them; the two may not overlap."""
        first, last = len(self.start), len(prompt) - len(self.end)
        return (
            first <= last
            and tuple(prompt[:first]) == self.start
            and tuple(prompt[last:]) == self.end
        )

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.start or self.end)


class Adapter(Strict):
    """The LoRA adapter that a policy was calibrated with.

    Attributes:
        name: the name that requests use for the adapter.
        fingerprint: see `vllm_adainfer.artifact.fingerprints.adapter_fingerprint`.

    """

    name: str = Field(min_length=1)
    fingerprint: str


class Student(Strict):
    """The encoder that a policy asks before the first layer, and what it reads of a prompt.

    Attributes:
        name: directory name or hub id of the encoder that it was trained from.
        revision: the commit on the hub; None for a directory.
        license: the license that the encoder's model card names; None if it names none.
        hidden_size: the width of the encoder's states.
        shared_start: tokens at the start of a prompt that it does not read, the number of
            `SharedTokens.start`.
        shared_end: the same at the end of a prompt.
        most_tokens: the most tokens of its own tokenizer that it reads; longer texts are cut.
        tokenizer: SHA-256, in hex digits, of the file of its tokenizer.
        decoding: SHA-256, in hex digits, of how the model's tokenizer decodes, see
            `vllm_adainfer.policy.own_text.decoding_digest`; None if it was not kept.

    """

    name: str = Field(min_length=1)
    revision: str | None = None
    license: str | None = None
    hidden_size: int = Field(gt=0)
    shared_start: int = Field(ge=0)
    shared_end: int = Field(ge=0)
    most_tokens: int = Field(gt=0, le=MOST_STUDENT_TOKENS)
    tokenizer: str
    decoding: str | None = None

    @property
    def reads(self) -> tuple[int | str | None, ...]:
        """All that decides what it reads of a prompt."""
        own = self.shared_start, self.shared_end, self.most_tokens
        return *own, self.tokenizer, self.decoding


class LastToken(Strict):
    """The heads of a pooled policy for requests whose prompt it cannot see as a whole.

    They read the state of the last token alone, as a policy with the probe "label-head" does.
    Everything that is not here is as in the config that this is part of.

    Attributes:
        exit_points: see `ArtifactConfig.exit_points`.
        levels: see `ArtifactConfig.levels`; the bounds of these heads.
        certified: question -> see `Question.certified`; for a policy with `by_question`.
        one_bound: whether each epsilon, at delta, holds whichever heads decide a request. Artifacts
            from before have a bound for each part alone.

    """

    exit_points: tuple[int, ...] = Field(min_length=1)
    levels: tuple[Level, ...] = Field(min_length=1)
    certified: Mapping[str, tuple[float, ...]] = Field(default_factory=dict)
    one_bound: bool = False
