"""Exit decisions by script: each request says at which exit point it is settled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_adainfer.decision.policy import Decision
from vllm_adainfer.decision.probe import Probe

EXIT_AT = "exit_at"


class ScriptedAdmission:
    """A request's tag is the exit point (an index) its extra_args ask for."""

    records = False

    def tag(self, params: Any) -> int:
        arguments = params.extra_args or {}
        return int(arguments.get(EXIT_AT, -1)) if arguments.get("adainfer", 1) else -1

    def is_shadow(self, request_id: str) -> bool:
        return False


class ScriptedPolicy:
    """Settles a request at its exit point; the answer is the logit lens there."""

    label_ids = None

    def __init__(self, exit_points: tuple[int, ...], lens: Probe) -> None:
        self.exit_points = exit_points
        self.lens = lens

    def decide(
        self, exit_index: int, hidden: Tensor, tags: Tensor, memory: Tensor | None
    ) -> Decision:
        return Decision(tags == exit_index, self.lens.readout(hidden))


def parts(llm: Any) -> tuple[Any, Any, Any]:
    """Model, runner and scheduler of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    return runner.model, runner, core.scheduler


@contextmanager
def scripted(llm: Any, min_rows_saved: int | None = 1) -> Iterator[Any]:
    """Let the requests' scripts decide; yields the engine's `ExitStats`, starting at zero."""
    model, runner, scheduler = parts(llm)
    loop = model.model.exit_loop
    saved = loop.policy, loop.stats, loop._min_rows_saved, runner.admission, scheduler.admission
    lens = Probe(
        head_weight=model.head_weight,
        norm_weight=model.model.norm.weight.data,
        norm_eps=model.config.rms_norm_eps,
    )
    loop.policy = ScriptedPolicy(saved[0].exit_points, lens)
    loop.stats = type(saved[1])()
    loop._min_rows_saved = min_rows_saved
    runner.admission = scheduler.admission = ScriptedAdmission()
    llm.reset_prefix_cache()
    try:
        yield loop.stats
    finally:
        (
            loop.policy,
            loop.stats,
            loop._min_rows_saved,
            runner.admission,
            scheduler.admission,
        ) = saved
        torch.manual_seed(0)
