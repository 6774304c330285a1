"""Serve a demo's policy beside stock vLLM with the installed wheel, and check what comes back.

    cd ENVIRONMENT && bin/python ../tools/serve_demo.py DEMO

DEMO is what `vllm-adainfer demo` wrote. `bench_serve.py` asks both servers. It fails where a
request fails or is not answered by one label, where the counters of `/metrics` are not those of its
requests, and where no layers are skipped. This fails, too, where more answers change than the bound
explains.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import typer
from scipy.stats import binom

import vllm_adainfer
from vllm_adainfer.offline.demo.model import MODEL_NAME

ROOT = Path(__file__).parents[1]
REQUESTS = 60


def most_within(epsilon: float, rows: int) -> int:
    """The most answers that may change: more come one time in twenty if the share is the bound."""
    return int(binom.ppf(0.95, rows, epsilon))


def main(demo: Path) -> None:
    """Serve the policy in `demo`, and exit with a sentence where a promise does not hold."""
    if Path(vllm_adainfer.__file__).is_relative_to(ROOT / "vllm_adainfer"):
        sys.exit("this would serve the checkout, not the wheel: run it from another folder")
    shipped, output = files("vllm_adainfer.offline.demo"), demo / "serve.json"
    for name in ("template.txt", "test.jsonl"):
        (demo / name).write_text(shipped.joinpath(name).read_text())
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "serving" / "bench_serve.py"),
            *("--model", demo / MODEL_NAME, "--artifact", demo / "artifact"),
            *("--data", demo / "test.jsonl", "--template", f"@{demo / 'template.txt'}"),
            *("--rates", "inf", "--requests", str(REQUESTS), "--rounds", "1", "--output", output),
        ],
        check=True,
    )
    report = json.loads(output.read_text())
    [rate] = report["rates"]
    for server in ("stock", "adainfer"):
        completed = [run["completed"] for run in rate[server]["runs"]]
        if completed != [REQUESTS] or rate[server]["failed"]:
            sys.exit(f"{server}: {completed} of {REQUESTS} requests were answered")
    if not 0.1 < rate["adainfer"]["layers_saved"] < 1:
        sys.exit(f"{rate['adainfer']['layers_saved']:.0%} of the layers were saved")
    rows, epsilon = report["answers"]["n"], report["epsilon"]
    if most_within(epsilon, rows) >= 2 * epsilon * rows:
        sys.exit(f"{rows} prompts are too few to see twice the bound of {epsilon:.0%}")
    changed = round(report["answers"]["disagreement"] * rows)
    if changed > most_within(epsilon, rows):
        sys.exit(
            f"{changed} of {rows} answers changed, of which {most_within(epsilon, rows)} are "
            f"within a bound of {epsilon:.0%} in 19 of 20 runs"
        )
    saved = rate["adainfer"]["layers_saved"]
    typer.echo(f"served: {saved:.0%} of the layers saved, {changed} of {rows} answers changed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
