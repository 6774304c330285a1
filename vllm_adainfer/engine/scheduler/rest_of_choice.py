"""Completes a choice: the tokens that must follow once the sampled ones leave a single choice.

``structured_outputs: {"choice": [...]}`` is vLLM's documented way to classify. Once one choice is
left, its grammar forces every further token, but stock vLLM runs a step for each of them and for
the end token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from typing_extensions import override

from vllm_adainfer.artifact.fields import Choice
from vllm_adainfer.engine.admission.requested_output import can_end_with_choice, requested_choices
from vllm_adainfer.engine.compat.structured_outputs import accepts_all
from vllm_adainfer.engine.scheduler.observer import Observer, Step
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

KNOWN_SETS = 128  # sets of choices whose tokens are cached for later requests
MOST_TOKENS = 64  # an answer that is still ambiguous after these is left to vLLM
# Most characters to tokenise in a step: the rest of an answer that did not begin with canonical
# tokens, at most once per request. Everything else is tokenised on arrival.
LONGEST_REST = 1024


# The choices of a request, prepared on arrival: the texts, sorted; the canonical token ids of each;
# and the id of the token that ends the answer.
Choices: TypeAlias = tuple[tuple[str, ...], tuple[tuple[int, ...], ...], int]


class RestOfChoice(Observer):
    """Ends a request with a choice in the step that leaves only one choice.

    vLLM accepts several tokens from one step, as in speculative decoding, and stops at the end
    token. Ambiguous cases fall back to normal decoding.
    """

    def __init__(self, manager: StructuredOutputManager, max_model_len: int) -> None:
        """`manager` and `max_model_len` are the scheduler's."""
        self._manager = manager
        self._max_model_len = max_model_len
        self._written = lru_cache(KNOWN_SETS)(self._write)
        self._choosing: WeakKeyDictionary[Request, Choices] = WeakKeyDictionary()
        self._finished = [0, 0]  # choices and appended tokens since the last report

    @override
    def arrived(self, request: Request) -> None:
        """Prepare the choices of a request that may end early."""
        params = request.sampling_params
        if params is None or request.resumable or not can_end_with_choice(params):
            return
        choices, end = requested_choices(params), params.eos_token_id
        if choices and end is not None:
            self._choosing[request] = (*self._written(choices), end)

    @override
    def stepped(self, step: Step) -> None:
        """Append the rest of each choice to its sampled tokens."""
        for request, tokens in step.choosing():
            if rest := self.after(request, tokens):
                step.append(request, tokens, rest)
                self._finished[0] += 1
                self._finished[1] += len(rest)

    @override
    def report(self) -> Mapping[str, Any]:
        finished, self._finished = self._finished, [0, 0]
        counters = "choices_finished", "choice_tokens_appended"
        return {"added": [*zip(counters, finished, strict=True)]} if finished[0] else {}

    def after(self, request: Request, sampled: Sequence[int]) -> list[int]:
        """The tokens that must follow `sampled`, the newest tokens of `request`, and end it.

        Empty if several choices are left, or if the text might differ from that of normal decoding.
        """
        choices, structured = self._choosing.get(request), request.structured_output_request
        if choices is None or structured is None:
            return []
        if self._manager.reasoner_cls is not None and not structured.reasoning_ended:
            return []  # the grammar is not in force yet
        tokens = [*request.output_token_ids[:MOST_TOKENS], *sampled]
        if len(tokens) > MOST_TOKENS:
            del self._choosing[request]
            return []
        text = self._decode(tokens)
        place = bisect_left(choices[0], text)  # texts with this prefix are adjacent
        left = [one for one in choices[0][place : place + 2] if one.startswith(text)]
        if len(left) != 1:
            return []
        del self._choosing[request]  # once only
        return self._rest(request, choices, place, text, tokens)

    def _rest(
        self, request: Request, choices: Choices, place: int, text: str, tokens: list[int]
    ) -> list[int]:
        """The tokens after `tokens` (as text: `text`), when only the choice at `place` is left."""
        texts, written, end = choices
        only, canonical = texts[place], written[place]
        if canonical[: len(tokens)] == tuple(tokens):
            rest = [*canonical[len(tokens) :], end]
        elif len(only) - len(text) <= LONGEST_REST:
            rest = [*self._encode(only[len(text) :]), end]
        else:
            return []
        room = min(
            request.max_tokens - len(tokens),
            self._max_model_len - request.num_prompt_tokens - len(tokens),
        )
        fits = len(rest) <= room and self._decode([*tokens, *rest[:-1]]) == only
        structured = request.structured_output_request
        if not fits or structured is None:
            return []
        sampled = tokens[request.num_output_tokens :]
        return rest if accepts_all(structured.grammar, [*sampled, *rest]) else []

    def _write(
        self, choices: frozenset[str]
    ) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
        """The first two parts of `Choices`."""
        texts = tuple(sorted(choices))
        return texts, tuple(map(self._encode, texts))

    def _encode(self, text: str) -> tuple[int, ...]:
        return _written(self._manager.tokenizer, text)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: Any = self._manager.tokenizer.decode(tokens)
        return str(text)


def check_tokenizer(tokenizer: Any, name: str, choices: Sequence[Choice]) -> None:
    """Check that an engine's tokenizer encodes a policy's choices as in calibration.

    Otherwise early answers could be tokens that the grammar rejects.
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
