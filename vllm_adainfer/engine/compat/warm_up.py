"""The end of vLLM's warm-up, and steps of requests that no scheduler has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object


class WarmedUp(_Worker):
    """Mixin that calls `warmed_up` once vLLM has warmed up and captured its graphs.

    Kernels may still compile there: vLLM 0.32 watches for that only from
    `Worker._maybe_activate_jit_monitor` on, and has no hook before it.
    """

    def warmed_up(self) -> None:
        """Everything of vLLM's is ready; no request has come."""
        raise NotImplementedError

    @override
    def _maybe_activate_jit_monitor(self) -> None:
        self.warmed_up()
        super()._maybe_activate_jit_monitor()


_expected = local()  # to each thread


@contextmanager
def compiling_is_expected() -> Iterator[None]:
    """Let this thread compile Triton kernels though vLLM watches for that.

    vLLM 0.32's `jit_monitor` knows no exceptions: with ``--jit-monitor-mode error`` a kernel that
    is compiled for the policies of later steps, in a thread beside them, would be an error.
    """
    from triton import knobs

    hook = knobs.runtime.jit_post_compile_hook
    if hook is not None and not getattr(hook, "asks_adainfer", False):

        def watched(**event: Any) -> Any:
            return None if getattr(_expected, "here", False) else hook(**event)

        watched.asks_adainfer = True  # type: ignore[attr-defined]
        knobs.runtime.jit_post_compile_hook = watched
    _expected.here = True
    try:
        yield
    finally:
        _expected.here = False


def params_for_warm_up(runner: Any, token: int, tokens: int) -> tuple[Any, Any]:
    """Sampling and pooling parameters (one is None) of a request that generates only `token`.

    As vLLM 0.32's `warmup_kernels` makes them.
    """
    from vllm import PoolingParams, SamplingParams

    if runner.is_pooling_model:
        task = runner.model_config.get_pooling_task(runner.get_supported_tasks())
        pooling = PoolingParams(task=task)
        pooling.verify(runner.model_config)
        return None, pooling
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, allowed_token_ids=[token]
    )
    return sampling, None


def blocks_for(runner: Any, tokens: int) -> list[int]:
    """How many cache blocks a request of `tokens` needs, by KV cache group.

    As vLLM 0.32's `_warmup_block_counter` counts them for its own warm-up.
    """
    from vllm.v1.worker.gpu.warmup import _warmup_block_counter

    count = _warmup_block_counter(runner)
    return [count(tokens, group.kv_cache_spec) for group in runner.kv_cache_config.kv_cache_groups]


def scheduled(
    new: Sequence[Any], going_on: Sequence[tuple[str, int, int]], rows: dict[str, int]
) -> SchedulerOutput:
    """A step, as vLLM 0.32's scheduler describes it to a worker.

    `new` has the requests that come, each with its blocks by KV cache group; `going_on` the id of
    each other one, and how many tokens it has computed and generated; `rows` the rows of each, by
    id.
    """
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [
        NewRequestData.from_request(
            request, block_ids=blocks, prefill_token_ids=request.prompt_token_ids
        )
        for request, blocks in new
    ]
    cached = CachedRequestData.make_empty()
    for request_id, computed, generated in going_on:
        cached.req_ids.append(request_id)
        cached.num_computed_tokens.append(computed)
        cached.num_output_tokens.append(generated)
        cached.new_block_ids.append(None)
    output.scheduled_cached_reqs = cached
    output.num_scheduled_tokens = rows
    output.total_num_scheduled_tokens = sum(rows.values())
    return output


def ended(request_ids: Sequence[str]) -> SchedulerOutput:
    """An empty step in which these requests have ended."""
    from vllm.v1.core.sched.output import SchedulerOutput

    output = SchedulerOutput.make_empty()
    output.finished_req_ids = set(request_ids)
    return output
