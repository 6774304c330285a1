"""What is asked: the same of a request, and of the requests that an artifact is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vllm_adainfer.artifact.config_fields import ConfigFields


class Form(Enum):
    """The forms of output that policies promise."""

    TOKEN = "the token alone"
    CHOICE = "one of several texts"
    AMONG_LABELS = "probabilities among the labels"
    IN_VOCABULARY = "probabilities of the labels in the whole vocabulary"
    SCORES = "the scores of a classifier"
    OBJECT = "a JSON object of decisions"
    OBJECT_PROBABILITIES = "a JSON object of decisions, and how probable they are"


@dataclass(frozen=True)
class Output:
    """What a request wants returned.

    Attributes:
        form: the form of output.
        labels: ids of the tokens that may be the answer; None if any token may be.
        choices: the texts to choose from; None if there is no such restriction.
        schema: the digest of the schema of the object, see `vllm_adainfer.drafts.schemas`; None for
            another form.
        is_greedy: whether the answer is the best one. A sampled one may be any label.

    """

    form: Form
    labels: frozenset[int] | None = None
    choices: frozenset[str] | None = None
    schema: str | None = None
    is_greedy: bool = field(default=True, compare=False)

    @property
    def is_object(self) -> bool:
        """Whether it is a JSON object of decisions."""
        return self.form in (Form.OBJECT, Form.OBJECT_PROBABILITIES)

    @classmethod
    def of_config(cls, config: ConfigFields) -> Output:
        """The strongest output that the bound of an artifact covers."""
        if config.score_head is not None:
            return cls(Form.SCORES)
        if config.objects is not None:
            reads = config.promise.serves_probabilities(in_vocabulary=False)
            form = Form.OBJECT_PROBABILITIES if reads else Form.OBJECT
            return cls(form, schema=config.objects.schema_digest)
        if config.choices:
            return cls(Form.CHOICE, choices=frozenset(one.text for one in config.choices))
        labels = frozenset(config.label_ids) or None
        promise = config.promise
        if not promise.reads_probabilities:
            return cls(Form.TOKEN, labels)
        in_vocabulary = promise.serves_probabilities(in_vocabulary=True)
        return cls(Form.IN_VOCABULARY if in_vocabulary else Form.AMONG_LABELS, labels)

    def is_promised_by(self, config: ConfigFields) -> bool:
        """Whether the bound of an artifact covers this output."""
        reads_answer = self.form in (Form.TOKEN, Form.CHOICE, Form.OBJECT)
        if config.never_early and reads_answer and not self.is_greedy:
            return False
        if config.score_head is not None or self.form is Form.SCORES:
            return config.score_head is not None and self.form is Form.SCORES
        if config.objects is not None or self.is_object:
            if config.objects is None or not self.is_greedy or not self.has_labels_of(config):
                return False  # an early one is not sampled
            is_plain = self.form is Form.OBJECT
            return is_plain or config.promise.serves_probabilities(in_vocabulary=False)
        if config.choices or self.form is Form.CHOICE:
            return bool(config.choices) and self.has_labels_of(config)
        if not self.has_labels_of(config) and not self._is_in_pool(config):
            return False
        promise = config.promise
        if self.form is Form.TOKEN:
            return promise.serves_best
        return promise.serves_probabilities(self.form is Form.IN_VOCABULARY)

    def has_labels_of(self, config: ConfigFields) -> bool:
        """Whether an artifact is for exactly these labels, these choices, or this schema."""
        if config.objects is not None:
            return self.schema == config.objects.schema_digest
        if config.choices:
            return self.choices == frozenset(one.text for one in config.choices)
        return self.labels == (frozenset(config.label_ids) or None)

    def _is_in_pool(self, config: ConfigFields) -> bool:
        """Whether a policy's label pool has these labels; a single one has no runner-up."""
        if not config.label_pool or self.labels is None:
            return False
        return len(self.labels) > 1 and self.labels <= set(config.label_ids)
