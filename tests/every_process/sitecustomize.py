"""Python runs this first in every process of a test run, so in those that engines start, too."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tests import triton_on_cpu

COUNTED_IN = "ADAINFER_TESTS_ENGINES"  # a file: one line for each engine that was started
ENGINES_OF = "vllm.v1.engine.core"


class _CountEngines(MetaPathFinder):
    """Lets the class of all engines write a line when one has started."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != ENGINES_OF:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_count(module: ModuleType) -> None:
            execute(module)
            start = module.EngineCore.__init__

            def counted(core: Any, vllm_config: Any, *more: Any, **settings: Any) -> None:
                start(core, vllm_config, *more, **settings)
                kind = "eager" if vllm_config.model_config.enforce_eager else "compiled"
                with open(os.environ[COUNTED_IN], "a") as file:
                    file.write(f"{kind}\n")

            module.EngineCore.__init__ = counted

        spec.loader.exec_module = execute_and_count  # type: ignore[method-assign]
        return spec


def prepare() -> None:
    """Count engines from here on, and let Model Runner V2 run without a GPU."""
    if COUNTED_IN in os.environ and ENGINES_OF not in sys.modules:
        sys.meta_path.insert(0, _CountEngines())
    triton_on_cpu.install_for_v2()


if __name__ == "sitecustomize":
    prepare()
