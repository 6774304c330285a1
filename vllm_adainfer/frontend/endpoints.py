"""``POST /adainfer/reload``, in servers started with ``VLLM_PLUGINS=adainfer``.

vLLM loads an endpoint plugin only if ``VLLM_PLUGINS`` names it.
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from vllm_adainfer.config import read_settings


class AdaInferEndpoints:
    """The plugin's route, as an `EndpointPlugin` of vLLM's."""

    name = "adainfer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_route("/adainfer/reload", reload, methods=["POST"])

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Keep nothing: the route finds the engine where vLLM's own routes do."""


async def reload(request: Request) -> dict[str, Any]:
    """Serve with the artifacts now on disk; a 409 says why that is not possible."""
    engine: EngineClient = request.app.state.engine_client
    settings = read_settings(engine.vllm_config.additional_config)
    if settings is None or settings.runs_stock:
        raise HTTPException(404, detail="this server runs stock vLLM: adainfer has no artifact")
    try:
        lines, *_ = await engine.collective_rpc("adainfer_reload")
    except Exception as error:
        raise HTTPException(409, detail=_sentence(error)) from error
    return {"reloaded": lines}


def _sentence(error: Exception) -> str:
    """A worker's message, without the text that vLLM wraps around it."""
    text = str(error).strip().splitlines()[-1]
    found = re.search(r"failed with error '(.+)', please check the stack trace", text)
    return found[1] if found else text
