"""Writes the objects that a policy has decided, and ends their requests.

The worker decides which value each field has. What is sampled in the same step counts for nothing
then: the answer is the text that the model writes for these values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from typing_extensions import override

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.engine.admission.running import resolved_of
from vllm_adainfer.engine.scheduler.observer import Observer, Step

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Guesses(Protocol):
    """What drafts must know of the objects that policies decide.

    Attributes:
        written: the requests whose objects were written early in the step that has just ended.

    """

    written: Collection[str]

    def guess_of(self, request: Request) -> Sequence[int]:
        """What stands behind a prompt while a policy decides its object; empty for no object."""

    def rest(self, request: Request) -> list[int]:
        """What a policy expects behind what a request has written; empty for nothing."""


class RecordedGuesses(Guesses):
    """Those of calibration, which each request brings."""

    written = frozenset[str]()

    @override
    def guess_of(self, request: Request) -> Sequence[int]:
        resolved = resolved_of(request)
        guess = None if resolved is None else resolved.settings.adainfer_guess
        return guess or ()

    @override
    def rest(self, request: Request) -> list[int]:
        return []


class WrittenObjects(Observer, Guesses):
    """Ends a request in the step that has decided its object early.

    Of one that ran to full depth all the same, the object of the heads is what probably follows.
    """

    def __init__(self, configs: Mapping[str, ArtifactConfig]) -> None:
        """`configs` are those of the policies."""
        self._objects = {name: one.objects for name, one in configs.items() if one.objects}
        self._probable: dict[str, tuple[int, ...]] = {}
        self.written: set[str] = set()

    @override
    def guess_of(self, request: Request) -> Sequence[int]:
        resolved = resolved_of(request)
        if resolved is None or resolved.objects is None or not resolved.may_exit:
            return ()
        return self._objects[resolved.objects].guess

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
        for request, tokens in step.choosing():
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
            step.replace(request, tokens, [*tokens_of_object, end])
            self.written.add(request.request_id)

    @override
    def ended(self, request: Request, why: str | None) -> None:
        self._probable.pop(request.request_id, None)
