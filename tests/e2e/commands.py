"""Commands of the command line: in forks of a process that has imported vLLM, or as a user's.

Imports take ten seconds, for each of thirty commands.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

from tests.every_process.sitecustomize import AS_A_USER

ROOT = Path(__file__).parents[2]
CLI = "vllm_adainfer.cli"


def of_a_user(compiled: bool = False) -> dict[str, str]:
    """The environment of a command.

    If `compiled`, all is as a user has it: engines have processes of their own. Otherwise engines
    run in the command's process, and torch traces each model but compiles nothing, as in vLLM's CI.
    """
    if not compiled:
        return {**os.environ, "VLLM_CPU_CI_ENV": "1"}
    variables = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**variables, AS_A_USER: "1"}


@cache
def forking() -> subprocess.Popen[str]:
    """The process that forks for each command."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.commands"],
        env=of_a_user(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def command(
    *arguments: str, expect: int = 0, compiled: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the CLI, see `of_a_user`."""
    asked = [sys.executable, "-m", CLI, *arguments]
    if compiled:
        env = of_a_user(compiled)
        done = subprocess.run(asked, env=env, capture_output=True, text=True, check=False)
    else:
        with tempfile.TemporaryDirectory() as folder:
            process = forking()
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps([folder, *arguments]), file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            said = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        done = subprocess.CompletedProcess(asked, code, *said)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def run_in_fork(folder: str, arguments: list[str]) -> int:
    """The status with which a command ends, whose output goes to files."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.argv = [CLI, *arguments]
    status = 0
    try:
        runpy.run_module(CLI, run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Read a JSON list for each command, write its status."""
    import vllm.model_executor.models.llama
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import vllm_adainfer.cli
    import vllm_adainfer.offline.calibration.calibrate
    import vllm_adainfer.offline.evaluation.evaluate  # noqa: F401

    for line in sys.stdin:
        folder, *arguments = json.loads(line)
        print(run_in_fork(folder, arguments), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
