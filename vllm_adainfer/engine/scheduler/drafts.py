"""Drafts structured answers: what a grammar's answers always said is verified, not generated.

``{"sentiment": "positive", "negated": false}`` has two decisions between tokens that the model
writes every time. A step verifies them all at once, like speculative decoding, but without a draft
model: the draft is what the model itself wrote in earlier answers to the same grammar. The first
one stands behind the prompt, in the prompt's own step. Wrong drafts cost rows, never an answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_adainfer.drafts.answers import LONGEST_CONTEXT, START
from vllm_adainfer.drafts.grammars import Grammar, Grammars
from vllm_adainfer.drafts.step_costs import StepCosts
from vllm_adainfer.engine.admission.requested_output import only_grammar_decides
from vllm_adainfer.engine.admission.running import resolved_of
from vllm_adainfer.engine.compat.drafts import (
    LONGEST_DRAFT,
    add_draft,
    most_drafted,
    reads_grammar,
)
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.scheduler import has_stale_output
from vllm_adainfer.engine.scheduler.observer import Observer, Step

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_adainfer.engine.scheduler.objects import Guesses

logger = get_logger(__name__)

ROWS_PER_STEP_ON_CPU, ROWS_PER_STEP_ON_GPU = 32.0, 256.0  # until they are measured


@dataclass
class Drafting:
    """A request whose answer is drafted.

    Attributes:
        request: vLLM's.
        grammar: the record of its grammar.
        end: the token that ends the answer.
        is_drafted: whether a step that runs verifies a draft.
        guess: what stands behind the prompt while a policy decides the answer; empty without one.

    """

    request: Request
    grammar: Grammar
    end: int
    is_drafted: bool = False
    guess: Sequence[int] = ()

    @property
    def is_guessed(self) -> bool:
        """Whether the next step ends the prompt, and a policy decides the answer in it."""
        return bool(self.guess) and not self.request.num_output_tokens

    @property
    def before(self) -> tuple[int, ...]:
        """The last tokens of the answer so far."""
        written = self.request.output_token_ids[-LONGEST_CONTEXT:]
        return (*START, *written)[-LONGEST_CONTEXT:]


class Drafts(Observer):
    """Learns the answers to each grammar, and adds drafts to the steps that vLLM schedules.

    Drafts take what a step has left: of the token budget and of free KV blocks. So they keep no
    request from running in the same step.
    """

    def __init__(self, scheduler: Any, on_gpu: bool, objects: Guesses | None = None) -> None:
        """`scheduler` is vLLM's; `objects` are those that policies decide, if there are any."""
        self._objects = objects
        self._scheduler = scheduler
        self._manager = scheduler.structured_output_manager
        self._most_drafted = most_drafted(scheduler.vllm_config)
        self._grammars = Grammars()
        self._requests: dict[str, Drafting] = {}
        self._costs = StepCosts(ROWS_PER_STEP_ON_GPU if on_gpu else ROWS_PER_STEP_ON_CPU)
        self._stepped_at = 0.0
        self._counted: Counter[tuple[str, str]] = Counter()  # by kind and grammar

    @override
    def arrived(self, request: Request) -> None:
        """Look up the grammar; vLLM has its text already, for its own cache."""
        params, structured = request.sampling_params, request.structured_output_request
        if params is None or structured is None or request.resumable:
            return
        resolved = resolved_of(request)
        guess = () if resolved is None else resolved.guess
        may_exit = resolved is not None and resolved.may_exit and not guess
        if may_exit or params.eos_token_id is None or not only_grammar_decides(params):
            return
        adapter = "" if request.lora_request is None else request.lora_request.lora_name
        kind, text = structured.structured_output_key
        grammar = self._grammars.arrived(adapter, kind.name, text, is_known=bool(guess))
        if grammar is not None:
            end = params.eos_token_id
            self._requests[request.request_id] = Drafting(request, grammar, end, guess=guess)

    def waiting(self) -> Iterator[Request]:
        """With asynchronous scheduling, the requests that a step scheduled now could not draft for.

        Their token in flight is not known yet. Behind a draft nobody knows how many are. Otherwise
        a request that waits for it loses a token, so the draft must be expected to spare more.
        """
        for one in self._requests.values():
            if one.request.num_output_placeholders and (one.is_drafted or self._pays_to_wait(one)):
                yield one.request

    def _pays_to_wait(self, one: Drafting) -> bool:
        request = one.request
        room = request.max_tokens - request.num_output_tokens - request.num_output_placeholders
        if one.grammar.rest or room < 2 or not reads_grammar(self._manager, request):
            return False
        return one.grammar.answers.behind_next(one.before, one.end) > 1

    def tokens_of_guesses(self) -> int:
        """How many tokens of the next step the guesses behind prompts take that end in it.

        Of the prompts that fit into the step with their guesses, in the order of their arrival,
        beside a token of each request that runs. A prompt that fits, but not with its guess, ends a
        step later. Prompts that are not cut into chunks may need the whole step: none waits.
        """
        scheduler = self._scheduler
        most = scheduler.max_num_scheduled_tokens
        if self._objects is None or not scheduler.scheduler_config.enable_chunked_prefill:
            return 0
        left, found = most - len(scheduler.running), 0
        for one in self._requests.values():
            if one.is_guessed and not one.request.num_output_placeholders:
                rows = one.request.num_tokens - one.request.num_computed_tokens
                guess = len(one.guess)
                if rows + guess > left:
                    if rows <= left and 2 * guess <= most:
                        found += min(guess, left - 1)
                    break
                left -= rows + guess
                found += guess
        return min(found, self._most_drafted)

    def plan(self, scheduled: Any) -> None:
        """Add drafts to a step that vLLM has just scheduled."""
        room = self._scheduler.max_num_scheduled_tokens - scheduled.total_num_scheduled_tokens
        room = min(room, self._most_drafted)
        ids = scheduled.num_scheduled_tokens if self._requests else ()
        drafting = [one for request_id in ids if (one := self._requests.get(request_id))]
        if self._objects is not None:  # room was left for guesses
            drafting.sort(key=lambda one: not one.is_guessed)
        for one in drafting:
            if room <= 0 or not self._may_draft(one):
                continue
            draft = self._draft(one, room)
            accepted = draft and self._manager.validate_tokens(one.request, draft)
            if one.is_guessed and len(accepted) < len(draft):
                logger.warning_once(
                    "objects are not decided early where the grammar does not allow the guess of "
                    "their policy: white space must be allowed here as in calibration, so leave "
                    "disable_any_whitespace out"
                )
            draft = accepted
            # The answer takes as many tokens as its guess, whether they come at once or not.
            spare = 0 if one.is_guessed else len(self._scheduler.running)
            if draft and add_draft(self._scheduler, scheduled, one.request, draft, spare):
                one.is_drafted = True
                room -= len(draft)

    def _may_draft(self, one: Drafting) -> bool:
        request = one.request
        return (
            (one.is_guessed or not one.grammar.rest)
            and not request.is_prefill_chunk
            and request.num_output_placeholders <= 1  # that of this step
            and not has_stale_output(request)  # of a draft, perhaps
            and reads_grammar(self._manager, request)
        )

    def _draft(self, one: Drafting, room: int) -> list[int]:
        request, scheduler = one.request, self._scheduler
        longest = min(
            room,
            LONGEST_DRAFT,
            request.max_tokens - request.num_output_tokens - 1,
            scheduler.max_model_len - request.num_tokens - 1,
        )
        if one.is_guessed:
            return list(one.guess) if len(one.guess) <= longest else []
        if self._objects is not None and (probable := self._objects.rest(request)):
            return probable[:longest]
        least = self._costs.least_share(len(scheduler.running))
        return one.grammar.answers.draft(one.before, least, longest, one.end)

    @override
    def stepped(self, step: Step) -> None:
        """Learn what was written, and what became of the drafts."""
        now = time.perf_counter()
        since = max(step.scheduled_at, self._stepped_at)  # it may have waited for the last one
        if step.rows:  # not where everybody waits, such as for a grammar
            self._costs.add(sum(step.rows.values()), now - since)
        self._stepped_at = now
        if not self._requests:
            return
        worth = self._costs.rows_per_step / max(1, len(self._scheduler.running))
        for request, tokens in step.choosing():
            one = self._requests.get(request.request_id)
            if one is None:
                continue
            if self._objects is not None and request.request_id in self._objects.written:
                continue  # the model has not written it
            draft = step.drafted.get(request.request_id)
            if draft and not one.is_guessed:
                self._judge(one, len(draft), len(tokens) - 1, worth)
            if reads_grammar(self._manager, request):
                self._learn(one, tokens)
        for request_id in step.drafted:  # of those whose tokens do not count, too
            if (one := self._requests.get(request_id)) is not None:
                one.is_drafted = False

    def _judge(self, one: Drafting, drafted: int, kept: int, worth: float) -> None:
        one.grammar.judge(drafted, kept, worth)
        name = self._grammars.counted_as(one.grammar)
        self._counted["structure_drafted", name] += drafted
        self._counted["structure_kept", name] += kept

    def _learn(self, one: Drafting, tokens: list[int]) -> None:
        before = one.before
        for token in tokens:
            one.grammar.answers.add(before, token)
            if token == one.end:
                break
            before = (*before[1:], token)

    @override
    def ended(self, request: Request, why: str | None) -> None:
        self._requests.pop(request.request_id, None)

    @override
    def report(self) -> Mapping[str, Any]:
        counted, self._counted = self._counted, Counter()
        return {"added": [(*key, count) for key, count in counted.items()]} if counted else {}
