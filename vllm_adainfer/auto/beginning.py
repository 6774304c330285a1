"""What the prompts of a kind begin with: whole-prompt heads read the tokens behind it."""

from __future__ import annotations

from collections.abc import Sequence

PROMPTS = 32  # different ones, after which it is known
MOST_TOKENS = 4096  # of a prompt that are looked at


class Beginning:
    """Finds the tokens that all prompts of a kind begin with, as `calibrate` does in its data.

    A prompt that repeats an earlier one says nothing.
    """

    def __init__(self) -> None:
        """Begin without a prompt."""
        self._shared: Sequence[int] | None = None
        self._shortest = 0
        self._seen: set[tuple[int, int]] = set()

    def see(self, prompt: Sequence[int]) -> None:
        """Look at the tokens of another prompt."""
        length, prompt = len(prompt), prompt[:MOST_TOKENS]
        key = length, hash(tuple(prompt))
        if key in self._seen:
            return
        self._seen.add(key)
        if self._shared is None:
            self._shared, self._shortest = prompt, length
            return
        self._shortest = min(self._shortest, length)
        pairs = zip(self._shared, prompt, strict=False)
        differs = (place for place, (one, other) in enumerate(pairs) if one != other)
        most = min(len(self._shared), len(prompt))
        self._shared = self._shared[: next(differs, most)]

    @property
    def pooled_from(self) -> int | None:
        """The position from which on to read prompts; None before it is known.

        The first token is never read: its state is an outlier.
        """
        if self._shared is None or len(self._seen) < PROMPTS:
            return None
        return max(1, min(len(self._shared), self._shortest - 1))
