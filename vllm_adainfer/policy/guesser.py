"""Guesses the object that stands behind a prompt, from the tokens of the prompt's own text.

A guess must be known when a step is planned, before the model has read anything. So it comes from a
linear model on the set of the text's tokens: some microseconds when the request arrives. It decides
nothing. Full depth verifies it like any draft, and heads were fitted beside such guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.artifact.tensors import GUESS_TOKENS, GUESS_WEIGHT

MOST_TOKENS = 4096  # of a text that are read: what a client's prompt costs on arrival


@dataclass(frozen=True)
class Guesser:
    """Chooses a value of each field.

    Attributes:
        objects: those that a policy decides.
        shared: what all prompts of the calibration begin and end with.
        tokens: int64 [tokens], those that tell something, ascending.
        weight: fp32 [tokens + 1, labels], what each adds to the scores of all values; last, what
            every text adds. None if the commonest object is the best guess for all texts.

    """

    objects: Objects
    shared: SharedTokens
    tokens: Ints
    weight: Tensor | None = None

    @classmethod
    def of(cls, artifact: Artifact) -> Guesser:
        """That of a policy for objects."""
        config, tensors = artifact.config, artifact.tensors
        assert config.objects is not None
        if GUESS_WEIGHT not in tensors:
            return cls.of_commonest(config.objects, config.shared)
        tokens, weight = tensors[GUESS_TOKENS].numpy(), tensors[GUESS_WEIGHT]
        return cls(config.objects, config.shared, tokens, weight)

    @classmethod
    def of_commonest(cls, objects: Objects, shared: SharedTokens) -> Guesser:
        """That of texts which tell nothing: the commonest object is the guess for all."""
        return cls(objects, shared, np.arange(0))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What an artifact keeps of it."""
        if self.weight is None:
            return {}
        return {GUESS_TOKENS: torch.from_numpy(self.tokens), GUESS_WEIGHT: self.weight}

    def places(self, prompt: Sequence[int]) -> Sequence[int]:
        """The place of the guessed value in each field, for a prompt, in token ids."""
        if self.weight is None:
            return self.objects.commonest
        text = own_tokens(prompt, self.shared)
        at = np.searchsorted(self.tokens, text)
        known = at[self.tokens[np.minimum(at, len(self.tokens) - 1)] == text]
        scores = self.weight[torch.from_numpy(known)].sum(dim=0) + self.weight[-1]
        fields = self.objects.link.fields(scores.unsqueeze(0))
        return [int(field.argmax()) for field in fields]

    def wasted(self, prompt: Sequence[int], code: int) -> int:
        """How many rows of a prompt's guess full depth discards if it writes the object `code`."""
        guess, written = self.places(prompt), self.objects.link.places(code)
        wrong = [
            one for one, pair in enumerate(zip(guess, written, strict=True)) if len({*pair}) > 1
        ]
        if not wrong:
            return 0
        return len(self.objects.written(guess)) - self.objects.rows(guess)[wrong[0]]


def own_tokens(prompt: Sequence[int], shared: SharedTokens) -> Ints:
    """The tokens of a prompt's own text, each once, ascending."""
    start, end = len(shared.start), len(prompt) - len(shared.end)
    return np.unique(np.array(prompt[start : min(end, start + MOST_TOKENS)], dtype=np.int64))
