"""Calibrate on some prompts, then run policies and stock vLLM in turn on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common.intervals import control
from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.enough_rows import split_of
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import Prompts
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.calibration.write.policy_artifact import policy_config, write_artifact
from vllm_adainfer.offline.evaluation.measure import WARM_UP, run
from vllm_adainfer.offline.evaluation.requests import request_params
from vllm_adainfer.offline.evaluation.rounds import slice_of, turns
from vllm_adainfer.offline.evaluation.run import Run
from vllm_adainfer.offline.evaluation.sequences import compare
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.offline.reports.shares import clopper_pearson
from vllm_adainfer.offline.reports.speedup import Speedup, doubt
from vllm_adainfer.settings.request import EXIT_ARG

if TYPE_CHECKING:
    from vllm import LLM

STOCK, STOCK_AGAIN, NEVER, OWN_NEVER = "stock", "stock again", "never", "never, alone"
Side = tuple[str, Form]  # one of these or a policy's name, and the kind of output asked for


@dataclass(frozen=True)
class InTurn:
    """The runs of stock vLLM and of all policies on the same prompts.

    Attributes:
        whole: a pass of each side over all prompts.
        seconds: the times of each in rounds of some of the prompts, in turn.
        alone: the policy that has an engine of its own, if any.

    """

    whole: Mapping[Side, Run]
    seconds: Mapping[Side, Sequence[float]]
    alone: str | None

    def never(self, name: str) -> str:
        """The side that never exits, in the engine that serves a policy."""
        return OWN_NEVER if name == self.alone else NEVER

    def speedup(self, name: str, kind: Form) -> Speedup:
        """A side's over stock vLLM."""
        return Speedup.of(self.seconds[STOCK, kind], self.seconds[name, kind])


def hold_back(prompts: Prompts, request: CalibrationRequest, test: int) -> tuple[Prompts, Ints]:
    """The prompts with a split of all but the last `test`, and the numbers of those."""
    groups = prompts.split.groups
    first = int(np.searchsorted(groups, groups[-test]))  # groups stay together
    split = replace(split_of(groups[:first], request.options), groups=groups)
    return replace(prompts, split=split), np.arange(first, len(groups))


def run_in_turn(
    request: CalibrationRequest,
    policies: Mapping[str, FittedPolicy],
    examples: Sequence[Example],
    folder: Path,
    rounds: int,
    alone: str | None = None,
) -> InTurn:
    """Write the artifacts of `policies` to `folder`, and run all on `examples`.

    That named `alone` has an engine of its own, as its users have it. Another engine serves all
    others: it is cut at the exit points of all of them, which costs each a little. Stock vLLM runs
    twice in each round, so that its ratio to itself shows what the host does to ratios.
    """
    hf_config, _ = load_config_and_tokenizer(request.model)
    for name, policy in policies.items():
        write_artifact(policy, request.model, hf_config, request.template, folder / name)
    configs = {name: policy_config(one, "", hf_config) for name, one in policies.items()}
    served = {name: Output.of_config(config).form for name, config in configs.items()}
    config_of = {kind: configs[name] for name, kind in served.items()}
    together = [name for name in policies if name != alone]
    own = [] if alone is None else [alone]
    sides = [(name, kind) for name in (STOCK, STOCK_AGAIN) for kind in config_of]
    sides += [(NEVER, kind) for kind in dict.fromkeys(served[name] for name in together)]
    sides += [(OWN_NEVER, served[name]) for name in own]
    sides += served.items()
    engines: dict[str, LLM] = {}

    def start(names: Sequence[str], policies: Sequence[str]) -> None:
        artifacts = {name: str(folder / name) for name in policies}
        switch = {"artifact": artifacts} if artifacts else None
        engine = start_engine(request.model, examples, switch)
        engines.update(dict.fromkeys([*names, *policies], engine))

    def once(side: Side, prompts: Sequence[Example]) -> Run:
        name, kind = side
        is_stock = name in (STOCK, STOCK_AGAIN)
        config = configs.get(name, config_of[kind])
        asked = {"adainfer_policy": name} if name in configs else {EXIT_ARG: 0}
        params = [
            request_params(config, one.labels, None if is_stock else asked) for one in prompts
        ]
        return run(engines[name], prompts, params, config, not is_stock, None)

    seconds: dict[Side, list[float]] = {side: [] for side in sides}
    try:
        start([STOCK, STOCK_AGAIN], [])
        if together:
            start([NEVER], together)
        if own:
            start([OWN_NEVER], own)
        for side in sides:
            once(side, examples[:WARM_UP])
        whole = {side: once(side, examples) for side in progress(sides, desc="answers")}
        for number, side in turns(sides, rounds):
            some = slice_of(examples, number, WARM_UP)
            seconds[side].append(once(side, some).seconds)
    finally:
        for engine in {id(one): one for one in engines.values()}.values():
            stop_engine(engine)
    return InTurn(whole, seconds, alone)


def measured(found: InTurn, name: str, kind: Form, rights: Sequence[set[int]]) -> dict[str, Any]:
    """What a policy saves, and how fast it is; `rights` are the right tokens of each prompt."""
    never_name = found.never(name)
    ours, never, stock = (found.whole[side, kind] for side in (name, never_name, STOCK))
    n, saved = len(rights), ours.layers_saved
    changed = round(compare(ours.texts, never.texts)["disagreement"] * n)

    def accuracy(run: Run) -> float:
        pairs = zip(run.texts, rights, strict=True)
        return sum(text[0] in right for text, right in pairs) / n

    return {
        "settled_at_0": ours.exit_histogram.get(0, 0) / n,
        "layers_saved": saved,
        **found.speedup(name, kind).entries("speedup"),
        **found.speedup(never_name, kind).entries("never_exit"),
        **found.speedup(STOCK_AGAIN, kind).entries("stock_again"),
        "stock_prompts_per_second": n / stock.seconds,
        "changed": changed,
        "changed_95": clopper_pearson(changed, n),
        "accuracy": accuracy(ours),
        "stock_accuracy": accuracy(stock),
    }


def speed_cells(one: Mapping[str, Any]) -> dict[str, str]:
    """How fast a policy of a report is, as columns of its table."""
    speedup = Speedup.read(one, "speedup")
    efficiency = speedup.times(1 - one["layers_saved"])
    return {
        "speed-up (95 %)": speedup.bold,
        "never exiting (95 %)": control(Speedup.read(one, "never_exit")),
        "efficiency (95 %)": f"{efficiency.value:.2f} {efficiency.around}",
    }


def noise(policies: Sequence[Mapping[str, Any]]) -> str:
    """What the host did to the ratios of a report's policies; nothing of an older report."""
    if "stock_again" not in policies[0]:
        return ""
    found = [Speedup.read(one, name) for one in policies for name in ("speedup", "never_exit")]
    itself = Speedup.read(policies[0], "stock_again")
    return f"Stock against itself {itself.text}. {doubt(*found, itself) or ''}".strip()
