"""Exit decisions by script: each request says at which exit point it is settled."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.requested_output import wants_prompt_logprobs
from vllm_adainfer.engine.admission.running import UNLIMITED, Running
from vllm_adainfer.exits.kv.policies import ExactKV, RecurrentKV
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.settings.engine import DEFAULT_POLICY

EXIT_AT = "exit_at"
FULL = -1


class ScriptedAdmission(Admission):
    """A request's threshold row is the exit point (an index) its extra_args ask for."""

    saving: tuple[str, float] | None = None

    def __init__(self) -> None:
        self.is_recording = self.has_pools = self.has_pooled = self.has_students = False
        self.has_choices = self.may_serve_choices = self.any_stand = self.has_objects = False
        self.arrival: Any = self

    def resolve(
        self,
        request_id: str,
        params: Any,
        adapter: Any = None,
        resumable: bool = False,
        prompt: Sequence[int] = (),
    ) -> Running:
        arguments = params.extra_args or {}
        tag = arguments.get(EXIT_AT, FULL) if arguments.get("adainfer", 1) else FULL
        return Running(
            threshold_row=tag,
            max_tokens=params.max_tokens or UNLIMITED,
            wants_prompt_logprobs=wants_prompt_logprobs(params),
            may_exit=tag != FULL,
            saving=self.saving,
            is_shadow=self.is_shadow(request_id),
        )

    def admit(
        self,
        request: Running,
        prompt: Sequence[int],
        adapter: Any = None,
        fingerprint: str | None = None,
    ) -> Running:
        return replace(request, prompt=prompt, adapter=adapter)

    def is_shadow(self, request_id: str) -> bool:
        return False


class ScriptedPolicy(ExitPolicy):
    """Settles a request at its exit point; the answer is the logit lens there."""

    def __init__(self, exit_points: tuple[int, ...], lens: Probe) -> None:
        self.exit_points = exit_points
        self.num_threshold_rows = len(exit_points)
        self.probe_inputs = (ProbeInput.LAST_TOKEN,) * len(exit_points)
        self.lens = lens

    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        return Decision(rows.threshold_rows == exit_index, Answers(self.lens.readout(rows.hidden)))


def only(policy: Any) -> PolicySet:
    """A set of one policy."""
    return PolicySet({DEFAULT_POLICY: policy})


def parts(llm: Any) -> tuple[Any, Any, Any]:
    """Model, runner and scheduler of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    return runner.model, runner, core.scheduler


def running_of(runner: Any) -> Any:
    """The `RunningRequests` of Model Runner V1 or V2."""
    return getattr(runner, "model_state", runner).running


def exact_kv(loop: Any, capacity: int = 1 << 30) -> ExactKV:
    """A policy of the kind that the model needs for `exact`, with no rows."""
    return RecurrentKV(capacity) if isinstance(loop.kv, RecurrentKV) else ExactKV(capacity)


@contextmanager
def scripted(llm: Any, min_rows_saved: int | None = 1) -> Iterator[Any]:
    """Let the requests' scripts decide; yields the engine's `ExitStats`, starting at zero."""
    model, runner, scheduler = parts(llm)
    loop = model.loop
    names = "policies", "accounting", "stats", "kv", "_min_rows_saved"
    saved = {name: getattr(loop, name) for name in names}
    running = running_of(runner)
    admission = running.admission, scheduler.admission
    lens = model.logit_lens()
    loop.policies = only(ScriptedPolicy(loop.policies.exit_points, lens))
    loop.reset_counters()
    loop.kv = exact_kv(loop)
    loop._min_rows_saved = min_rows_saved
    running.admission = scheduler.admission = ScriptedAdmission()
    llm.reset_prefix_cache()
    try:
        yield loop.stats
    finally:
        for name, value in saved.items():
            setattr(loop, name, value)
        running.admission, scheduler.admission = admission
        torch.manual_seed(0)


@dataclass(frozen=True)
class Ran:
    """A request's part of a step: `rows` rows from position `first` on, through `layers`.

    `sampled` says whether the last one yielded a token, `state` [hidden size], normed, is what the
    LM head reads of it.
    """

    first: int
    rows: int
    layers: int
    sampled: bool
    state: Tensor

    @property
    def last(self) -> int:
        """Position of its last row."""
        return self.first + self.rows - 1


def drawn_exit(seed: int, position: int, exit_points: int) -> int:
    """The exit point (an index) drawn for a position, `FULL` for full depth."""
    return zlib.crc32(f"{seed} {position}".encode()) % (exit_points + 1) - 1


@contextmanager
def drawn(
    llm: Any,
    min_rows_saved: int | None = 1,
    capacity: int = 1 << 30,
    draw: Callable[[int, int, int], int] = drawn_exit,
) -> Iterator[dict[str, list[Ran]]]:
    """Draw an exit point for each token; a request's `EXIT_AT` is the seed for that.

    Yields, by a request's id as the client knows it, what it ran.
    """
    model, _, _ = parts(llm)
    loop = model.loop
    ran: dict[str, list[Ran]] = {}
    with scripted(llm, min_rows_saved):
        exit_points, run = loop.policies.exit_points, loop.run
        depth = model.stack.shape.depth
        loop.kv = exact_kv(loop, capacity)

        def noting(batch: Any, input_ids: Tensor, step: Any) -> Any:
            came, seeds = step.layout, step.threshold_rows.copy()
            step.threshold_rows[:] = FULL
            for place in step.undecided():
                position = int(came.last_positions[place])
                step.threshold_rows[place] = draw(seeds[place], position, len(exit_points))
            output = run(batch, input_ids, step)
            left = set(step.exited.tolist())
            for place, request_id in enumerate(step.request_ids):
                rows, last = int(came.query_lens[place]), int(came.ends[place]) - 1
                ran.setdefault(request_id.split("-")[0], []).append(
                    Ran(
                        first=int(came.last_positions[place]) - rows + 1,
                        rows=rows,
                        layers=exit_points[step.threshold_rows[place]] if place in left else depth,
                        sampled=bool(step.sampled_rows()[last]),
                        state=output.hidden[last].cpu().clone(),
                    )
                )
            return output

        loop.run = noting
        try:
            yield ran
        finally:
            del loop.run
