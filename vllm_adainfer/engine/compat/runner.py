"""Model runners, their sampler, and what they send back to the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import Tensor

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def cpu_runner_class(runner: type) -> Iterator[None]:
    """Let `CPUWorker.init_device` build `runner`; vLLM 0.32 hard-codes `CPUModelRunner` there."""
    from vllm.v1.worker import cpu_worker

    with mock.patch.object(cpu_worker, "CPUModelRunner", runner):
        yield


def keep_best_tokens(runner: Any) -> None:
    """Let ``logprobs`` requests keep their best tokens in steps with ``logprob_token_ids``.

    vLLM 0.32's V1 `Sampler.forward` drops what it gathered for the former if a step has one of the
    latter (vLLM pull request 51789; V2 keeps both). So the best tokens of every row without ids of
    its own are gathered by id, too. This affects only this runner's sampler, and only such steps.
    """
    gather = runner.sampler.gather_specific_token_logprobs

    def gather_both(logprobs: Tensor, ids_by_row: dict[int, list[int]], sampled: Tensor) -> Any:
        most = runner.input_batch.sampling_metadata.max_num_logprobs
        if most is not None:
            best = logprobs.topk(most).indices.tolist()
            ids_by_row = {**dict(enumerate(best)), **ids_by_row}
        return gather(logprobs, ids_by_row, sampled)

    runner.sampler.gather_specific_token_logprobs = gather_both


@contextmanager
def seeds_of_chunks_kept(runner: Any) -> Iterator[None]:
    """While the V1 `runner` samples, set aside the generators of incomplete prompts.

    vLLM 0.32 discards the token drawn for such a row, and rewinds the row's generator by an offset
    that CPU generators lack: one request with a ``seed`` and a prompt of several chunks crashes a
    stock server. A generator that is set aside draws nothing, as if it had been rewound.
    """
    generators, batch = runner.input_batch.generators, runner.input_batch
    incomplete = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    kept = {place: generators.pop(place) for place in incomplete if place in generators}
    try:
        yield
    finally:
        generators.update(kept)


def attach_note(output: Any, content: Any) -> None:
    """Send `content` from the worker to the scheduler, in a `ModelRunnerOutput`.

    vLLM 0.32 has no field for plugins there, but pickles the object with any extra attribute. V2
    wraps it in an `AsyncOutput`, which passes it on once the tokens are known.
    """
    getattr(output, "model_runner_output", output).adainfer = content


def before_answers_leave(output: Any, task: Callable[[], None]) -> None:
    """Run `task` before a step's answers leave this worker.

    Where vLLM 0.32 schedules asynchronously, its output is an `AsyncModelRunnerOutput`: a thread
    beside the steps waits in ``get_output`` for the answers. Elsewhere they are there already.
    """
    get_output = getattr(output, "get_output", None)
    if get_output is None:
        task()
        return

    def judged() -> Any:
        task()
        return get_output()

    output.get_output = judged


def attached_note(output: Any) -> Any:
    """The content that `attach_note` sent; None if the worker ran no step."""
    return getattr(output, "adainfer", None)


def broadcast(ranks: Any, values: Tensor) -> Tensor:
    """The first rank's `values` on every rank of a vLLM group with several.

    `GroupCoordinator.broadcast` of vLLM 0.32 goes through torch's own NCCL communicator, a second
    one that would be made at the first exit. Its device communicator has the one that vLLM uses in
    the model. A CPU has none; where NCCL is off or missing (`VLLM_DISABLE_PYNCCL`), there is one
    that is disabled, by which that communicator refuses to broadcast.
    """
    communicator = ranks.device_communicator
    nccl = getattr(communicator, "pynccl_comm", None)
    if nccl is None or nccl.disabled:
        sent: Tensor = ranks.broadcast(values)
        return sent
    received: Tensor = communicator.broadcast(values)
    return received
