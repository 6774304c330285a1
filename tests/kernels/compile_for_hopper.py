"""Compile for sm_90, without a GPU, what the package would launch there; print JSON of the code.

Runs as a script, in a process without Triton's interpreter: reads a list of cases, writes a list
of the kernels that each launches.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from adainfer_kernels import Head, Lens, Norm, triton_pooling, triton_probe
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import JITFunction, driver


class Hopper:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def is_active(self) -> bool:
        return True


def compiling_instead_of_launching(compiled: list[tuple[str, Any]]) -> None:
    def launcher(kernel: JITFunction, grid: Any) -> Any:
        def compile_it(*arguments: Any, **options: Any) -> None:
            compiled.append((kernel.__name__, kernel.warmup(*arguments, grid=(1,), **options)))

        return compile_it

    driver.set_active(Hopper())
    JITFunction.__getitem__ = launcher
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    triton_probe._multiprocessors = lambda device: 132


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch(
    kernel: str,
    rows: int,
    size: int,
    hidden: int,
    dtype: str = "bfloat16",
    packed: bool = False,
    everything: bool = False,
) -> None:
    """Call the Triton backend on tensors without data; `size` is that of the head, or requests."""
    kind = getattr(torch, dtype)
    states = empty(rows, hidden, dtype=kind)
    if kernel == "readout":
        norm, lens = Norm("rms", empty(hidden, dtype=kind)), None
        if everything:
            norm = Norm("rms", empty(hidden, dtype=kind), empty(hidden, dtype=kind))
            lens = Lens(empty(hidden, hidden, dtype=kind), bias=empty(hidden, dtype=kind))
        triton_probe.readout(states, norm, lens, kind)
        return
    if kernel == "pool":
        spans = empty(size, dtype=torch.int64), empty(size, dtype=torch.int64)
        if everything:
            triton_pooling.pool(
                states, empty(rows, hidden, dtype=kind), *spans, empty(size, hidden)
            )
        else:
            triton_pooling.pool(states, None, *spans, None)
        return
    triton_probe.score(
        states,
        Head(
            empty(size, hidden, dtype=kind),
            empty(size, dtype=kind) if everything else None,
            30.0 if everything else None,
        ),
        empty(size, dtype=torch.int64) if packed else None,
        empty(3),
        empty(rows),
        return_scores=False,
    )


def described(name: str, compiled: Any) -> dict[str, Any]:
    """What the test asserts about a kernel; the spills are ptxas's own words."""
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        words = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source, "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+)", ptx)
    return {
        "name": name,
        "spilt": sum(map(int, re.findall(r"(\d+) bytes spill", words))),
        "registers": int(re.search(r"Used (\d+) registers", words)[1]),
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "async copies": sorted({int(size, 16) for size in copies}),
        "tensor cores": bool(re.search(r"wgmma\.mma_async|mma\.sync", ptx)),
    }


def main() -> None:
    compiled: list[tuple[str, Any]] = []
    compiling_instead_of_launching(compiled)
    reports = []
    for case in json.load(sys.stdin):
        compiled.clear()
        try:
            launch(**case)
            reports.append([described(*kernel) for kernel in compiled])
        except Exception as error:  # one test fails, not all
            reports.append(f"{type(error).__name__}: {error}")
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
