"""Independent work side by side, each piece on one thread, where torch may use several.

The steps of a fit are small: two OpenMP threads in each of them wait for each other most of the
time, and waste their cores if anything else runs there. So each piece has a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Found = TypeVar("Found")


def side_by_side(pieces: Sequence[Callable[[], Found]]) -> Iterator[Found]:
    """What each of `pieces` returns, in their order; the first error that one raises ends it.

    As many run at once as torch has threads here. They must not draw from the random numbers that
    threads share.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also what threads that begin now inherit
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(lambda piece: piece(), pieces)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
