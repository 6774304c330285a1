"""``POST /adainfer/reload``, in servers started with ``VLLM_PLUGINS=adainfer``.

vLLM loads endpoint plugins only where ``VLLM_PLUGINS`` names them.
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
    """See vLLM's `EndpointPlugin`."""

    name = "adainfer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_route("/adainfer/reload", reload, methods=["POST"])

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Nothing to keep: the route finds the engine where vLLM's own do."""


async def reload(request: Request) -> dict[str, Any]:
    """Serve with the artifacts that are there now; a 409 says why not."""
    engine: EngineClient = request.app.state.engine_client
    if read_settings(engine.vllm_config.additional_config) is None:
        raise HTTPException(404, detail="this server runs stock vLLM: adainfer is not configured")
    try:
        lines, *_ = await engine.collective_rpc("adainfer_reload")
    except Exception as error:
        raise HTTPException(409, detail=_sentence(error)) from error
    return {"reloaded": lines}


def _sentence(error: Exception) -> str:
    """What a worker has said, out of what vLLM wraps around it."""
    text = str(error).strip().splitlines()[-1]
    found = re.search(r"failed with error '(.+)', please check the stack trace", text)
    return found[1] if found else text
