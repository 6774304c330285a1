"""Calibrate on some prompts, then run policies and stock vLLM in turn on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
from vllm_adainfer.offline.evaluation.run import Run
from vllm_adainfer.offline.evaluation.sequences import compare
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.offline.reports.shares import clopper_pearson
from vllm_adainfer.settings.request import EXIT_ARG

if TYPE_CHECKING:
    from vllm import LLM

STOCK, NEVER = "stock", "never"
Baselines = Mapping[Form, Run]


@dataclass(frozen=True)
class Round:
    """The runs of all engines and policies on the same prompts, in turn.

    Those of stock vLLM, and of ours without exits, are by the kind of output that was asked for.
    """

    stock: Baselines
    never: Baselines
    ours: Mapping[str, Run]


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
    repeat: int,
) -> list[Round]:
    """Write the artifacts of `policies` to `folder`, and run all on `examples`, `repeat` times.

    One engine serves all policies. It is cut at the exit points of all of them, which costs each a
    little.
    """
    hf_config, _ = load_config_and_tokenizer(request.model)
    for name, policy in policies.items():
        write_artifact(policy, request.model, hf_config, request.template, folder / name)
    configs = {name: policy_config(one, "", hf_config) for name, one in policies.items()}
    by_kind = {Output.of_config(config).form: config for config in configs.values()}
    stock = start_engine(request.model, examples)
    ours = start_engine(
        request.model, examples, {"artifact": {name: str(folder / name) for name in policies}}
    )

    def once(engine: LLM, name: str, kind: Form, prompts: Sequence[Example]) -> Run:
        config = configs.get(name, by_kind[kind])
        asked = {STOCK: None, NEVER: {EXIT_ARG: 0}}.get(name, {"adainfer_policy": name})
        params = [request_params(config, one.labels, asked) for one in prompts]
        return run(engine, prompts, params, config, engine is ours, None)

    turns = [(stock, STOCK, kind) for kind in by_kind] + [(ours, NEVER, kind) for kind in by_kind]
    turns += [(ours, name, Output.of_config(config).form) for name, config in configs.items()]
    rounds = []
    try:
        for turn in turns:
            once(*turn, examples[:WARM_UP])
        with progress(total=repeat * len(turns), desc="measure", unit="run") as done:
            for _ in range(repeat):
                found: dict[tuple[str, Form], Run] = {}
                for engine, name, kind in turns:
                    found[name, kind] = once(engine, name, kind, examples)
                    done.update()
                rounds.append(_round_of(found))
    finally:
        stop_engine(ours)
        stop_engine(stock)
    return rounds


def _round_of(found: Mapping[tuple[str, Form], Run]) -> Round:
    stock, never = (
        {kind: run for (name, kind), run in found.items() if name == wanted}
        for wanted in (STOCK, NEVER)
    )
    ours = {name: run for (name, _), run in found.items() if name not in (STOCK, NEVER)}
    return Round(stock, never, ours)


def measured(
    rounds: Sequence[Round], name: str, kind: Form, rights: Sequence[set[int]]
) -> dict[str, Any]:
    """A policy's medians over the rounds; its answers are those of the first.

    `rights` are the right tokens of each prompt.
    """
    first, never, n = rounds[0].ours[name], rounds[0].never[kind], len(rights)
    changed = round(compare(first.texts, never.texts)["disagreement"] * n)

    def accuracy(run: Run) -> float:
        pairs = zip(run.texts, rights, strict=True)
        return sum(text[0] in right for text, right in pairs) / n

    speedups = [one.stock[kind].seconds / one.ours[name].seconds for one in rounds]
    return {
        "settled_at_0": first.exit_histogram.get(0, 0) / n,
        "layers_saved": float(np.median([one.ours[name].layers_saved for one in rounds])),
        "speedups": speedups,
        "speedup": float(np.median(speedups)),
        "never_exit": float(
            np.median([one.stock[kind].seconds / one.never[kind].seconds for one in rounds])
        ),
        "stock_prompts_per_second": n
        / float(np.median([one.stock[kind].seconds for one in rounds])),
        "changed": changed,
        "changed_95": clopper_pearson(changed, n),
        "accuracy": accuracy(first),
        "stock_accuracy": accuracy(rounds[0].stock[kind]),
    }
