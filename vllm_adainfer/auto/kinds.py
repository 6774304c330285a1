"""Kinds of requests that read one answer: what that is, and under which adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

Reads = Literal["label", "choice", "probabilities", "scores", "object"]
PROBABILITIES: tuple[Reads, ...] = ("probabilities", "scores")
KNOWN = 1024  # kinds whose names are kept


@dataclass(frozen=True)
class Kind:
    """The common output of requests of one kind.

    Attributes:
        reads: what a client reads of the answer: one label, one of several texts, the labels'
            probabilities, the scores of a classifier, or a JSON object.
        labels: token ids of the labels, ascending; empty for texts.
        choices: the texts, in alphabetical order; empty for labels.
        adapter: name of the LoRA adapter; None for the base model.
        schema: digest of the schema of objects, see `vllm_adainfer.drafts.schemas`; None for
            other answers.
        is_pool: whether a request names some of the labels, not all.
        ending: the tokens that its prompts end with, if it is one of several questions.
        paths: for people, the fields of objects that have few values.

    """

    reads: Reads
    labels: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()
    adapter: str | None = None
    schema: str | None = None
    is_pool: bool = False
    ending: tuple[int, ...] = ()
    paths: tuple[str, ...] = field(default=(), compare=False)

    @property
    def answers(self) -> tuple[int, ...] | tuple[str, ...]:
        """What there is to choose from; of objects their fields."""
        return self.labels or self.choices or self.paths

    def why_full_depth(self, tolerance: float | None) -> str | None:
        """Why requests of this kind never exit; None for a kind that may get a policy.

        `tolerance` is what the switch has for probabilities.
        """
        if self.reads == "object":
            return "objects get no policy by themselves yet: they are drafted, or calibrate one"
        if self.reads in PROBABILITIES and tolerance is None:
            return 'not calibrated: set "tolerance" in the switch beside "directory"'
        if self.reads != "scores" and len(self.labels or self.choices) < 2:
            return "there is nothing to choose from"
        return None

    def name(self, salt: bytes) -> str:
        """A name that tells nobody without `salt` what the kind is."""
        own = {key: value for key, value in vars(self).items() if key != "paths"}
        for later in "schema", "is_pool", "ending":  # names of before there were such hold
            if not own[later]:
                del own[later]
        content = json.dumps(own, sort_keys=True).encode(errors="surrogatepass")
        return "kind-" + hashlib.blake2b(content, digest_size=6, key=salt).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set, for a file."""
        return {name: value for name, value in vars(self).items() if value}

    @classmethod
    def of_dict(cls, fields: dict[str, Any]) -> Kind:
        """The kind that `as_dict` described; other keys are ignored."""
        return cls(
            fields["reads"],
            tuple(fields.get("labels", ())),
            tuple(fields.get("choices", ())),
            fields.get("adapter"),
            fields.get("schema"),
            bool(fields.get("is_pool")),
            tuple(fields.get("ending", ())),
            tuple(fields.get("paths", ())),
        )


def kind_names(salt: bytes) -> Callable[[Kind], str]:
    """A function that names kinds, and remembers the latest names."""
    return lru_cache(KNOWN)(lambda kind: kind.name(salt))
