"""The requests that a policy serves, by what they ask for, as an artifact keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import override

from vllm_adainfer.artifact.fields import (
    MOST_ANSWERS,
    MOST_CHOICES,
    MOST_FIELDS,
    Choice,
    Label,
    TokenId,
)
from vllm_adainfer.artifact.kinds import ScoreHead
from vllm_adainfer.drafts.fields import places_in
from vllm_adainfer.promise.label_subsets import MOST_LABELS
from vllm_adainfer.promise.links import SIGMOIDS, SOFTMAX, ByField, Link
from vllm_adainfer.strict import Strict

UNDECIDED = "undecided"
NO_OBJECT = -1  # the number of an answer that is no object of the schema, such as one cut short


class Asked(Strict):
    """What requests ask for: one answer, or the probabilities of some."""

    @property
    def link(self) -> Link:
        """How scores become probabilities."""
        return SOFTMAX


class Tokens(Asked):
    """Any token."""

    kind: Literal["tokens"] = "tokens"
    candidates: Literal["shortlist", "full"] = Field(description="The tokens that probes score.")

    @property
    def labels(self) -> tuple[Label, ...]:
        """None: there is no fixed set of answers."""
        return ()


class Labels(Asked):
    """One of some labels, or their probabilities."""

    kind: Literal["labels"] = "labels"
    labels: tuple[Label, ...] = Field(min_length=1, max_length=MOST_ANSWERS)


class LabelPool(Asked):
    """The same of two or more of these labels, which each request names."""

    kind: Literal["label-pool"] = "label-pool"
    labels: tuple[Label, ...] = Field(min_length=1, max_length=MOST_LABELS)


class Choices(Asked):
    """One of some texts, as `structured_outputs.choice` asks for.

    Labels stand for the choices that a first token can decide on, each for the first of its tokens;
    one more stands for the undecided first tokens, if any.
    """

    kind: Literal["choices"] = "choices"
    choices: tuple[Choice, ...] = Field(min_length=1, max_length=MOST_CHOICES)
    undecided: tuple[TokenId, ...] = Field(
        default=(), description="First tokens that leave several choices open."
    )

    @cached_property
    def columns(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The name and the first tokens of each label; a choice without these has no label."""
        named = [(choice.text, choice.first_tokens) for choice in self.choices]
        return tuple(one for one in (*named, (UNDECIDED, self.undecided)) if one[1])

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        """The choices that a first token decides, and the undecided tokens."""
        return tuple(Label(name=name, token_id=tokens[0]) for name, tokens in self.columns)


class Scores(Asked):
    """The probabilities that a classifier, which vLLM runs as a pooling model, gives its classes.

    Labels stand for the columns of its scores, in order: a label's `token_id` is its column.
    """

    kind: Literal["scores"] = "scores"
    score_head: ScoreHead = Field(description="What turns the scores into probabilities.")
    classes: tuple[str, ...] = Field(min_length=1, max_length=MOST_ANSWERS)

    @property
    @override
    def link(self) -> Link:
        """One label holds, or any number; the sigmoid of a column is the softmax of two labels."""
        return SIGMOIDS if self.score_head == "sigmoids" else SOFTMAX

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        """The classes, numbered by column."""
        return tuple(Label(name=name, token_id=column) for column, name in enumerate(self.classes))


class Value(Strict):
    """A value of a field of an object.

    Attributes:
        text: the value, as JSON.
        written: how the model writes it, from the token with its first character on: it ends before
            that of the next field, or with the object.

    """

    text: str = Field(min_length=1)
    written: tuple[TokenId, ...] = Field(min_length=1)


class DecidedField(Strict):
    """A field of an object that has few values.

    Attributes:
        path: its name, behind those of the objects it is in, such as ``review.mood``.
        values: what it may be; of enumerated values, in the order of their JSON texts.
        guess: the place of the value that stands in its rows while others are decided.

    """

    path: str = Field(min_length=1)
    values: tuple[Value, ...] = Field(min_length=1)
    guess: int = Field(ge=0)

    @property
    def texts(self) -> list[str]:
        """The values as JSON."""
        return [one.text for one in self.values]


class Objects(Asked):
    """A JSON object whose fields all have few values, as ``response_format`` and tools ask for.

    A label stands for a value of a field: its `token_id` is its place among all of them. The rows
    of the guessed object stand behind the prompt, and each field is decided at the row before it.
    """

    kind: Literal["objects"] = "objects"
    schema_digest: str = Field(description="See `vllm_adainfer.drafts.schemas`.")
    start: tuple[TokenId, ...] = Field(description="What the model writes before the first value.")
    fields: tuple[DecidedField, ...] = Field(min_length=1, max_length=MOST_FIELDS)
    guesser: str = Field(
        default="", description="Digest of what guesses one by a text; empty for none."
    )

    @property
    @override
    def link(self) -> ByField:
        """One value of each field holds."""
        return ByField(tuple(len(field.values) for field in self.fields))

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        """The values of all fields."""
        names = [f"{field.path}={one.text}" for field in self.fields for one in field.values]
        return tuple(Label(name=name, token_id=place) for place, name in enumerate(names))

    def at(self, label: str) -> tuple[int, int]:
        """The field that a label is about, and the place of its value there."""
        numbered = enumerate(self.fields)
        named = {
            f"{field.path}={one.text}": (number, place)
            for number, field in numbered
            for place, one in enumerate(field.values)
        }
        return named[label]

    def code_of(self, answer: str) -> int:
        """The number of an answer, see `ByField.code`; `NO_OBJECT` if it is none of the schema."""
        places = places_in(answer, {one.path: one.texts for one in self.fields})
        return NO_OBJECT if places is None else self.link.code_of(places)

    def in_words(self, places: Sequence[int]) -> str:
        """The object with these values, for people."""
        pairs = zip(self.fields, places, strict=True)
        return ", ".join(f"{field.path}={field.values[place].text}" for field, place in pairs)

    @cached_property
    def commonest(self) -> tuple[int, ...]:
        """The place of each field's value in the commonest object."""
        return tuple(field.guess for field in self.fields)

    def rows(self, guess: Sequence[int]) -> tuple[int, ...]:
        """Of each field, how many rows the one that it is read at lies behind the prompt's last.

        The object with the values at the places `guess` stands there.
        """
        found, end = [], len(self.start)
        for field, place in zip(self.fields, guess, strict=True):
            found.append(end)
            end += len(field.values[place].written)
        return tuple(found)

    @cached_property
    def longest(self) -> int:
        """The most tokens that an object takes."""
        of_fields = (max(len(one.written) for one in field.values) for field in self.fields)
        return len(self.start) + sum(of_fields)

    def written(self, places: Sequence[int]) -> tuple[TokenId, ...]:
        """The tokens of the object with these values, as the model writes it; without the end."""
        parts = zip(self.fields, places, strict=True)
        return (*self.start, *chain(*(field.values[one].written for field, one in parts)))


AnyOutput = Annotated[
    Tokens | Labels | LabelPool | Choices | Scores | Objects, Field(discriminator="kind")
]
