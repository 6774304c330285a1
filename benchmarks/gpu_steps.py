"""The tests and measurements that need a GPU, step by step: `make gpu`.

    python3 benchmarks/gpu_steps.py
    python3 benchmarks/gpu_steps.py --step start     # one step; the table keeps the others' rows
    python3 benchmarks/gpu_steps.py --list
    python3 benchmarks/gpu_steps.py --dry            # on any machine: can each step begin?

Each step is one command with a budget of minutes, after which it is ended. A step that fails stops
no other. The table, in benchmarks/results/gpu_steps.md, says what became of each; the exit status
is 1 if one failed. A dry run collects the tests and parses the command lines, without a device.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))  # imports start at the checkout

import torch
import typer

from benchmarks.gpu_step_results import FAILED, Result, read_result, run_command, table

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / ".demo" / "SmolLM2-135M-Instruct"
RESULTS = ROOT / "benchmarks" / "results"
ROWS = ROOT / ".cache" / "gpu_steps"  # the result of each step that has run
# For engines that are tested. Those that are timed would be slower, and log to files of their own.
WATCHED = {"VLLM_GPU_SYNC_CHECK": "warn", "VLLM_LOGGING_LEVEL": "DEBUG"}


def lacks_engine() -> str | None:
    """Why no engine can start here."""
    for package in ("vllm", "vllm-adainfer"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed for this Python"
    return None


def lacks_demo_model() -> str | None:
    """Why a policy on real weights cannot be made here."""
    if DEMO_MODEL.is_dir():
        return lacks_engine()
    return f"there is no {DEMO_MODEL.relative_to(ROOT)}: carry what fetch-demo-model writes"


@dataclass(frozen=True)
class Step:
    """A part of `make gpu`.

    Attributes:
        name: for ``--step``.
        shows: what it tests or measures.
        minutes: after which it is ended.
        arguments: for Python.
        lacks: why it cannot run here, if it cannot.
        is_timed: whether it measures the speed of engines.

    """

    name: str
    shows: str
    minutes: int
    arguments: tuple[str, ...]
    lacks: Callable[[], str | None] = lacks_engine
    is_timed: bool = False

    @property
    def is_of_kernels(self) -> bool:
        """Whether it needs no engine."""
        return self.lacks is needs_nothing

    @property
    def is_watched(self) -> bool:
        """Whether its engines are to log much, and warn when they wait for the device."""
        return not self.is_of_kernels and not self.is_timed

    @property
    def dry(self) -> tuple[str, ...]:
        """Arguments that begin the step and stop: collect the tests, or parse the command line."""
        return *self.arguments, *(
            ["--collect-only", "-q"] if "pytest" in self.arguments else ["--help"]
        )


def needs_nothing() -> None:
    """A step for which a GPU is enough."""


def tests(file: str, *select: str) -> tuple[str, ...]:
    """Arguments that run the tests of a file; of those selected, where there is a ``-k``."""
    return ("-m", "pytest", "-rs", f"tests/{file}", *select)


def engines(file: str, select: str) -> tuple[str, ...]:
    """The same of tests with engines, whose logs and warnings are shown as they come."""
    return (*tests(f"e2e/{file}", "-k", select), "-s", "-p", "no:warnings")


def throughput(shape: str) -> tuple[str, ...]:
    """Scripted exits on a Llama shape with random weights, beside stock vLLM with its graphs."""
    script, output = "benchmarks/offline/bench_throughput.py", f"throughput_gpu_{shape}.json"
    return (script, "--model", shape, "--quick", "--rounds", "4", "--output", str(RESULTS / output))


# In the order in which they tell most: an hour may end early.
STEPS = [
    Step("start", "a 1B shape starts and passes its self-test", 5, ("benchmarks/gpu_start.py",)),
    Step(
        *("states", "states and tokens on vLLM's default backend", 5),
        engines("test_gpu.py", "default"),
    ),
    Step(
        *("flashinfer", "the same on FlashInfer", 4),
        engines("test_gpu.py", "FLASHINFER"),
    ),
    Step(
        *("throughput-8b", "prompts and generation at 8B", 9),
        throughput("llama-8b"),
        is_timed=True,
    ),
    Step(
        *("auto", "a server that calibrates itself restarts", 3),
        engines("test_gpu_policies.py", "starts_again"),
    ),
    Step(
        *("demo", "a policy on real weights", 7),
        ("-m", "vllm_adainfer.cli", "demo", "--output", ".demo"),
        lacks_demo_model,
        is_timed=True,
    ),
    Step("kernels", "kernels against torch", 4, tests("kernels"), needs_nothing),
    Step(
        *("fp32", "drawn exits on TRITON_ATTN and FLEX_ATTENTION", 3),
        engines("test_gpu.py", "TRITON_ATTN or FLEX_ATTENTION"),
    ),
    Step(
        *("policies", "students, branches, classifiers", 2),
        engines("test_gpu_policies.py", "not starts_again"),
    ),
    Step("adapters", "LoRA adapters", 2, engines("test_gpu.py", "adapters")),
    Step(
        *("probe-kernel", "time of the probe kernel", 3),
        ("benchmarks/kernels/bench_probe_kernel.py", "--rows", "1,64"),
        needs_nothing,
    ),
    Step(
        *("throughput-1b", "prompts and generation at 1B", 3),
        throughput("llama-1b"),
        is_timed=True,
    ),
]


def main(
    dry: Annotated[bool, typer.Option(help="Only begin each step; needs no GPU.")] = False,
    only_kernels: Annotated[
        bool, typer.Option(help="Only the kernels; vLLM is not needed.")
    ] = False,
    step: Annotated[str | None, typer.Option(help="Run only the step of this name.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the steps, and run none.")] = False,
) -> None:
    """Run the steps, then print what became of all."""
    steps = [one for one in STEPS if one.is_of_kernels or not only_kernels]
    if step is not None:
        steps = [one for one in STEPS if one.name == step]
        if not steps:
            names = ", ".join(one.name for one in STEPS)
            raise typer.BadParameter(f"there is no step {step}; steps: {names}")
    if list_:
        for one in steps:
            typer.echo(f"{one.name:14} {one.minutes:2} min  {one.shows}")
        return
    if not dry and not torch.cuda.is_available():
        typer.echo(f"skipped: {sys.executable} sees no GPU through torch: set GPU_PYTHON")
        return
    found = {one.name: run(one, dry) for one in steps}
    known = found if dry else {**kept(), **found}
    text = table([(one.name, one.shows, one.minutes, known.get(one.name)) for one in STEPS])
    typer.echo(f"\n{text}")
    if not dry:
        (RESULTS / "gpu_steps.md").write_text(text)
    if any(result.outcome.startswith(FAILED) for result in found.values()):
        raise typer.Exit(1)


def run(step: Step, dry: bool) -> Result:
    """Run a step, or only begin it."""
    reason = None if dry else step.lacks()
    if reason is not None:
        result = Result(f"skipped: {reason}")
    else:
        typer.echo(f"== {step.name}: {step.shows}")
        log, started = ROWS / f"{step.name}{'.dry' if dry else ''}.log", time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        code = run_command(
            [sys.executable, *(step.dry if dry else step.arguments)],
            log,
            seconds=60 * step.minutes,
            environment=WATCHED if step.is_watched else {},
            quiet=dry,
        )
        tested = "pytest" in step.arguments and not dry
        output = log.read_text(errors="replace")
        result = read_result(code, output, tested, step.is_watched and not dry)
        result = result.taking((time.monotonic() - started) / 60)
    if not dry:
        ROWS.mkdir(parents=True, exist_ok=True)
        (ROWS / f"{step.name}.json").write_text(json.dumps(vars(result)))
    return result


def kept() -> dict[str, Result]:
    """What became of the steps that have run before, by name."""
    files = [ROWS / f"{one.name}.json" for one in STEPS]
    return {one.stem: Result(**json.loads(one.read_text())) for one in files if one.exists()}


if __name__ == "__main__":
    typer.run(main)
