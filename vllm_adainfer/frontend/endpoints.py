"""``POST /adainfer/reload``, in servers started with ``VLLM_PLUGINS=adainfer``.

vLLM loads an endpoint plugin only if ``VLLM_PLUGINS`` names it.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from argparse import Namespace
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from vllm_adainfer.artifact.files import pin
from vllm_adainfer.artifact.source import Pinned
from vllm_adainfer.engine.compat.server import key_check, on_adapter_unload
from vllm_adainfer.settings.engine import Settings, read_settings

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class AdaInferEndpoints:
    """The plugin's route, as a vLLM `EndpointPlugin`."""

    name = "adainfer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_route("/adainfer/reload", reload, methods=["POST"])

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Store the check of the server's keys, and drop policies of adapters that it unloads."""
        assert engine_client is not None, "`required_tasks` rules out servers without an engine"
        state.adainfer_key_check = key_check(args)
        state.adainfer_reload = asyncio.Lock()
        settings = _settings_of(engine_client)
        if settings is None or settings.exit_points is None:
            return

        async def unloaded(adapter: LoRARequest) -> None:
            number = adapter.lora_int_id
            await engine_client.collective_rpc("adainfer_drop_policy", args=(number,))

        on_adapter_unload(state, unloaded)


def _settings_of(engine: EngineClient) -> Settings | None:
    """The engine's settings; None if it runs stock vLLM."""
    settings = read_settings(engine.vllm_config.additional_config)
    return None if settings is None or settings.runs_stock else settings


async def reload(request: Request) -> dict[str, Any]:
    """Serve with the artifacts now on disk, or answer 409 with the reason.

    All engines behind this server read the artifacts before any of them switches. Only this process
    asks the hub, in a thread of its own: engines read in the thread of their steps.
    """
    has_key = request.app.state.adainfer_key_check
    if has_key is not None and not has_key(request.headers):
        raise HTTPException(401, detail="give a key of this server: -H 'Authorization: Bearer KEY'")
    engine: EngineClient = request.app.state.engine_client
    settings = _settings_of(engine)
    if settings is None:
        raise HTTPException(404, detail="this server runs stock vLLM: start it with an artifact")
    lock: asyncio.Lock = request.app.state.adainfer_reload
    if lock.locked():
        raise HTTPException(409, detail="a reload is running: wait for its answer, then try again")
    async with lock:
        return {"reloaded": await _reloaded(engine, settings)}


async def _reloaded(engine: EngineClient, settings: Settings) -> list[str]:
    name = uuid.uuid4().hex
    try:
        pinned = await asyncio.to_thread(_pinned, settings)
        await engine.collective_rpc("adainfer_read_again", args=(name, pinned))
    except Exception as error:
        with suppress(Exception):  # an engine that has died
            await engine.collective_rpc("adainfer_end_reload", args=(name, False))
        raise HTTPException(409, detail=_sentence(error)) from error
    lines: list[str]
    lines, *_ = await engine.collective_rpc("adainfer_end_reload", args=(name, True))
    return lines


def _pinned(settings: Settings) -> dict[str, Pinned]:
    """The artifacts as they are now, by policy name."""
    return {name: pin(source) for name, source in settings.artifacts.items()}


def _sentence(error: Exception) -> str:
    """A worker's message, without the text that vLLM wraps around it."""
    text = str(error).strip().splitlines()[-1]
    found = re.search(r"failed with error '(.+)', please check the stack trace", text)
    return found[1] if found else text
