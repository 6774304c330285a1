"""vLLM's HTTP server."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Coroutine, Mapping
from typing import Any


def on_adapter_unload(state: Any, unloaded: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Call `unloaded` with the `LoRARequest` of each adapter that a server unloads.

    vLLM 0.32's ``/v1/unload_lora_adapter`` forgets the name and tells no engine; running requests
    keep the adapter.
    """
    models = state.openai_serving_models
    unload = models.unload_lora_adapter

    async def unload_and_tell(request: Any) -> Any:
        adapter = models.lora_requests.get(request.lora_name)
        answer = await unload(request)
        if adapter is not None and isinstance(answer, str):  # otherwise an error
            await unloaded(adapter)
        return answer

    models.unload_lora_adapter = unload_and_tell


def key_check(arguments: Namespace) -> Callable[[Any], bool] | None:
    """A check of request headers for one of a server's keys; None for a server without keys.

    vLLM 0.32 itself checks keys only below ``/v1`` and a few more prefixes
    (`entrypoints/serve/middleware/authenticate.py`; `register.py` knows the keys).
    """
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (arguments.api_key or [envs.VLLM_API_KEY]) if key]
    return AuthenticationMiddleware(None, keys).verify_token if keys else None


def decision_question(name: str, fields: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The prompt that vLLM 0.32 makes of a question of ``/v1/systemone``, and its labels.

    A ValueError if vLLM refuses the question.
    """
    try:
        from vllm.entrypoints.generate.structured_decisions import question_types
    except ImportError:  # 0.33 has moved it
        from vllm.entrypoints.openai.decisions import question_types

    question = question_types.build_question(
        name,
        fields["type"],
        fields.get("instructions", ""),
        fields.get("criteria"),
        len(question_types.LABELS),
    )
    return question.type.prompt(question), question.labels
