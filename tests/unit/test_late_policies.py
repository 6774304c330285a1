"""Policies that come after the start are ready before they decide a step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from adainfer_kernels import backend, pool
from torch import Tensor
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

from tests.tiny import tiny_config, tiny_tensors
from tests.unit.test_pooled_policy import POOLED
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.engine.compat.warm_up import compiling_is_expected
from vllm_adainfer.engine.runner.build_loop import policies_of_artifacts
from vllm_adainfer.engine.self_test import kernels
from vllm_adainfer.engine.worker import warm_up
from vllm_adainfer.engine.worker.served_policies import ServedPolicies
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.promise.label_subsets import ALL

MOST_ROWS, HIDDEN = 40, 64


def specialisation(kernel: InterpretedFunction, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for: dtypes, constants, and integers that are 1 or 16n."""
    bound = inspect.signature(kernel.fn).bind(
        *args, **{n: one for n, one in kwargs.items() if n in kernel.arg_names}
    )
    fixed = kernel.kwargs.get("do_not_specialize") or ()
    key: list[Any] = [kernel.fn.__name__, *sorted((n, kwargs[n]) for n in ("num_warps",))]
    for name, value in bound.arguments.items():
        is_constant = kernel.fn.__annotations__.get(name) in (tl.constexpr, "tl.constexpr")
        if isinstance(value, Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif is_constant or value is None:
            key.append((name, value))
        elif isinstance(value, int) and name not in fixed:
            key.append((name, value == 1, value % 16 == 0))
    return tuple(key)


@pytest.fixture
def compiled(monkeypatch) -> Iterator[set[tuple[Any, ...]]]:
    """The specialisations of our kernels that have been asked for, were it a GPU."""
    found: set[tuple[Any, ...]] = set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("adainfer_kernels"):
            found.add(specialisation(self, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    monkeypatch.setattr(
        backend, "resolve_backend", lambda asked, _: "triton" if asked == "auto" else asked
    )
    return found


def built(model: Any, dtype: torch.dtype, **changes: Any) -> PolicySet:
    config = tiny_config(model, **changes)
    tensors = {name: one.to(dtype) for name, one in tiny_tensors(config).items()}
    served: Any = SimpleNamespace(device=torch.device("cpu"), logit_lens=None)
    return PolicySet(policies_of_artifacts({"new": Artifact(config, tensors)}, served))


def decide(policies: PolicySet, states: Tensor) -> None:
    """Decide a step, as the exit loop asks."""
    rows, wide = len(states), torch.cat([states, states], 1).float()
    for policy in policies.policies:
        for exit_index, read in enumerate(policy.probe_inputs):
            policy.decide(
                exit_index,
                UndecidedRows(
                    wide if read is ProbeInput.PROMPT else states,
                    torch.zeros(rows, dtype=torch.int64),
                    None,
                    torch.full((rows,), ALL),
                    (),
                    np.ones(rows, dtype=np.int64),
                ),
            )


POLICIES = {
    "label head": {},
    "whole prompt": POOLED,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["label head", "whole prompt"])
def test_steps_compile_nothing_once_a_policy_is_prepared(tiny_model, compiled, policy, dtype):
    policies = built(tiny_model, dtype, **POLICIES[policy])
    warm_up.prepare(policies, torch.zeros(MOST_ROWS, HIDDEN, dtype=dtype))
    before = set(compiled)
    assert before
    generator = np.random.default_rng(0)
    for rows in [1, MOST_ROWS, *generator.integers(2, MOST_ROWS, 8).tolist()]:
        states = torch.randn(rows, HIDDEN).to(dtype)
        decide(policies, states)
        if policy == "whole prompt":
            starts = torch.arange(0, rows, 2)
            for residual in None, states:
                for carried in None, torch.zeros(len(starts), HIDDEN):
                    pool(states, residual, starts, (starts + 2).clamp(max=rows), carried)
    assert compiled == before


def test_a_policy_is_prepared_where_it_is_built_and_before_it_is_handed_over(
    tiny_model, monkeypatch
):
    monkeypatch.setattr(ServedPolicies, "check", lambda *_: None)
    monkeypatch.setattr(ServedPolicies, "_composed", lambda *_: None)
    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        logit_lens=None,
        artifacts={},
    )
    prepared: list[PolicySet] = []
    served = ServedPolicies(model, None, SimpleNamespace(), prepared.append)  # type: ignore[arg-type]
    config = tiny_config(tiny_model)
    served.build({"a": Artifact(config, tiny_tensors(config))})
    assert [one.names[:-1] for one in prepared] == [("a",)]


def test_a_policy_whose_kernels_are_wrong_on_this_device_is_not_served(tiny_model, monkeypatch):
    monkeypatch.setattr(warm_up, "wrong_kernels", lambda *_: "the norm")
    policies = built(tiny_model, torch.float32)
    with pytest.raises(AdaInferError, match=r"kernels of new give other .* \(the norm\)"):
        warm_up.prepare(policies, torch.zeros(2, HIDDEN))


def test_a_kernel_that_is_compiled_ahead_of_steps_is_no_error_of_vllms_monitor(monkeypatch):
    """And one that is compiled in a step still is."""
    seen: list[str] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **event: seen.append(event["fn"])
    )
    with compiling_is_expected():
        knobs.runtime.jit_post_compile_hook(fn="ahead")
    knobs.runtime.jit_post_compile_hook(fn="in a step")
    with compiling_is_expected():
        knobs.runtime.jit_post_compile_hook(fn="ahead")
    assert seen == ["in a step"]


def test_the_tests_of_kernels_run_on_the_backend_that_serves(tiny_model, compiled):
    policies = built(tiny_model, torch.float32)
    assert kernels.wrong_kernels(policies, torch.zeros(MOST_ROWS, HIDDEN)) is None
    assert compiled
