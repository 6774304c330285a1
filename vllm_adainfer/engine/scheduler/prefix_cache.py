"""Keeps blocks that an exit left incomplete out of vLLM's prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.request import Request, RequestStatus

from vllm_adainfer.engine.admission.running import attach_resolved, resolved_of
from vllm_adainfer.engine.compat.scheduler import has_stale_output, hash_block_size
from vllm_adainfer.engine.scheduler.prefix_reuse import PrefixReuse
from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager


class PrefixCacheGuard:
    """Wraps vLLM's KV cache manager; caches blocks of requests that may exit only once complete.

    Chunks of a prompt before the last always run at full depth and are cached as usual. From the
    last chunk on, blocks are withheld until the worker reports that all of their tokens have the
    keys and values of full depth. The hashes of withheld blocks are remembered: a request that
    looks one up shows that the prefix is shared, so its prompt runs at full depth and its blocks
    are cached ("second touch completes"). If the first request is in the same step, the worker has
    not seen it yet, so the first is completed and the second hits its blocks. From then on the
    prefix is hit as in stock vLLM, and only the rest of each request is computed and may exit.

    A new request is completed at once if the expected reuse of its prefix exceeds the fraction of
    layers that its exit would save: a second touch would cost more.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        """Guard the scheduler's `manager`; everything not defined here is passed on to it."""
        self._manager = manager
        self._block_size = hash_block_size(manager)
        # A hash is useful only while its block may still exist, so one per block is enough.
        self._capacity = manager.block_pool.num_gpu_blocks
        self._withheld: OrderedDict[bytes, None] = OrderedDict()
        self._reuse = PrefixReuse(self._capacity)
        # For the step being scheduled: the owner of each withheld block, and its tokens to cache.
        self._fresh: dict[bytes, tuple[Request, int]] = {}
        # Requests with withheld tokens, by id, and how many tokens were cached before those.
        self._unfinished: dict[str, tuple[Request, int]] = {}

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on to the manager."""
        return getattr(self._manager, name)

    def new_step(self) -> None:
        """Start a new step: the worker now knows the requests of the last one."""
        self._fresh.clear()
        self._reuse.new_step()

    def step_ended(self, complete: Mapping[str, int]) -> None:
        """Cache withheld blocks.

        `complete` says by request id how many of the first tokens have the keys and values of full
        depth.
        """
        for request_id, tokens in complete.items():
            request, cached = self._unfinished.get(request_id, (None, 0))
            # A request that was preempted or aborted in the meantime has lost its blocks, even if
            # it has new ones by now.
            if (
                request is None
                or request.status != RequestStatus.RUNNING
                or has_stale_output(request)
            ):
                continue
            if tokens // self._block_size > cached // self._block_size:
                self._cache(request, cached, tokens)

    def _cache(self, request: Request, cached: int, tokens: int) -> None:
        """Cache the blocks of the first `tokens` tokens, of which `cached` are cached already."""
        self._manager.cache_blocks(request, tokens)
        first, end = cached // self._block_size, tokens // self._block_size
        for block_hash in request.block_hashes[first:end]:
            self._fresh.pop(block_hash, None)
            self._withheld.pop(block_hash, None)
        if request.request_id in self._unfinished:
            self._unfinished[request.request_id] = request, tokens

    def get_computed_blocks(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int]:
        """Look up blocks, after completing prompts of this step that share some with `request`."""
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
        """Allocate blocks, with ``delay_cache_blocks`` for a step in which `request` may exit.

        vLLM caches blocks in order, so once some tokens are withheld, all later ones are, too.
        """
        computed = request.num_computed_tokens + num_new_computed_tokens
        touched = request.block_hashes[computed // self._block_size :]
        is_new = request.status == RequestStatus.WAITING  # the worker does not know it yet
        may_exit = self._may_exit(request, computed)
        saving = None
        if is_new and may_exit and touched:
            saving = self._saving(request)
            if self._is_worth_completing(saving, touched):
                self._complete(request)
                may_exit = self._may_exit(request, computed)
        ends = computed + num_new_tokens >= request.num_tokens
        withhold = (ends and may_exit) or request.request_id in self._unfinished
        if withhold:
            kwargs["delay_cache_blocks"] = True
        blocks = self._manager.allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
        )
        if is_new and blocks is not None:
            self._reuse.add(None if saving is None else saving[0], request.block_hashes)
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

    def _is_worth_completing(
        self, saving: tuple[str, float] | None, touched: Sequence[bytes]
    ) -> bool:
        """Whether a new request shares withheld blocks, or is expected to be reused enough."""
        if not self._withheld.keys().isdisjoint(touched):
            return True
        if saving is None:
            return False
        policy, share = saving
        return self._reuse.expected(policy, touched) > share

    def _may_exit(self, request: Request, computed: int) -> bool:
        """Whether `request` may exit in a step that starts after `computed` of its tokens."""
        resolved = resolved_of(request)
        if resolved is None or (
            resolved.force_full_depth_prefill and computed < request.num_prompt_tokens
        ):
            return False
        return resolved.may_exit

    def _saving(self, request: Request) -> tuple[str, float] | None:
        """`Running.saving` of a request."""
        resolved = resolved_of(request)
        return None if resolved is None else resolved.saving

    def _complete(self, request: Request) -> None:
        """Run the prompt at full depth; the worker learns of the request only in this step."""
        resolved = resolved_of(request)
        assert resolved is not None, "only what may exit is completed"
        attach_resolved(request, resolved.changed(force_full_depth_prefill=True))

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Cache blocks, unless tokens are withheld; only `AsyncScheduler` calls this."""
        if request.request_id not in self._unfinished:
            self._manager.cache_blocks(request, num_tokens)

    def free(self, request: Request) -> None:
        """Forget withheld tokens: the request has ended, or was preempted and starts again."""
        self._unfinished.pop(request.request_id, None)
        self._manager.free(request)

    def pop_blocks_for_free(self, request: Request) -> Any:
        """Like `free`; vLLM calls this one while a step may still write the blocks."""
        self._unfinished.pop(request.request_id, None)
        return self._manager.pop_blocks_for_free(request)

    def reset_prefix_cache(self) -> bool:
        """Reset vLLM's cache, the withheld hashes and the reuse counts."""
        self._withheld.clear()
        self._fresh.clear()
        self._reuse = PrefixReuse(self._capacity)
        return bool(self._manager.reset_prefix_cache())


def refuse_kv_connector(vllm_config: VllmConfig) -> None:
    """Refuse a KV connector, at config time and in the scheduler: vLLM sets some in between."""
    if vllm_config.kv_transfer_config or vllm_config.cache_config.kv_offloading_size is not None:
        raise AdaInferError(
            "vllm-adainfer: a KV connector would send incomplete blocks: drop "
            '--kv-transfer-config and --kv-offloading-size, or drop "adainfer" from '
            "additional_config"
        )
