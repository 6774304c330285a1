"""Comparisons are counted before answers leave and before the next step; no device stops for it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_adainfer.engine.compat.runner import before_answers_leave
from vllm_adainfer.engine.runner.judgements import Judgements
from vllm_adainfer.exits.loop.shadow import Judgement


class Copy:
    """A result that arrives when its device has come so far."""

    has_arrived = False


class Server:
    """Steps whose answers leave later; all that happens, in order."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.results: list[Copy] = []
        self.pending: list[Judgement] = []
        self.loop: Any = SimpleNamespace(
            take_judgements=self.take, take_misses=dict, tighten=lambda closed: None
        )
        self.kinds: Any = SimpleNamespace(
            take_decided=lambda: {"kind": (len(self.results), 0)},
            step_ended=lambda decided, misses: self.happened.append(f"ledger {decided['kind'][0]}"),
            closed=[],
        )
        self.judgements = Judgements(self.loop)

    def take(self) -> list[Judgement]:
        taken, self.pending = self.pending, []
        return taken

    def judge(self, last: int | None = None) -> None:
        self.judgements.judge(self.kinds, last)

    def step(self) -> None:
        """Run one, whose comparison is still on its way to the host."""
        number = len(self.results) + 1
        self.results.append(Copy())
        happened = partial(self.happened.append, f"compared {number}")
        self.pending.append(Judgement([self.results[-1]], happened))  # type: ignore[list-item]
        self.judgements.step_ended(self.kinds)


@pytest.fixture
def server() -> Server:
    return Server()


def test_a_step_goes_on_while_its_comparisons_are_on_their_way(server):
    server.step()
    assert not server.judgements.has_arrived
    assert server.happened == []
    server.results[0].has_arrived = True
    assert server.judgements.has_arrived


def test_steps_are_counted_once_and_in_their_order(server):
    server.step()
    server.step()
    server.judge()
    server.judge()
    assert server.happened == ["compared 1", "ledger 1", "compared 2", "ledger 2"]


def test_answers_leave_once_their_own_step_is_counted_and_wait_for_no_later_one(server):
    def get_output() -> str:
        server.happened.append("answers leave")
        return "answers"

    output = SimpleNamespace(get_output=get_output)
    server.step()
    before_answers_leave(output, lambda: server.judge(1))
    server.step()
    assert output.get_output() == "answers"
    assert server.happened == ["compared 1", "ledger 1", "answers leave"]


def test_where_answers_are_there_already_their_step_is_counted_at_once(server):
    server.step()
    before_answers_leave(SimpleNamespace(), lambda: server.judge(1))
    assert server.happened == ["compared 1", "ledger 1"]
