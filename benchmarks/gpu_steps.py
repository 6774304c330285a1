"""The tests and measurements that need a GPU, step by step: `make gpu`.

    python3 benchmarks/gpu_steps.py
    python3 benchmarks/gpu_steps.py --dry    # on any machine: can each step begin?

A step that fails stops no other; a table at the end says what became of each, and the exit status
is 1 if one failed. A dry run collects the tests and parses the command lines, without a device.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))  # imports start at the checkout

import torch
import typer

from vllm_adainfer.offline.facts.document import markdown_grid

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / ".demo" / "SmolLM2-135M-Instruct"
RESULTS = ROOT / "benchmarks" / "results"
PASSED, FAILED = "passed", "failed"


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
    """A part of `make gpu`: arguments for Python, and why it cannot run here, if it cannot."""

    name: str
    arguments: tuple[str, ...]
    lacks: Callable[[], str | None] = lambda: None

    @property
    def dry(self) -> tuple[str, ...]:
        """Arguments that begin the step and stop: collect the tests, or parse the command line."""
        return *self.arguments, *(
            ["--collect-only", "-q"] if "pytest" in self.arguments else ["--help"]
        )


def throughput(shape: str) -> Step:
    """Scripted exits on a Llama shape with random weights, beside stock vLLM with its graphs."""
    script = "benchmarks/offline/bench_throughput.py"
    output = str(RESULTS / f"throughput_gpu_{shape}.json")
    return Step(
        f"throughput of {shape}", (script, "--model", shape, "--output", output), lacks_engine
    )


STEPS = [
    Step("kernels against torch", ("-m", "pytest", "tests/kernels")),
    Step("time of the probe kernel", ("benchmarks/kernels/bench_probe_kernel.py",)),
    Step("engines against the oracle", ("-m", "pytest", "tests/e2e/test_gpu.py"), lacks_engine),
    Step(
        "a policy on real weights",
        ("-m", "vllm_adainfer.cli", "demo", "--output", ".demo"),
        lacks_demo_model,
    ),
    throughput("llama-1b"),
    throughput("llama-8b"),
]


def main(
    dry: Annotated[bool, typer.Option(help="Only begin each step; needs no GPU.")] = False,
    only_kernels: Annotated[
        bool, typer.Option(help="Only the kernels; vLLM is not needed.")
    ] = False,
) -> None:
    """Run all steps, then print what became of them."""
    if not dry and not torch.cuda.is_available():
        typer.echo(f"skipped: {sys.executable} sees no GPU through torch: set GPU_PYTHON")
        return
    steps = [step for step in STEPS if "kernel" in step.name or not only_kernels]
    results = [run(step, dry) for step in steps]
    device = "no device" if dry else torch.cuda.get_device_name()
    typer.echo(f"\n{device}, torch {torch.__version__}\n")
    typer.echo(markdown_grid(["step", "result", "minutes"], results, text_columns=2))
    if any(result.startswith(FAILED) for _, result, _ in results):
        raise typer.Exit(1)


def run(step: Step, dry: bool) -> list[str]:
    """Run a step, and return its row of the table."""
    reason = None if dry else step.lacks()
    if reason is not None:
        return [step.name, f"skipped: {reason}", "-"]
    typer.echo(f"== {step.name}")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *(step.dry if dry else step.arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search_path()},
        stdout=subprocess.DEVNULL if dry else None,
        check=False,
    )
    result = PASSED if done.returncode == 0 else f"{FAILED} ({done.returncode})"
    return [step.name, result, f"{(time.monotonic() - start) / 60:.1f}"]


def search_path() -> str:
    """Where Python finds this checkout's packages."""
    found: Sequence[str] = [str(ROOT), str(ROOT / "kernels")]
    return os.pathsep.join([*found, *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    typer.run(main)
