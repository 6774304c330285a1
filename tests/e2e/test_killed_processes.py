"""``kill -9`` of each process of a server under load: what ends, what is kept, and who restarts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest

from benchmarks.common.server import Server, serving
from tests.e2e.test_serve import FLAGS, environment, post
from tests.tiny import tiny_config
from tests.waiting import wait_for
from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.table import RECURS

pytestmark = pytest.mark.full  # each case starts servers of its own

CLIENTS = 8
ENOUGH = 8 * RECURS  # answers, after which the kind of the requests is recorded
END_SECONDS = 60  # in which no process is left


class Load:
    """Clients that ask for a label until they get no answer.

    Attributes:
        answered: the ids of requests that were answered with 200.
        failed: the status of each other answer; None where there was none.

    """

    def __init__(self, server: Server, labels: list[int], name: str) -> None:
        self.answered: list[str] = []
        self.failed: list[int | None] = []
        self._server, self._labels, self._name = server, labels, name
        self._over = Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._ask, number) for number in range(CLIENTS)]
            try:
                yield
            finally:
                self._over.set()
        for client in clients:
            client.result()

    def wait_for(self, answers: int) -> None:
        wait_for(lambda: len(self.answered) >= answers or self.failed, 120)

    def _ask(self, client: int) -> None:
        number = 0
        while not self._over.is_set() and not self.failed:
            number += 1
            body = {
                "model": "model",
                "prompt": [5 + client, *range(5, 5 + number % 90)],
                "max_tokens": 1,
                "temperature": 0,
                "allowed_token_ids": self._labels,
                "request_id": f"{self._name}-{client}-{number}",
            }
            try:
                status, answer = post(self._server, "/v1/completions", body)
            except (OSError, HTTPException, json.JSONDecodeError):  # it may die amid an answer
                self.failed.append(None)
            else:
                if status == 200:
                    self.answered.append(
                        f"{answer['id']}-0"
                    )  # of the first prompt, as the engine names it
                else:
                    self.failed.append(status)


class Place:
    """Everything that a server leaves on the disk."""

    def __init__(self, root: Path, model: Path) -> None:
        self.auto = AutoDirectory(root / "auto")
        self.audit, self.capture = root / "audit", root / "capture"
        self._root, self._model = root, model

    @contextmanager
    def serving(self, log: str) -> Iterator[Server]:
        switch = {
            "auto": {"directory": str(self.auto.root)},
            "audit": {"directory": str(self.audit)},
            "capture": {"directory": str(self.capture), "rate": 1, "limit": 20_000},
            "min_rows_saved": 1,
        }
        with serving(str(self._model), switch, self._root / log, FLAGS, environment()) as server:
            yield server

    def audited(self) -> list[str]:
        return [line["request"] for line in lines_in(self.audit)]

    def captured(self) -> list[str]:
        return [line["custom_id"] for line in lines_in(self.capture)]

    def in_ledgers(self) -> int:
        ledgers = [read_json(path) for path in self.auto.root.glob("*/ledger.json")]
        return sum(ledger["requests"] for ledger in ledgers)


def lines_in(directory: Path) -> list[dict[str, Any]]:
    text = "".join(path.read_text() for path in sorted(directory.iterdir()))
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Place:
    return Place(tmp_path, tiny_model)


@pytest.fixture
def labels(tiny_model: Path) -> list[int]:
    return list(tiny_config(tiny_model).label_ids)


def processes(server: Server) -> list[psutil.Process]:
    """The front process, and all that were started for it."""
    front = psutil.Process(server.process.pid)
    return [front, *front.children(recursive=True)]


def wait_for_end(found: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(found, END_SECONDS)
    assert not left, [(process.pid, process.cmdline()) for process in left]


def test_a_server_restarted_at_once_after_its_front_was_killed_serves_and_has_lost_nothing(
    place, labels
):
    with place.serving("log") as server:
        load = Load(server, labels, "before")
        with load.running():
            load.wait_for(ENOUGH)
            left = processes(server)
            server.process.kill()
            server.process.wait()
        with place.serving("log-2") as again:
            wait_for_end(left)
            found = place.audited(), place.captured()
            for ids in found:
                assert len(ids) == len(set(ids))
                assert set(load.answered) <= set(ids), "an answer that was given"
            known = place.in_ledgers()
            assert ENOUGH / 2 < known <= len(found[0])
            after = Load(again, labels, "after")
            with after.running():
                after.wait_for(ENOUGH)
                everyone = processes(again)
            wait_for(lambda: place.in_ledgers() > known)  # they are written once a second
        assert not after.failed
    wait_for_end(everyone)
    assert set(after.answered) <= set(place.audited())
    assert set(after.answered) <= set(place.captured())


@pytest.mark.parametrize("process", ["VLLM::EngineCore", "VLLM::Worker"])
def test_a_server_whose_engine_or_worker_is_killed_answers_500_and_503_and_exits_with_0(
    place, labels, process
):
    with place.serving("log") as server:
        load = Load(server, labels, "killed")
        with load.running():
            load.wait_for(ENOUGH)
            everyone = processes(server)
            [victim] = [one for one in everyone if process in " ".join(one.cmdline())]
            victim.kill()
            assert server.process.wait(END_SECONDS) == 0
        wait_for_end(everyone)
        assert load.failed
        assert set(load.failed) <= {None, 500, 503}
        assert set(load.answered) <= set(place.captured())
