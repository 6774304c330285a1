"""Writes the objects that a policy has decided, and ends their requests.

The worker decides which value each field has. What is sampled in the same step counts for nothing
then: the answer is the text that the model writes for these values. What a shadow request writes is
read at its end, for the workers to compare.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import override

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.engine.admission.running import resolved_of
from vllm_adainfer.engine.scheduler.object_logprobs import logprobs_of_object
from vllm_adainfer.engine.scheduler.observer import Observer, Step
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm.v1.request import Request

ENDED = "stop"  # in vLLM's words, neither cut short nor given up
MOST_TOKENS_READ = 4096  # of an object that is compared


class Guesses(Protocol):
    """What drafts must know of the objects that policies decide.

    Attributes:
        written: the requests whose objects were written early in the step that has just ended.

    """

    written: Collection[str]

    def rest(self, request: Request) -> list[int]:
        """What a policy expects behind what a request has written; empty for nothing."""


class RecordedGuesses(Guesses):
    """Those of calibration, which each request brings: no object is written early."""

    written = frozenset[str]()

    @override
    def rest(self, request: Request) -> list[int]:
        return []


class WrittenObjects(Observer, Guesses):
    """Ends a request in the step that has decided its object early.

    Of one that ran to full depth all the same, the object of the heads is what probably follows.
    """

    def __init__(self, configs: Mapping[str, ArtifactConfig], tokenizer: Any) -> None:
        """`configs` are those of the policies; `tokenizer` is the engine's.

        An AdaInferError if that does not write the objects of a policy as in calibration.
        """
        self._objects = {name: one.objects for name, one in configs.items() if one.objects}
        for name, objects in self._objects.items():
            check_objects(tokenizer, name, objects)
        self._tokenizer = tokenizer
        self._read: dict[str, int] = {}
        self._probable: dict[str, tuple[int, ...]] = {}
        self.written: set[str] = set()

    @override
    def rest(self, request: Request) -> list[int]:
        probable, written = self._probable.get(request.request_id, ()), request.output_token_ids
        count = len(written)
        return list(probable[count:]) if probable[:count] == tuple(written) else []

    @override
    def stepped(self, step: Step) -> None:
        self.written.clear()
        if step.note is None or not step.note.objects:
            return
        for request, tokens in step.choosing(with_preempted=True):
            decided = step.note.objects.get(request.request_id)
            if decided is None:
                continue
            objects = self._objects[decided.policy]
            tokens_of_object = objects.written(objects.link.places(decided.code))
            if not decided.is_early:
                self._probable[request.request_id] = tokens_of_object
                continue
            assert request.sampling_params is not None
            end = request.sampling_params.eos_token_id
            assert end is not None, "without one, no policy decides an object"
            logprobs = None
            if decided.value_logprobs is not None:
                places = objects.link.places(decided.code)
                logprobs = logprobs_of_object(objects, places, decided.value_logprobs, end)
            step.replace(request, tokens, [*tokens_of_object, end], logprobs)
            self.written.add(request.request_id)

    @override
    def ended(self, request: Request, why: str | None) -> None:
        """Read what a shadow request has written, unless its client has cut it short.

        By ``max_tokens``, stop tokens of its own, or by hanging up: an early object would be cut,
        too, or is more than full depth had room for.
        """
        was_decided = self._probable.pop(request.request_id, None) is not None
        resolved = resolved_of(request)
        ended_by_itself = why == ENDED and request.stop_reason is None
        if not was_decided or not ended_by_itself or resolved is None or not resolved.is_shadow:
            return
        assert resolved.objects is not None, "a policy decides it"
        if request.num_output_tokens <= MOST_TOKENS_READ:
            tokens = [*request.output_token_ids]
            if request.sampling_params and tokens[-1] == request.sampling_params.eos_token_id:
                tokens.pop()
            objects = self._objects[resolved.objects]
            self._read[request.request_id] = objects.code_of(self._tokenizer.decode(tokens))

    def take_read(self) -> dict[str, int]:
        """The objects that shadow requests have written since the last call, as numbers."""
        read, self._read = self._read, {}
        return read


def check_objects(tokenizer: Any, name: str, objects: Objects) -> None:
    """Check that an engine's tokenizer writes a policy's objects as in calibration.

    That of the guess, and one with each value in its place: early answers consist of these tokens.
    """
    guess = objects.commonest
    for number, field in enumerate(objects.fields):
        for place in range(len(field.values)):
            places = [*guess[:number], place, *guess[number + 1 :]]
            tokens = objects.written(places)
            if objects.code_of(tokenizer.decode(tokens)) != objects.link.code_of(places):
                raise AdaInferError(
                    f"policy {name}: this engine's tokenizer reads {tokenizer.decode(tokens)!r} "
                    f"where the calibration wrote {field.path} = {field.values[place].text}: serve "
                    "with the same tokenizer, or calibrate again"
                )
