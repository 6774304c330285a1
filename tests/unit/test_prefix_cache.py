from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from vllm_adainfer.engine.scheduler.prefix_cache import PrefixCacheGuard

BLOCK = 4
SAVED = 0.4  # of the layers, by a prompt that exits
NUMBERS = itertools.count()
BLOCKS_ALLOCATED = object()


@dataclass
class FakeManager:
    """Allocates any number of slots, unless it is full."""

    blocks: int = 100
    full: bool = False
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    freed: list[Any] = field(default_factory=list)
    cached: list[tuple[str, int]] = field(default_factory=list)
    prefix_cache_stats: str = "the manager's"

    @property
    def block_pool(self) -> SimpleNamespace:
        return SimpleNamespace(hash_block_size=BLOCK, num_gpu_blocks=self.blocks)

    def allocate_slots(self, request: Any, *args: Any, **kwargs: Any) -> object | None:
        self.calls.append((request, args, kwargs))
        return None if self.full else BLOCKS_ALLOCATED

    def get_computed_blocks(self, request: Any, *limits: Any) -> tuple[Any, ...]:
        return "what", "is", "cached", tuple(self.cached), *limits

    def cache_blocks(self, request: Any, tokens: int) -> None:
        self.cached.append((request.hashes, tokens))

    def free(self, request: Any) -> None:
        self.freed.append(request)


@dataclass
class FakeRequest:
    """A prompt of whole blocks, named by their hashes, and perhaps some more tokens."""

    hashes: str
    may_exit: bool = True
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    more_tokens: int = 1
    num_stale_output_tokens: int = 0
    request_id: str = field(default_factory=lambda: f"id {next(NUMBERS)}")

    @property
    def block_hashes(self) -> list[bytes]:
        return [letter.encode() for letter in self.hashes]

    @property
    def num_tokens(self) -> int:
        return BLOCK * len(self.hashes) + self.more_tokens


class Setup:
    def __init__(self, **manager: Any) -> None:
        self.manager = FakeManager(**manager)
        self.completed: list[FakeRequest] = []
        self.guard: Any = PrefixCacheGuard(self.manager)
        self.guard._may_exit = lambda request, computed: request.may_exit
        self.guard._complete = self.complete
        self.guard._saving = lambda request: ("policy", SAVED)

    def complete(self, request: FakeRequest) -> None:
        request.may_exit = False
        self.completed.append(request)

    def allocate(self, request: FakeRequest, tokens: int | None = None, hit: int = 0) -> bool:
        """Schedule the rest (or `tokens`) of a request; returns whether its blocks are withheld."""
        rest = request.num_tokens - request.num_computed_tokens - hit
        self.guard.allocate_slots(request, rest if tokens is None else tokens, hit)
        return self.manager.calls[-1][2].get("delay_cache_blocks", False)

    def remembers(self, block_hash: str) -> bool:
        """Whether a request for the block would be completed; leaves no trace."""
        was_full, self.manager.full = self.manager.full, True
        request = FakeRequest(block_hash)
        self.allocate(request)
        self.manager.full = was_full
        return request in self.completed


@pytest.mark.parametrize("may_exit", [False, True])
def test_blocks_of_a_prompt_that_may_exit_are_withheld(may_exit):
    """Also those that an asynchronous scheduler caches."""
    setup, request = Setup(), FakeRequest("ab", may_exit)
    assert setup.allocate(request) == may_exit
    assert setup.remembers("a") == setup.remembers("b") == may_exit
    assert not setup.remembers("c")
    setup.guard.cache_blocks(request, 8)
    assert setup.manager.cached == ([] if may_exit else [("ab", 8)])


@pytest.mark.parametrize(
    ("computed", "hit", "tokens", "withheld"),
    [
        (0, 0, 8, False),
        (0, 4, 4, False),
        (4, 4, 4, False),
        (0, 0, 13, True),
        (8, 0, 5, True),
        (0, 8, 5, True),
        (4, 4, 5, True),
    ],
)
def test_only_the_chunk_that_ends_the_prompt_is_withheld(computed, hit, tokens, withheld):
    request = FakeRequest("abc", num_computed_tokens=computed)
    assert Setup().allocate(request, tokens, hit) == withheld


def test_blocks_computed_before_the_last_chunk_are_not_remembered():
    setup = Setup()
    setup.allocate(FakeRequest("abcd", num_computed_tokens=BLOCK), hit=BLOCK)
    assert [setup.remembers(block_hash) for block_hash in "abcd"] == [False, False, True, True]


def test_a_first_request_that_the_worker_knew_before_the_step_is_not_completed():
    setup = Setup()
    setup.allocate(FakeRequest("abx", status=RequestStatus.RUNNING))
    assert setup.guard.get_computed_blocks(FakeRequest("aby"))[-1] == ()
    assert setup.completed == []


def test_a_prefix_that_is_hit_is_no_touch():
    setup = Setup()
    setup.allocate(FakeRequest("abx"))
    later = FakeRequest("aby")
    assert setup.allocate(later, hit=2 * BLOCK)
    assert setup.completed == []


@pytest.mark.parametrize(
    "status", [RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.FINISHED_STOPPED]
)
def test_a_request_the_worker_knows_is_never_completed(status):
    setup = Setup()
    setup.allocate(FakeRequest("ab"))
    known = FakeRequest("ab", status=status)
    assert setup.allocate(known)
    assert setup.completed == []
    assert known.may_exit


def test_a_request_at_full_depth_needs_no_completion():
    setup = Setup()
    setup.allocate(FakeRequest("ab"))
    assert not setup.allocate(FakeRequest("ab", may_exit=False))
    assert setup.completed == []


def test_a_failed_allocation_records_nothing():
    setup = Setup(full=True)
    request = FakeRequest("ab")
    assert setup.guard.allocate_slots(request, request.num_tokens) is None
    assert not setup.remembers("a")
    assert not setup.remembers("b")


def test_a_request_completed_but_not_allocated_is_not_completed_twice():
    setup = Setup()
    setup.allocate(FakeRequest("ab"))
    setup.manager.full = True
    request = FakeRequest("ab")
    setup.allocate(request)
    setup.manager.full = False
    assert not setup.allocate(request)
    assert setup.completed == [request]


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_no_more_hashes_are_remembered_than_there_are_blocks(blocks):
    setup = Setup(blocks=blocks)
    for letter in "abcdefghij":
        setup.allocate(FakeRequest(letter))
    remembered = "".join(letter for letter in "abcdefghij" if setup.remembers(letter))
    assert remembered == "abcdefghij"[-blocks:]


def test_a_hash_withheld_again_is_remembered_longer():
    setup = Setup(blocks=2)
    for letter in "ab":
        setup.allocate(FakeRequest(letter))
    setup.allocate(FakeRequest("a", status=RequestStatus.RUNNING))
    setup.allocate(FakeRequest("c"))
    assert [setup.remembers(letter) for letter in "abc"] == [True, False, True]


def test_the_manager_gets_the_callers_arguments_and_everything_else_is_its_own():
    """From vLLM 0.33 on, one is a limit on a hit."""
    setup = Setup()
    request = FakeRequest("ab", may_exit=False)
    answer = setup.guard.allocate_slots(request, 9, 0, "blocks", num_lookahead_tokens=2)
    assert answer is BLOCKS_ALLOCATED
    assert setup.manager.calls == [(request, (9, 0, "blocks"), {"num_lookahead_tokens": 2})]
    assert setup.guard.get_computed_blocks(FakeRequest("a"), 12)[-1] == 12
    assert setup.guard.prefix_cache_stats == "the manager's"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = setup.guard.no_such_thing


def run(
    setup: Setup, request: FakeRequest, complete: int, then: Any = RequestStatus.RUNNING
) -> None:
    """A step with one request, which ends with `complete` tokens and status `then`."""
    setup.guard.new_step()
    setup.allocate(request)
    request.status = then
    setup.guard.step_ended({request.request_id: complete})


def test_what_becomes_complete_later_is_cached_then():
    setup, request = Setup(), FakeRequest("ab")
    run(setup, request, complete=0)
    request.num_computed_tokens = request.num_tokens
    request.hashes = "abc"
    run(setup, request, complete=BLOCK)
    run(setup, request, complete=BLOCK + 1)  # no further block
    run(setup, request, complete=3 * BLOCK)
    assert setup.manager.cached == [("abc", BLOCK), ("abc", 3 * BLOCK)]
    assert not any(setup.remembers(block_hash) for block_hash in "abc")


def test_once_tokens_are_withheld_so_are_those_after_them():
    setup, request = Setup(), FakeRequest("ab")
    run(setup, request, complete=0)
    request.num_computed_tokens, request.may_exit = request.num_tokens, False
    assert setup.allocate(request, tokens=1)


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.PREEMPTED])
def test_a_request_that_lost_its_blocks_meanwhile_is_not_cached(status):
    setup, request = Setup(), FakeRequest("ab")
    run(setup, request, request.num_tokens, then=status)
    assert setup.manager.cached == []


def test_what_a_step_completed_before_a_request_was_preempted_says_nothing_of_its_new_blocks():
    """A reset of the cache preempts running requests and schedules them again at once."""
    setup, request = Setup(), FakeRequest("ab")
    setup.allocate(request)
    request.status = RequestStatus.RUNNING
    setup.guard.free(request)
    setup.guard.new_step()
    setup.allocate(request)
    request.num_stale_output_tokens = request.num_tokens  # of the step before
    setup.guard.step_ended({request.request_id: request.num_tokens})
    assert setup.manager.cached == []
    request.num_stale_output_tokens = 0
    setup.guard.step_ended({request.request_id: request.num_tokens})
    assert setup.manager.cached == [("ab", request.num_tokens)]


@pytest.mark.parametrize("free", ["free", "pop_blocks_for_free"])
def test_a_request_whose_blocks_are_freed_starts_anew(free):
    setup, request = Setup(), FakeRequest("ab")
    setup.manager.pop_blocks_for_free = setup.manager.free
    run(setup, request, complete=0)
    getattr(setup.guard, free)(request)
    assert setup.manager.freed == [request]
    setup.guard.step_ended({request.request_id: request.num_tokens})
    assert setup.manager.cached == []


def test_what_the_worker_says_of_requests_without_withheld_tokens_changes_nothing():
    setup = Setup()
    setup.guard.step_ended({"another": 100})
    assert setup.manager.cached == []


def test_a_request_completed_for_a_second_in_its_step_is_cached_once():
    setup, first = Setup(), FakeRequest("abx")
    setup.allocate(first)
    setup.guard.get_computed_blocks(FakeRequest("aby"))
    first.status = RequestStatus.RUNNING
    setup.guard.step_ended({first.request_id: first.num_tokens})
    assert setup.manager.cached == [("abx", first.num_tokens)]
