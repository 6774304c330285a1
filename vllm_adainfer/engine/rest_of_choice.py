"""The rest of a choice: the tokens that follow once those sampled leave one choice alone.

``structured_outputs: {"choice": [...]}`` is vLLM's documented way to classify. Its grammar then
leaves nothing to decide, but stock vLLM takes a step for each further token of the choice, and one
for the end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm_adainfer.engine.compat_requests import takes_all
from vllm_adainfer.engine.reads import KNOWN_SETS, choices_asked, is_plain
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.artifact import Choice

if TYPE_CHECKING:
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

KNOWN_TEXTS = 4096  # kept, so that a step need not work them out again


class RestOfChoice:
    """Finds the rest in canonical tokenisation; what it is not sure of is left to vLLM's steps."""

    def __init__(self, manager: StructuredOutputManager, max_model_len: int) -> None:
        """`manager` is the scheduler's."""
        self._manager = manager
        self._max_model_len = max_model_len
        self._encoded = lru_cache(KNOWN_TEXTS)(self._encode)

    def after(self, request: Request, sampled: Sequence[int]) -> list[int]:
        """The tokens that follow `sampled`, the newest of `request`, and end it.

        It is empty if several choices are left, or if the request would not get the same text.
        """
        params, structured = request.sampling_params, request.structured_output_request
        if params is None or structured is None or request.resumable or not is_plain(params):
            return []
        if self._manager.reasoner_cls is not None and not structured.reasoning_ended:
            return []  # the grammar is not in force yet
        choices = _sorted(choices_asked(params) or frozenset())
        tokens = [*request.output_token_ids, *sampled]
        text = self._decode(tokens)
        place = bisect_left(choices, text)  # those that begin with the text follow each other
        left = [choice for choice in choices[place : place + 2] if choice.startswith(text)]
        if len(left) != 1:
            return []
        [only] = left
        rest = [*self._rest(only, text, tokens), params.eos_token_id]
        room = min(
            request.max_tokens - len(tokens),
            self._max_model_len - request.num_tokens - len(sampled),
        )
        fits = len(rest) <= room and self._decode([*tokens, *rest[:-1]]) == only
        return rest if fits and takes_all(structured.grammar, [*sampled, *rest]) else []

    def _rest(self, choice: str, text: str, tokens: list[int]) -> list[int]:
        canonical = self._encoded(choice)
        if canonical[: len(tokens)] == tuple(tokens):
            return list(canonical[len(tokens) :])
        return list(self._encoded(choice[len(text) :]))

    def _encode(self, text: str) -> tuple[int, ...]:
        return _written(self._manager.tokenizer, text)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: Any = self._manager.tokenizer.decode(tokens)
        return str(text)


def check_tokenizer(tokenizer: Any, name: str, choices: Sequence[Choice]) -> None:
    """Check that an engine's tokenizer writes the choices of a policy as at calibration.

    Else its early answers could be tokens that the grammar does not take.

    Raises:
        AdaInferError: it does not.

    """
    for choice in choices:
        answer = tokenizer.decode(choice.first_tokens[:1])
        is_same = _written(tokenizer, choice.text) == choice.token_ids
        if not is_same or not choice.text.startswith(answer):
            raise AdaInferError(
                f"policy {name}: this engine's tokenizer writes the choice {choice.text!r} "
                "with other tokens than that of the calibration: serve with the same "
                "tokenizer, or calibrate again"
            )


def _written(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


@lru_cache(KNOWN_SETS)
def _sorted(choices: frozenset[str]) -> list[str]:
    return sorted(choices)
