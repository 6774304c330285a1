"""Completes an answer once its grammar leaves only one text, and ends its request.

A choice is decided by its first tokens, and a JSON object without white space by its last value.
The grammar forces everything behind, but stock vLLM runs a step for each further token and for the
end token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from typing_extensions import override

from vllm_adainfer.artifact.fields import Choice
from vllm_adainfer.engine.admission.requested_output import can_end_with_grammar
from vllm_adainfer.engine.compat.structured_outputs import accepts_all, rest_of
from vllm_adainfer.engine.scheduler.observer import Observer, Step
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

LONGEST_GRAMMAR = 1 << 16  # characters; the forced text of a longer one is never looked for
LONGEST_REST = 1024  # characters to tokenise in a step, at most once per request
MOST_TOKENS = 64  # of an answer that are tokenised again with its rest, as the model would write it


class RestOfAnswer(Observer):
    """Ends a request in the step that leaves only one answer.

    vLLM accepts several tokens from one step, as in speculative decoding, and stops at the end
    token. Ambiguous cases fall back to normal decoding.
    """

    def __init__(self, manager: StructuredOutputManager, max_model_len: int) -> None:
        """`manager` and `max_model_len` are the scheduler's."""
        self._manager = manager
        self._max_model_len = max_model_len
        self._ends: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # the end token of each
        self._finished = [0, 0]  # answers and appended tokens since the last report

    @override
    def arrived(self, request: Request) -> None:
        """Note a request that may end early."""
        params, structured = request.sampling_params, request.structured_output_request
        if params is None or structured is None or request.resumable:
            return
        _, grammar = structured.structured_output_key
        end = params.eos_token_id
        if can_end_with_grammar(params) and end is not None and len(grammar) <= LONGEST_GRAMMAR:
            self._ends[request] = end

    @override
    def stepped(self, step: Step) -> None:
        """Append the rest of each answer to its sampled tokens."""
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

        Empty if several answers are left, or if the text might differ from that of normal decoding.
        """
        end, structured = self._ends.get(request), request.structured_output_request
        if end is None or structured is None or sampled[-1] == end:
            return []
        if self._manager.reasoner_cls is not None and not structured.reasoning_ended:
            return []  # the grammar is not in force yet
        text = rest_of(structured.grammar, sampled, end, LONGEST_REST)
        if text is None:
            return []
        del self._ends[request]  # once only
        if len(text) > LONGEST_REST:
            return []
        rest = [*self._written(request, sampled, text), end]
        written = request.num_output_tokens + len(sampled) + len(rest)
        room = min(request.max_tokens, self._max_model_len - request.num_prompt_tokens)
        fits = written <= room and accepts_all(structured.grammar, [*sampled, *rest])
        return rest if fits else []

    def _written(self, request: Request, sampled: Sequence[int], text: str) -> Sequence[int]:
        """The tokens of the rest: those of the whole answer, if it began with canonical ones."""
        tokenizer: Any = self._manager.tokenizer
        tokens = (*request.output_token_ids[:MOST_TOKENS], *sampled)
        if text and len(tokens) <= MOST_TOKENS:
            canonical = _written(tokenizer, tokenizer.decode(tokens) + text)
            if canonical[: len(tokens)] == tokens:
                return canonical[len(tokens) :]
        return _written(tokenizer, text)


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
