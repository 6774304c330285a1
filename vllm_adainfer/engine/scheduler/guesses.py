"""The guess behind a prompt, chosen once, when the request arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.config import VllmConfig

from vllm_adainfer.engine.admission.running import Running
from vllm_adainfer.engine.pinned_artifacts import served_artifacts
from vllm_adainfer.policy.guesser import Guesser
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.v1.request import Request


def with_guesses(
    vllm_config: VllmConfig, settings: Settings
) -> Callable[[Request, Running], Running]:
    """What adds the guess to the record of a request whose object is decided, or recorded.

    An object that might not fit into the context, with the token that ends it, has none.

    An AdaInferError if an artifact is no longer the one that was pinned.
    """
    longest = vllm_config.model_config.max_model_len
    guessers = {
        name: Guesser.of(artifact)
        for name, artifact in served_artifacts(vllm_config, settings).items()
        if artifact.config.objects is not None
    }

    def add(request: Request, resolved: Running) -> Running:
        given = resolved.settings
        if settings.record_objects and given.adainfer_guess is not None:
            return resolved.changed(
                guess=given.adainfer_guess, guess_rows=given.adainfer_guess_rows or ()
            )
        prompt = request.prompt_token_ids
        if resolved.objects is None or not resolved.may_exit or not prompt:
            return resolved
        guesser = guessers[resolved.objects]
        if len(prompt) + guesser.objects.longest >= longest:  # an early one might be cut
            return resolved
        places = guesser.places(prompt)
        return resolved.changed(
            guess=guesser.objects.written(places), guess_rows=guesser.objects.rows(places)
        )

    return add
