"""Blocks of a prompt that left early must not serve others as if they were complete."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from vllm.v1.request import Request, RequestStatus

from vllm_adainfer.compat import hash_block_size

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager


class PrefixCacheGuard:
    """vLLM's KV cache manager, but the last chunk of a prompt that may exit is not cached.

    Earlier chunks always run at full depth and are cached as usual, and so is the last chunk once
    the worker has said that the request ran to full depth after all. Of the blocks withheld, the
    hashes are remembered: a request that asks for one of them again shows that the prefix is
    shared, so that request runs at full depth and its blocks are cached ("second touch
    completes"). If the first one is of the same step, the worker has not seen it yet: then it is
    that one which is completed, and the second hits its blocks already. From then on the prefix
    is hit as in stock vLLM, and only what is a request's own is computed and may exit.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        may_exit: Callable[[Request], bool],
        complete: Callable[[Request], None],
    ) -> None:
        """Guard `manager`.

        Args:
            manager: the scheduler's own; everything but `allocate_slots` is passed through.
            may_exit: whether a request is admitted to exit.
            complete: called with a request that must run at full depth instead.

        """
        self._manager = manager
        self._may_exit = may_exit
        self._complete = complete
        self._block_size = hash_block_size(manager)
        # A hash is of use only while its block could still be around: remember as many.
        self._capacity = manager.block_pool.num_gpu_blocks
        self._withheld: OrderedDict[bytes, None] = OrderedDict()
        # Of the step being scheduled: whose each withheld block is, and its tokens to cache.
        self._fresh: dict[bytes, tuple[Request, int]] = {}
        # By id, requests of which the worker has not said yet whether they left, and the same.
        self._undecided: dict[str, tuple[Request, int]] = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the manager's."""
        return getattr(self._manager, name)

    def new_step(self) -> None:
        """Say that another step is scheduled: the worker knows the requests of the last one."""
        self._fresh.clear()

    def step_ended(self, scheduled: Container[str], left: Container[str]) -> None:
        """Cache what was withheld from those `scheduled` requests that have not `left` early."""
        for request_id in [known for known in self._undecided if known in scheduled]:
            request, tokens = self._undecided.pop(request_id)
            # One that was aborted meanwhile has no blocks any more.
            if request_id not in left and request.status == RequestStatus.RUNNING:
                self._cache(request, tokens)

    def _cache(self, request: Request, tokens: int) -> None:
        self._manager.cache_blocks(request, tokens)
        for complete in request.block_hashes:
            self._fresh.pop(complete, None)
            self._withheld.pop(complete, None)

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """As vLLM's, once prompts of this step with which `request` shares blocks are complete."""
        for block_hash in request.block_hashes if self._fresh else ():
            if block_hash in self._fresh:
                owner, tokens = self._fresh[block_hash]
                self._complete(owner)
                self._cache(owner, tokens)
                self._undecided.pop(owner.request_id, None)
        computed: tuple[KVCacheBlocks, int, int] = self._manager.get_computed_blocks(request)
        return computed

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """As vLLM's, with ``delay_cache_blocks`` for a chunk after which `request` may exit."""
        computed = request.num_computed_tokens + num_new_computed_tokens
        touched = request.block_hashes[computed // self._block_size :]
        # Only while the worker has not been told about the request yet.
        is_new = request.status == RequestStatus.WAITING
        if is_new and self._may_exit(request) and not self._withheld.keys().isdisjoint(touched):
            self._complete(request)
        withhold = self._may_exit(request) and computed + num_new_tokens >= request.num_tokens
        if withhold:
            kwargs["delay_cache_blocks"] = True
        blocks = self._manager.allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
        )
        if withhold and blocks is not None:
            self._undecided[request.request_id] = (request, request.num_tokens)
            for block_hash in touched:
                self._withheld[block_hash] = None
                self._withheld.move_to_end(block_hash)
                if is_new:
                    self._fresh[block_hash] = (request, request.num_tokens)
            while len(self._withheld) > self._capacity:
                self._withheld.popitem(last=False)
        return blocks

    def reset_prefix_cache(self) -> bool:
        """As vLLM's; what was withheld before is forgotten with it."""
        self._withheld.clear()
        self._fresh.clear()
        self._undecided.clear()
        return bool(self._manager.reset_prefix_cache())
