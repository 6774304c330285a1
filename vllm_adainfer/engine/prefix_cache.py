"""Blocks that an exit left incomplete must not serve other requests as if they were complete."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.request import Request, RequestStatus

from vllm_adainfer.engine.compat import hash_block_size

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager


class PrefixCacheGuard:
    """vLLM's KV cache manager, but what may exit is cached only when known to be complete.

    Chunks of a prompt before the last always run at full depth and are cached as usual. From the
    last chunk on, blocks are cached once the worker has said that all of their tokens have keys
    and values as at full depth. Of the blocks withheld, the hashes are remembered: a request that
    asks for one of them again shows that the prefix is shared, so that request runs its prompt at
    full depth and its blocks are cached ("second touch completes"). If the first one is of the
    same step, the worker has not seen it yet: then it is that one which is completed, and the
    second hits its blocks already. From then on the prefix is hit as in stock vLLM, and only what
    is a request's own is computed and may exit.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        may_exit: Callable[[Request, int], bool],
        complete: Callable[[Request], None],
    ) -> None:
        """Guard `manager`.

        Args:
            manager: the scheduler's own; what is not defined here is passed through.
            may_exit: whether a request may exit in a step that starts after so many of its tokens.
            complete: called with a request whose prompt must run at full depth.

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
        # By id, requests with tokens withheld from some step on, and the tokens cached before.
        self._unfinished: dict[str, tuple[Request, int]] = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the manager's."""
        return getattr(self._manager, name)

    def new_step(self) -> None:
        """Say that another step is scheduled: the worker knows the requests of the last one."""
        self._fresh.clear()

    def step_ended(self, complete: Mapping[str, int]) -> None:
        """Cache what was withheld, by id up to so many first tokens that are `complete`."""
        for request_id, tokens in complete.items():
            request, cached = self._unfinished.get(request_id, (None, 0))
            # Of one that was preempted or aborted meanwhile the blocks are gone.
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            if tokens // self._block_size > cached // self._block_size:
                self._cache(request, cached, tokens)

    def _cache(self, request: Request, cached: int, tokens: int) -> None:
        """Cache blocks of the first `tokens`, of which `cached` have been before."""
        self._manager.cache_blocks(request, tokens)
        first, end = cached // self._block_size, tokens // self._block_size
        for complete in request.block_hashes[first:end]:
            self._fresh.pop(complete, None)
            self._withheld.pop(complete, None)
        if request.request_id in self._unfinished:
            self._unfinished[request.request_id] = request, tokens

    def get_computed_blocks(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int]:
        """As vLLM's, once prompts of this step with which `request` shares blocks are complete."""
        for block_hash in request.block_hashes if self._fresh else ():
            if block_hash in self._fresh:
                owner, tokens = self._fresh[block_hash]
                self._complete(owner)
                _, cached = self._unfinished[owner.request_id]
                self._cache(owner, cached, tokens)
        computed: tuple[KVCacheBlocks, int, int] = self._manager.get_computed_blocks(
            request, *args, **kwargs
        )
        return computed

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """As vLLM's, with ``delay_cache_blocks`` for a step in which `request` may exit.

        Once tokens have been withheld, so are those after them: vLLM caches blocks in order.
        """
        computed = request.num_computed_tokens + num_new_computed_tokens
        touched = request.block_hashes[computed // self._block_size :]
        # Only while the worker has not been told about the request yet.
        is_new = request.status == RequestStatus.WAITING
        may_exit = self._may_exit(request, computed)
        if is_new and may_exit and not self._withheld.keys().isdisjoint(touched):
            self._complete(request)
            may_exit = self._may_exit(request, computed)
        ends = computed + num_new_tokens >= request.num_tokens
        withhold = (ends and may_exit) or request.request_id in self._unfinished
        if withhold:
            kwargs["delay_cache_blocks"] = True
        blocks = self._manager.allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
        )
        if withhold and blocks is not None:
            self._unfinished.setdefault(request.request_id, (request, computed))
            for block_hash in touched:
                self._withheld[block_hash] = None
                self._withheld.move_to_end(block_hash)
                if is_new:
                    self._fresh[block_hash] = (request, request.num_tokens)
            while len(self._withheld) > self._capacity:
                self._withheld.popitem(last=False)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """As vLLM's, which calls it of asynchronous schedulers; not while tokens are withheld."""
        if request.request_id not in self._unfinished:
            self._manager.cache_blocks(request, num_tokens)

    def free(self, request: Request) -> None:
        """As vLLM's; the request has ended, or is preempted and starts anew."""
        self._unfinished.pop(request.request_id, None)
        self._manager.free(request)

    def pop_blocks_for_free(self, request: Request) -> Any:
        """As vLLM's, which calls it instead of `free` while a step may still write the blocks."""
        self._unfinished.pop(request.request_id, None)
        return self._manager.pop_blocks_for_free(request)

    def reset_prefix_cache(self) -> bool:
        """As vLLM's; what was withheld before is forgotten with it."""
        self._withheld.clear()
        self._fresh.clear()
        return bool(self._manager.reset_prefix_cache())
