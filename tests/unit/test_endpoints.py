from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from vllm_adainfer.frontend.endpoints import AdaInferEndpoints

CONFIGURED = {"adainfer": {"artifact": "policy"}}


def client_of(additional_config: dict[str, Any], answer: Any) -> TestClient:
    """A client of a server whose workers return `answer`, or raise it."""

    async def collective_rpc(method: str) -> Any:
        assert method == "adainfer_reload"
        if isinstance(answer, Exception):
            raise answer
        return answer

    app = FastAPI()
    AdaInferEndpoints().attach_router(app)
    app.state.engine_client = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config=additional_config),
        collective_rpc=collective_rpc,
    )
    return TestClient(app)


def test_vllm_takes_it_for_an_endpoint_plugin():
    assert isinstance(AdaInferEndpoints(), EndpointPlugin)


def test_a_reload_is_reported_once_whatever_the_number_of_ranks():
    lines = ["policy default was read again from policy"]
    response = client_of(CONFIGURED, [lines, lines]).post("/adainfer/reload")
    assert (response.status_code, response.json()) == (200, {"reloaded": lines})


@pytest.mark.parametrize("config", [{}, {"adainfer": {"artifact": "policy", "enabled": False}}])
def test_a_stock_server_has_nothing_to_reload(config):
    response = client_of(config, AssertionError("no worker is called")).post("/adainfer/reload")
    assert response.status_code == 404
    assert "stock vLLM" in response.json()["detail"]


@pytest.mark.parametrize(
    "text",
    [
        "policy default has other labels",
        "Traceback\n  File x\npolicy default has other labels",
        "Call to collective_rpc method failed: Worker failed with error 'policy default has other "
        "labels', please check the stack trace above for the root cause",
    ],
    ids=["alone", "with a traceback", "from a worker's process"],
)
def test_a_refusal_is_one_sentence(text):
    response = client_of(CONFIGURED, RuntimeError(text)).post("/adainfer/reload")
    assert response.status_code == 409
    assert response.json()["detail"] == "policy default has other labels"


def test_a_reload_is_not_a_get_request():
    assert client_of(CONFIGURED, []).get("/adainfer/reload").status_code == 405
