"""Run the steps of a script as the engine will run those of clients: by vLLM's own runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, TypeAlias

import torch
from torch import Tensor
from vllm.v1.request import Request

from vllm_adainfer.engine.compat.warm_up import blocks_for, ended, params_for_warm_up, scheduled
from vllm_adainfer.engine.model.batch import Execution
from vllm_adainfer.engine.runner.build_loop import kv_policy_of
from vllm_adainfer.engine.runner.ranks import read_from_rank0
from vllm_adainfer.engine.self_test.scripted_requests import (
    NotingLoop,
    Script,
    ScriptedExits,
    ScriptedRequests,
    StockLoop,
)
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.policy.policy_set import PolicySet

# By request, token and exit point: the state that the token is read from, fp32 [head size].
Token: TypeAlias = tuple[int, int, int]
States: TypeAlias = dict[Token, Tensor]
NAME = "self-test"


class Rows(Enum):
    """Which layers the rows of a run take.

    Attributes:
        AS_SERVED: rows leave as the script says.
        IN_FULL: all layers, in segments; the states at every exit point are told.
        STOCK: all layers, by vLLM's own model, without segments.

    """

    AS_SERVED = auto()
    IN_FULL = auto()
    STOCK = auto()


class ScriptedSteps:
    """Runs scripts on a Model Runner V2 that has captured its graphs and serves nobody yet."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._model = runner.model
        self._graphs = runner.model.graphs
        self._runs = 0

    def capacity(self, tokens: int) -> int:
        """How many requests of `tokens` fit into the KV cache."""
        blocks = sum(blocks_for(self._runner, tokens))
        return int((self._runner.kv_cache_config.num_blocks - 1) // max(blocks, 1))

    @torch.inference_mode()
    def run(self, script: Script, execution: Execution, rows: Rows = Rows.AS_SERVED) -> States:
        """The state that each token of `script` is read from."""
        self._runs += 1
        runner = self._runner
        ids = [f"{NAME}-{self._runs}-{place}" for place in range(len(script.prompts))]
        tables = self._tables(script)
        states: States = {}
        with self._following(script, ids, execution, rows) as loop:
            for step in range(script.tokens):
                new, going_on, lengths, tokens = [], [], {}, []
                for place, prompt in enumerate(script.prompts):
                    token = step - script.arrives[place]
                    if token < 0:
                        continue
                    tokens.append((place, token))
                    if token == 0:
                        params = params_for_warm_up(runner, script.answers[place], script.tokens)
                        new.append((Request(ids[place], list(prompt), *params), tables[place]))
                        lengths[ids[place]] = len(prompt)
                    else:
                        going_on.append((ids[place], len(prompt) + token - 1, token))
                        lengths[ids[place]] = 1
                if not lengths:
                    continue
                runner.execute_model(scheduled(new, going_on, lengths))
                if runner.is_pooling_model:
                    runner.pool()
                else:
                    runner.sample_tokens(None)
                for place, token in tokens:
                    for exit_index, state in loop.noted[ids[place]].items():
                        states[place, token, exit_index] = state
        return states

    def _clear_kv_cache(self) -> None:
        """Leave it as vLLM allocates it: what a run writes may be wrong, or not a number."""
        for cache in self._runner.kv_caches:
            cache.zero_()

    def _tables(self, script: Script) -> list[tuple[list[int], ...]]:
        """The blocks of each request, by KV cache group."""
        longest = max(map(len, script.prompts)) + script.tokens
        counts = blocks_for(self._runner, longest)
        total = sum(counts)
        tables = []
        for place in range(len(script.prompts)):
            first = 1 + place * total  # block 0 is vLLM's null block
            table = []
            for count in counts:
                table.append(list(range(first, first + count)))
                first += count
            tables.append(tuple(table))
        return tables

    @contextmanager
    def _following(
        self, script: Script, ids: list[str], execution: Execution, rows: Rows
    ) -> Iterator[NotingLoop]:
        """Let the model run the script, with a loop of its own, and run it in this way."""
        model, state = self._model, self._runner.model_state
        names = "loop", "graphs", "execution", "exits_off"
        before = {name: getattr(model, name) for name in names}
        running, exits = state.running, model.loop.policies.exit_points
        head_size = model.stack.shape.head_size
        policy = ScriptedExits(exits, head_size)
        loop = ExitLoop(
            model.stack.shape,
            PolicySet({NAME: policy}, exits),
            kv_policy_of(self._runner.vllm_config),
            {},
            max_rows=self._runner.max_num_tokens,
            compaction_cost=0,  # all that can leave does
            read=read_from_rank0,
        )
        runs: dict[Rows, ExitLoop | StockLoop | None] = {
            Rows.AS_SERVED: loop,
            Rows.IN_FULL: None,
            Rows.STOCK: StockLoop(model),
        }
        noting = NotingLoop(runs[rows], len(model.stack.segments), head_size)
        state.running = ScriptedRequests(running, self._runner.vllm_config, script, loop)
        model.loop, model.execution, model.exits_off = noting, execution, False
        model.graphs = self._graphs if execution is Execution.SEGMENT_GRAPHS else None
        self._runner.kv_connector.set_disabled(True)
        try:
            yield noting
        finally:
            self._runner.execute_model(ended(ids))
            self._clear_kv_cache()
            self._runner.kv_connector.set_disabled(False)
            state.running = running
            for name, value in before.items():
                setattr(model, name, value)
