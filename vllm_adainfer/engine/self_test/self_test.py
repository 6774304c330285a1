"""Check the fast paths against a plain reference at start-up, and disable those that fail.

The reference runs every layer for every row, neither compiled nor captured, with vLLM's metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import adainfer_kernels
import torch
from torch import Tensor
from vllm.config import CompilationMode, CUDAGraphMode

from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.model.batch import Execution
from vllm_adainfer.engine.runner.ranks import first_on_any_rank
from vllm_adainfer.engine.self_test.kernels import wrong_kernels
from vllm_adainfer.engine.self_test.parts import Part
from vllm_adainfer.engine.self_test.scripted_requests import TOKENS, Script
from vllm_adainfer.engine.self_test.scripted_steps import Rows, ScriptedSteps, States
from vllm_adainfer.errors import AdaInferError

logger = get_logger(__name__)

TESTED: dict[Execution, Part] = {
    Execution.SEGMENT_GRAPHS: "segment_graphs",
    Execution.VLLM_GRAPHS: "vllm_graphs",
    Execution.COMPILED: "compiled_code",
}
# Relative to the norm of a state. Rounding in another order moves states of 16 bits by about 1 %;
# where it decides between experts, by more, as two batches of the same requests show.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_16_BITS = 0.05
NOISE = 5  # times what two batches of other sizes differ by at full depth
MOST = 0.5


@dataclass(frozen=True)
class Failure:
    """A fast path whose results differ from the reference, and what is done now."""

    part: Part
    why: str
    instead: str

    def __str__(self) -> str:
        """One sentence for the log."""
        name = self.part.replace("_", " ").replace("vllm", "vLLM's")
        return f"{name} ({self.why}): {self.instead}"


@dataclass(frozen=True)
class Outcome:
    """What a self-test has found.

    Attributes:
        failures: the parts that failed.
        not_tested: why the layers could not be tested; empty if they were.

    """

    failures: tuple[Failure, ...] = ()
    not_tested: str = ""

    @property
    def passed(self) -> bool:
        """Whether all was tested, and nothing failed."""
        return not self.failures and not self.not_tested


class WrongAtFullDepth(AdaInferError):
    """Not even all layers for all rows are right, so that nothing can replace them."""


def self_test(runner: Any) -> Outcome:
    """Test a Model Runner V2 that is ready to serve; say which parts fail, and replace them.

    A collective: every rank must call it, and all ranks replace the same. `WrongAtFullDepth` if the
    engine must not serve.
    """
    model, failures, not_tested = runner.model, [], ""
    states = torch.empty(
        runner.max_num_reqs, model.hidden_size, dtype=runner.dtype, device=model.device
    )
    try:
        why = wrong_kernels(model.loop.policies, states)
    except Exception as error:  # such as of Triton's compiler
        why = _named(error)
    why = first_on_any_rank(why)
    if why is not None:
        adainfer_kernels.use_torch()
        failures.append(Failure("kernels", why, "probes run in torch"))
    try:
        layers = _test_steps(runner)
        failures += layers.failures
        not_tested = layers.not_tested
    except WrongAtFullDepth:
        raise
    except Exception as error:  # nothing is known then
        failures.append(_without_exits(model, f"the test itself failed: {_named(error)}"))
    model.loop.stats.failed_parts = tuple(failure.part for failure in failures)
    model.loop.stats.not_tested = not_tested
    if failures:
        logger.warning(
            "the self-test on this device found wrong results, which are now avoided at the cost "
            "of speed; please report them. %s",
            "; ".join(map(str, failures)),
        )
    if not_tested:
        logger.warning("layers and exits were not tested on this device: %s", not_tested)
    return Outcome(tuple(failures), not_tested)


def _test_steps(runner: Any) -> Outcome:
    """Test the layers, their exits and their graphs."""
    model, steps = runner.model, ScriptedSteps(runner)
    script = Script.drawn(
        exit_points=len(model.loop.policies.exit_points),
        vocabulary=runner.model_config.get_vocab_size(),
        max_requests=min(runner.max_num_reqs, steps.capacity(64)),
        max_rows=min(runner.max_num_tokens, runner.max_model_len),
        tokens=1 if runner.is_pooling_model else TOKENS,
    )
    if len(script.prompts) < 2:
        return Outcome(not_tested="there is no room for two short requests")
    plain = script.never_exiting
    anchor = steps.run(plain, Execution.EAGER, Rows.IN_FULL)
    if first_on_any_rank(_not_numbers(anchor)):
        if not first_on_any_rank(_not_numbers(steps.run(plain, Execution.EAGER, Rows.STOCK))):
            raise WrongAtFullDepth(
                "vllm-adainfer: on this device the layers compute states that are not numbers once "
                "they are cut into segments, and as vLLM runs them they do not: please report this "
                'with the engine\'s log, and serve without the plugin: drop "adainfer" from '
                "additional_config"
            )
        return Outcome(not_tested="the model itself computes states that are not numbers")
    tolerance = _tolerance(steps, script, anchor, runner.dtype)

    def wrong(run: Callable[[], States], right: States) -> str | None:
        """How `run` differs from `right`; None if it does not. The same on all ranks."""
        try:
            why = differences(run(), right, tolerance)
        except Exception as error:  # whatever it is, this cannot serve
            why = _named(error)
        return first_on_any_rank(why)

    failures = []
    right = anchor

    def with_exits() -> States:
        nonlocal right
        right = steps.run(script, Execution.EAGER)
        return right

    why = wrong(partial(steps.run, plain, Execution.EAGER), anchor)
    why = why or wrong(with_exits, anchor)
    if why is not None:
        failures.append(_without_exits(model, why))
    for execution in ways_of(runner):
        rows = Rows.IN_FULL if model.exits_off else Rows.AS_SERVED
        why = wrong(partial(steps.run, plain, execution, rows), anchor)
        if not model.exits_off:
            why = why or wrong(partial(steps.run, script, execution), right)
        model.execution = execution
        if why is None:
            break
        failures.append(Failure(TESTED[execution], why, f"layers run without {execution.value}"))
        model.graphs, model.execution = None, Execution.EAGER
    return Outcome(tuple(failures))


def _not_numbers(states: States) -> str | None:
    """A text if some state is not finite, for `first_on_any_rank`."""
    return None if all(state.isfinite().all() for state in states.values()) else "not numbers"


def _without_exits(model: Any, why: str) -> Failure:
    """Let all requests run all layers, as stock."""
    model.exits_off, model.graphs = True, None
    return Failure("exits", why, "all requests run all layers")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def ways_of(runner: Any) -> list[Execution]:
    """The ways in which this engine can run segments, the one it is configured for first.

    `Execution.EAGER` is not among them: it is what they are compared with.
    """
    compilation = runner.vllm_config.compilation_config
    ways = []
    if runner.model.graphs is not None:
        ways.append(Execution.SEGMENT_GRAPHS)
    if compilation.cudagraph_mode != CUDAGraphMode.NONE:
        ways.append(Execution.VLLM_GRAPHS)
    if compilation.mode != CompilationMode.NONE:
        ways.append(Execution.COMPILED)
    return ways


def differences(found: States, right: States, tolerance: float) -> str | None:
    """How many tokens have another state than is right; None if none has."""
    moved = [_distance(state, right.get(token)) for token, state in found.items()]
    wrong = sum(not move <= tolerance for move in moved)
    if not wrong:
        return None
    return f"{wrong} of {len(moved)} tokens moved by up to {max(moved):.2g} of a state's norm"


def _distance(found: Tensor, right: Tensor | None) -> float:
    if right is None or not found.isfinite().all():
        return float("inf")
    return float((found - right).norm() / right.norm().clamp(min=1e-9))


def _tolerance(steps: ScriptedSteps, script: Script, anchor: States, dtype: torch.dtype) -> float:
    """How far rounding may move a state on this device."""
    plain, requests = script.never_exiting, range(len(script.prompts))
    noise = 0.0
    for part in requests[::2], requests[1::2]:
        places = list(part)
        alone = steps.run(plain.only(places), Execution.EAGER, Rows.IN_FULL)
        for (place, token, exit_index), state in alone.items():
            noise = max(noise, _distance(state, anchor[places[place], token, exit_index]))
    least = TOLERANCE.get(dtype, TOLERANCE_16_BITS)
    return min(max(least, NOISE * noise), MOST)
