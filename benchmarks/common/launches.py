"""Count what a step asks of a device: kernels, uploads, and reads that wait for it.

On a CPU, in the place of a GPU: an operation of torch that computes is one launch there, and a
kernel of Triton (in the interpreter) is one, whatever it does inside.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

WITHOUT_LAUNCH = "aten::empty", "aten::new_empty", "aten::empty_strided", "aten::detach"
UPLOADS = "upload", "upload_into"  # one copy each


class Launches(TorchDispatchMode):
    """Counts launches of operations and kernels, uploads, and reads to the host while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.uploads = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count `func`, unless it only looks at memory or reserves some."""
        returned = [out.alias_info for out in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and func._schema.name not in WITHOUT_LAUNCH:
            self.kernels[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    def read(self, values: Tensor) -> Any:
        """In place of the loop's own."""
        self.reads += 1
        return values.numpy()

    @property
    def asked(self) -> dict[str, int]:
        """All that was counted."""
        return {"launches": self.kernels.total(), "uploads": self.uploads, "reads": self.reads}


@contextmanager
def counted() -> Iterator[Launches]:
    """Count what this package asks of a device inside."""
    counter, run = Launches(), GridExecutor.__call__

    def launch(self: Any, *args: Any, **settings: Any) -> None:
        counter.kernels[self.fn.__name__] += 1
        with _disable_current_modes():
            run(self, *args, **settings)

    def counting(copy: Callable[..., Any]) -> Callable[..., Any]:
        def uploading(*args: Any) -> Any:
            counter.uploads += 1
            with _disable_current_modes():
                return copy(*args)

        return uploading

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        for name, module in list(sys.modules.items()):
            for function in UPLOADS if name.startswith("vllm_adainfer.") else ():
                if hasattr(module, function):
                    replacement = counting(getattr(module, function))
                    patches.enter_context(mock.patch.object(module, function, replacement))
        with counter:
            yield counter
