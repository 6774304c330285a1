"""Count what a step asks of a device: kernels, copies, and reads that wait for it.

On a CPU, in the place of a GPU: an operation of torch that computes is one launch there, and a
kernel of Triton (in the interpreter) is one, whatever it does inside. Copies that torch would make
from memory that is not pinned are counted where a tensor is sent to a device without `upload`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from vllm_adainfer.transfers import HostCopy

WITHOUT_LAUNCH = "aten::empty", "aten::new_empty", "aten::empty_strided", "aten::detach"
UPLOADS = "upload", "upload_into"  # one copy each
# A GPU must have done everything before the host can go on from these.
WAITING = "aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense", "aten::unique"
WAITING_METHODS = "cpu", "tolist", "item"


class Launches(TorchDispatchMode):
    """Counts what is asked while it is on.

    Attributes:
        kernels: launches of operations and kernels, by name.
        uploads: copies to the device, from pinned memory.
        downloads: copies to the host that nobody waits for.
        reads: whatever makes the host wait for the device.
        pageable: copies to the device from memory that is not pinned.

    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.uploads = self.downloads = self.reads = self.pageable = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count `func`, unless it only looks at memory or reserves some."""
        returned = [out.alias_info for out in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and func._schema.name not in WITHOUT_LAUNCH:
            self.kernels[func._schema.name] += 1
        masks = args[1] if func._schema.name in ("aten::index", "aten::index_put_") else ()
        by_mask = any(one is not None and one.dtype == torch.bool for one in masks)
        self.reads += by_mask or func._schema.name in WAITING
        return func(*args, **(kwargs or {}))

    def read(self, values: Tensor) -> Any:
        """In place of the loop's own."""
        self.reads += 1
        return values.numpy()

    @property
    def asked(self) -> dict[str, int]:
        """All that was counted."""
        counts = "uploads", "downloads", "reads", "pageable"
        return {"launches": self.kernels.total(), **{n: getattr(self, n) for n in counts}}


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

    def reading(call: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any, **settings: Any) -> Any:
            counter.reads += 1
            with _disable_current_modes():
                return call(*args, **settings)

        return waiting

    def sending(tensor: Tensor, *args: Any, **settings: Any) -> Tensor:
        given = [*args, *settings.values()]
        counter.pageable += any(isinstance(one, torch.device) for one in given)
        return to(tensor, *args, **settings)

    def copying(copy: HostCopy, values: Tensor) -> None:
        counter.downloads += 1
        with _disable_current_modes():
            make_copy(copy, values)

    to, make_copy = Tensor.to, HostCopy.__init__
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Tensor, "to", sending))
        patches.enter_context(mock.patch.object(HostCopy, "__init__", copying))
        for name in WAITING_METHODS:
            replacement = reading(getattr(Tensor, name))
            patches.enter_context(mock.patch.object(Tensor, name, replacement))
        patches.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        for name, module in list(sys.modules.items()):
            for function in UPLOADS if name.startswith("vllm_adainfer.") else ():
                if hasattr(module, function):
                    replacement = counting(getattr(module, function))
                    patches.enter_context(mock.patch.object(module, function, replacement))
        with counter:
            yield counter
