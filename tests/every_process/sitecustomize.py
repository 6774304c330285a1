"""Python runs this at the start of each process of a test run, also of those that engines start."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tests import triton_on_cpu

COUNTED_IN = "ADAINFER_TESTS_ENGINES"  # a file: one line for each engine that was started
AS_A_USER = "ADAINFER_TESTS_AS_A_USER"  # where it is set, vLLM looks at models as it always does


def count_engines(core: ModuleType) -> None:
    """Make every engine write a line once it has started."""
    start = core.EngineCore.__init__

    def counted(self: Any, vllm_config: Any, *more: Any, **settings: Any) -> None:
        start(self, vllm_config, *more, **settings)
        kind = "compiled"
        if vllm_config.model_config.enforce_eager:
            kind = "eager"
        elif vllm_config.compilation_config.backend == "eager":
            kind = "traced"
        with open(os.environ[COUNTED_IN], "a") as file:
            file.write(f"{kind}\n")

    core.EngineCore.__init__ = counted


def look_at_models_here(registry: ModuleType) -> None:
    """Spare the process, of 10 seconds, in which vLLM looks at a model's class to protect CUDA."""
    registry._run_in_subprocess = lambda look: look()


class _AfterImport(MetaPathFinder):
    """Calls a function with a module once it has been imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_then(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = execute_and_then  # type: ignore[method-assign]
        return spec


def prepare() -> None:
    """Call this once in a process, before vLLM is imported."""
    if COUNTED_IN in os.environ:
        sys.meta_path.insert(0, _AfterImport("vllm.v1.engine.core", count_engines))
    without_gpu = os.environ.get("TRITON_INTERPRET") == "1"
    if without_gpu and AS_A_USER not in os.environ:
        models = "vllm.model_executor.models.registry"
        sys.meta_path.insert(0, _AfterImport(models, look_at_models_here))
    if without_gpu and triton_on_cpu.IS_V2:
        for name, then in triton_on_cpu.IN_TORCH.items():
            sys.meta_path.insert(0, _AfterImport(name, then))
    triton_on_cpu.install_for_v2()


if __name__ == "sitecustomize":
    prepare()
