"""Requests and a loop that follow a script, in place of those that serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.forward_context import override_forward_context

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.engine.admission.running import Running
from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.exits.batch.batch import Batch
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.loop import StepOutput
from vllm_adainfer.exits.loop.step import FULL_DEPTH, StepContext
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows

# Of prompts; the last comes while the others are generating.
LENGTHS = (3, 20, 17, 1, 9, 6)
TOKENS = 6  # that each request generates, but those of a pooling model


@dataclass(frozen=True)
class Script:
    """The tokens of each request, and where they exit.

    Attributes:
        prompts: the tokens of each prompt.
        answers: [requests], the token that each request is made to generate, again and again.
        arrives: [requests], the step in which each prompt runs.
        exits: [requests, tokens], the exit point (an index) of each generated token, or
            `FULL_DEPTH`.

    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    arrives: tuple[int, ...]
    exits: Ints

    @classmethod
    def drawn(
        cls, exit_points: int, vocabulary: int, max_requests: int, max_rows: int, tokens: int
    ) -> Script:
        """Random tokens and exits, the same at each start; each request generates `tokens`.

        The first request never exits, the second does at the first exit point. Now and then no
        token exits: deferred rows rejoin, and the next step has one row for each request.
        """
        generator = np.random.default_rng(0)
        lengths = [length for length in LENGTHS[:max_requests] if length < max_rows / 2]
        prompts = [tuple(generator.integers(vocabulary, size=n).tolist()) for n in lengths]
        exits = generator.integers(FULL_DEPTH, exit_points, (len(lengths), tokens))
        exits[0], exits[1:2] = FULL_DEPTH, 0
        if tokens > 1:
            exits[:, 2:4] = exits[:, -1] = FULL_DEPTH
        return cls(
            prompts=tuple(prompts),
            answers=tuple(generator.integers(vocabulary, size=len(lengths)).tolist()),
            arrives=(*[0] * (len(lengths) - 1), min(2, tokens - 1)),
            exits=exits,
        )

    @property
    def tokens(self) -> int:
        """How many tokens each request generates, if it comes in the first step."""
        return self.exits.shape[1]

    @property
    def never_exiting(self) -> Script:
        """The same requests, all at full depth."""
        return replace(self, exits=np.full_like(self.exits, FULL_DEPTH))

    def only(self, requests: list[int]) -> Script:
        """These requests alone."""
        return Script(
            tuple(self.prompts[request] for request in requests),
            tuple(self.answers[request] for request in requests),
            tuple(self.arrives[request] for request in requests),
            self.exits[requests],
        )


class ScriptedExits(ExitPolicy):
    """Settles a request at the exit point that is its threshold row; answers with its state."""

    def __init__(self, exit_points: tuple[int, ...], head_size: int) -> None:
        """`head_size` is the width of the LM head's input; wider states are cut off."""
        self.exit_points = exit_points
        self.num_threshold_rows = len(exit_points)
        self.probe_inputs = (ProbeInput.LAST_TOKEN,) * len(exit_points)
        self._head_size = head_size

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        states = rows.hidden[:, : self._head_size]
        return Decision(rows.threshold_rows <= exit_index, Answers(states))


@dataclass
class StockLoop:
    """Runs steps by vLLM's own model, which knows of no segments."""

    model: EarlyExit

    def run(self, batch: Any, input_ids: Tensor, step: StepContext) -> StepOutput:
        """Run one step; `batch` has its positions, and the forward context for all its rows."""
        stock: Any = super(EarlyExit, self.model)
        with override_forward_context(batch.context):
            return StepOutput(stock.forward(input_ids, batch.positions))


@dataclass
class NotingLoop:
    """Runs steps, and notes the states that tokens are read from.

    Attributes:
        loop: runs them; None to run all layers for all rows.
        segments: the number of the stack's segments.
        head_size: the width of the LM head's input.
        noted: of the last step, by request and exit point (an index; `FULL_DEPTH` for the last
            layer), the state that its next token is read from, fp32 [head size], on the host: one
            state, or that of each exit point if all ran all layers.

    """

    loop: ExitLoop | StockLoop | None
    segments: int
    head_size: int
    noted: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def run(self, batch: Batch, input_ids: Tensor, step: StepContext) -> StepOutput:
        """Run one step, as `Loop.run`."""
        [rows] = step.on_device(step.layout.last_rows(step.layout.present))
        if self.loop is None:
            states, read = HiddenStates(input_ids), {}
            for segment in range(self.segments):
                states = batch.run(segment, states)
                after = states.rows(rows).combined()[:, : self.head_size]
                read[segment] = after.float().cpu()
            read[FULL_DEPTH] = read.pop(self.segments - 1)
            self.noted = {
                request_id: {exit_index: after[place] for exit_index, after in read.items()}
                for place, request_id in enumerate(step.request_ids)
            }
            return StepOutput(states.hidden)
        output = self.loop.run(batch, input_ids, step)
        final = output.hidden.index_select(0, rows).float().cpu()
        exited = np.full(step.num_requests, FULL_DEPTH)
        exited[step.exited] = step.threshold_rows[step.exited]
        self.noted = {
            request_id: {exit_index: final[place]}
            for place, (request_id, exit_index) in enumerate(
                zip(step.request_ids, exited.tolist(), strict=True)
            )
        }
        return output


class ScriptedRequests(RunningRequests):
    """The requests of a script, which says for each token where it exits."""

    def __init__(
        self, serving: RunningRequests, vllm_config: VllmConfig, script: Script, loop: ExitLoop
    ) -> None:
        """Follow `script` in place of `serving`, the requests of clients."""
        super().__init__(vllm_config, loop, serving.admission)
        self.window = serving.window
        self._script = script
        self._scripted: dict[str, int] = {}

    @override
    def add(self, new: Any) -> None:
        script = self._script
        place = self._scripted[new.req_id] = int(new.req_id.rpartition("-")[2])
        most = script.tokens - script.arrives[place]
        self._put(new.req_id, Running(prompt=script.prompts[place], max_tokens=most))

    @override
    def describe(
        self, request_ids: Sequence[str], query_lens: Ints, computed: Ints, *rest: Any, **more: Any
    ) -> StepContext:
        script = self._script
        for request_id, length in zip(request_ids, computed + query_lens, strict=True):
            place = self._scripted[request_id]
            row = script.exits[place, length - len(script.prompts[place])]
            self._put(request_id, self._requests[request_id].changed(threshold_row=int(row)))
        return super().describe(request_ids, query_lens, computed, *rest, **more)
