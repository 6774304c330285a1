from __future__ import annotations

import asyncio
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.lora.request import LoRARequest
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.engine.worker.served_policies import ServedPolicies
from vllm_adainfer.frontend.endpoints import AdaInferEndpoints
from vllm_adainfer.settings.engine import Settings

PATH = "/adainfer/reload"


class Workers:
    """The workers of a server's engines: what each is called with, and what it says."""

    def __init__(self, engines: int = 1) -> None:
        self.calls: list[list[tuple[str, Any]]] = [[] for _ in range(engines)]
        self.failure: Exception | None = None  # of one that reads artifacts
        self.reading, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        """VLLM calls all engines, answers by the first, and raises what one of them raises."""
        for calls in self.calls:
            calls.append((method, *args))
        if method == "adainfer_read_again":
            self.reading.set()
            while not self.go_on.is_set():
                await asyncio.sleep(0.001)
        if method == "adainfer_read_again" and self.failure is not None:
            raise self.failure
        if method == "adainfer_end_reload":
            _, use = args
            return [["policy default was reloaded from policy"]] * 2 if use else [[], []]
        return [None, None]

    def methods(self) -> list[list[Any]]:
        """Of each engine, the calls; whether they switched."""
        return [
            [
                (method, args[-1]) if method == "adainfer_end_reload" else method
                for method, *args in calls
            ]
            for calls in self.calls
        ]


SWITCHED = ["adainfer_read_again", ("adainfer_end_reload", True)]
STAYED = ["adainfer_read_again", ("adainfer_end_reload", False)]


@contextmanager
def client_of(
    switch: dict[str, Any] | None, workers: Workers, keys: list[str] | None = None
) -> Any:
    """A client of a server with these keys, and vLLM's own middleware."""
    app = FastAPI()
    plugin = AdaInferEndpoints()
    plugin.attach_router(app)
    app.add_api_route("/v1/models", lambda: {})
    arguments = Namespace(
        api_key=keys,
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        enable_request_id_headers=False,
        middleware=[],
    )
    init_entrypoints_middleware(arguments, app, ())
    app.state.engine_client = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={} if switch is None else {"adainfer": switch}
        ),
        collective_rpc=workers.collective_rpc,
    )
    with TestClient(app) as client:
        client.portal.call(plugin.init_state, app.state.engine_client, app.state, arguments)
        yield client


@pytest.fixture
def switch(tiny_policy) -> dict[str, Any]:
    return {"artifact": str(tiny_policy)}


def test_vllm_takes_it_for_an_endpoint_plugin():
    assert isinstance(AdaInferEndpoints(), EndpointPlugin)


def test_a_reload_is_reported_once_whatever_the_number_of_ranks_and_engines(switch):
    workers = Workers(engines=2)
    with client_of(switch, workers) as client:
        response = client.post(PATH)
    lines = ["policy default was reloaded from policy"]
    assert (response.status_code, response.json()) == (200, {"reloaded": lines})
    assert workers.methods() == [SWITCHED] * 2


@pytest.mark.parametrize("config", [None, {"artifact": "policy", "enabled": False}])
def test_a_stock_server_has_nothing_to_reload(config):
    workers = Workers()
    with client_of(config, workers) as client:
        response = client.post(PATH)
    assert response.status_code == 404
    assert "stock vLLM" in response.json()["detail"]
    assert workers.methods() == [[]]


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
def test_a_refusal_is_one_sentence_and_no_engine_switches(switch, text):
    workers = Workers(engines=3)
    workers.failure = RuntimeError(text)
    with client_of(switch, workers) as client:
        response = client.post(PATH)
    assert response.status_code == 409
    assert response.json()["detail"] == "policy default has other labels"
    assert workers.methods() == [STAYED] * 3


def test_all_engines_are_to_read_the_files_that_the_server_sees(switch, tmp_path):
    workers = Workers(engines=2)
    with client_of(switch, workers) as client:
        client.post(PATH)
        client.post(PATH)
    (_, first, pinned), _, (_, second, again), _ = workers.calls[0]
    assert first != second
    digest = load_artifact(switch["artifact"]).digest
    assert pinned == again == {"default": (switch["artifact"], digest)}


def test_the_hub_is_asked_once_and_not_by_an_engine(switch, monkeypatch):
    """An engine reads in the thread of its steps, where all requests would wait for the network."""
    asked: list[str] = []

    def snapshot_download(repo: str, **_: Any) -> str:
        asked.append(repo)
        return str(switch["artifact"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    workers = Workers(engines=2)
    with client_of({"artifact": "org/mood@main"}, workers) as client:
        assert client.post(PATH).status_code == 200
    assert asked == ["org/mood"]
    [(_, _, pinned), _] = workers.calls[0]
    read: list[Artifact] = []
    served: Any = SimpleNamespace(
        model=SimpleNamespace(settings=Settings(artifact="org/mood@main")),
        build_on_all_ranks=lambda read_artifacts: read.extend(read_artifacts().values()),
        replace=lambda built: None,
    )
    built = ServedPolicies.read_again(served, pinned)
    lines = ServedPolicies.reload(served, built)
    assert lines == ["policy default was reloaded from org/mood@main"]
    assert [one.digest for one in read] == [pinned["default"].digest]
    assert asked == ["org/mood"]


def test_a_second_reload_is_refused_while_one_runs(switch):
    workers = Workers()
    workers.go_on.clear()
    with client_of(switch, workers) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, PATH)
        assert workers.reading.wait(10)
        try:
            second = pool.submit(client.post, PATH).result(10)
        finally:
            workers.go_on.set()
        assert first.result(10).status_code == 200
        assert client.post(PATH).status_code == 200
    assert (second.status_code, "a reload is running: wait" in second.text) == (409, True)
    assert workers.methods() == [SWITCHED * 2]


def test_a_damaged_artifact_is_refused_before_an_engine_is_asked(tmp_path):
    workers = Workers()
    with client_of({"artifact": str(tmp_path)}, workers) as client:
        response = client.post(PATH)
    assert (response.status_code, "has no config.json" in response.text) == (409, True)
    assert "adainfer_read_again" not in workers.methods()[0]


def test_a_reload_is_not_a_get_request(switch):
    with client_of(switch, Workers()) as client:
        assert client.get(PATH).status_code == 405


@pytest.mark.parametrize("source", ["--api-key", "VLLM_API_KEY"])
@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "one"}, 401),
        ({"Authorization": "Bearer one"}, 200),
        ({"Authorization": "Bearer two"}, 200),
    ],
)
def test_a_server_with_keys_asks_for_one_as_for_its_other_routes(
    switch, monkeypatch, source, header, status
):
    keys = ["one", "two"]
    if source == "VLLM_API_KEY":
        keys = None
        key = header.get("Authorization", "").removeprefix("Bearer ")
        monkeypatch.setattr("vllm.envs.VLLM_API_KEY", key if status == 200 else "one")
    workers = Workers()
    with client_of(switch, workers, keys) as client:
        assert client.get("/v1/models", headers=header).status_code == status
        response = client.post(PATH, headers=header)
    assert response.status_code == status
    assert workers.methods() == [SWITCHED if status == 200 else []]


class ServedAdapters:
    """VLLM's `OpenAIServingModels`, as far as it unloads adapters."""

    def __init__(self) -> None:
        self.lora_requests = {"mood": LoRARequest("mood", 7, "/adapters/mood")}

    async def unload_lora_adapter(self, request: Any) -> Any:
        found = self.lora_requests.pop(request.lora_name, None)
        return SimpleNamespace(error="not found") if found is None else "Success"


@pytest.mark.parametrize(
    ("switch_key", "name", "dropped"),
    [("exit_points", "mood", [7]), ("exit_points", "other", []), ("artifact", "mood", [])],
)
def test_a_policy_that_came_with_an_adapter_is_dropped_when_the_server_unloads_it(
    switch, switch_key, name, dropped
):
    workers = Workers()
    switch = {"exit_points": [2]} if switch_key == "exit_points" else switch
    with client_of(None, workers) as client:
        app = client.app
        app.state.engine_client.vllm_config.additional_config = {"adainfer": switch}
        app.state.openai_serving_models = models = ServedAdapters()
        client.portal.call(
            AdaInferEndpoints().init_state,
            app.state.engine_client,
            app.state,
            Namespace(api_key=None),
        )
        client.portal.call(models.unload_lora_adapter, SimpleNamespace(lora_name=name))
        client.portal.call(models.unload_lora_adapter, SimpleNamespace(lora_name=name))
    assert workers.calls == [[("adainfer_drop_policy", number) for number in dropped]]
