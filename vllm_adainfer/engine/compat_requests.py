"""Undocumented names of vLLM on the way of a request: frontend, scheduler and what they exchange.

Each was checked against vLLM 0.32.0 (CPU build). Those of the model and its worker are in `compat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.config import MOST_CHOICE_CHARACTERS, MOST_CHOICES

if TYPE_CHECKING:
    from vllm.v1.request import Request


def client_request_id(request_id: str) -> str:
    """The id that the client sent: 0.32 appends a dash and eight random hex digits to it.

    (`InputProcessor.assign_request_id`, unless ``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION`` is set.)
    """
    return re.sub(r"-[0-9a-f]{8}$", "", request_id)


def request_group(request_id: str) -> str | None:
    """What the parts of one HTTP request have in common; None if 0.32 does not make it of parts.

    Each prompt, item or question is a request of its own there, named by the HTTP request's id, a
    dash and a number (`next_token_label_reads`, `OpenAIServingCompletion.create_completion`).
    """
    group, dash, part = client_request_id(request_id).rpartition("-")
    made_of_parts = group.startswith(("cmpl-", "decision-", "generative-scoring-"))
    return group if dash and part.isdecimal() and made_of_parts else None


ROOT = "root ::= "
BETWEEN = " | "
LITERAL = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
# Each character may be escaped, as in \u001f, and each choice has quotes and a bar around it.
LONGEST_GRAMMAR = 6 * MOST_CHOICE_CHARACTERS + 5 * MOST_CHOICES + len(ROOT)


def choices_of(choice: Sequence[str] | None, grammar: str | None) -> list[str] | None:
    """The texts that a request chooses from, of the two fields of its ``structured_outputs``.

    None if it is restricted in another way, or if there are more than `MOST_CHOICES`, or more than
    `MOST_CHOICE_CHARACTERS` in all: such a request runs as in stock vLLM. The time is linear in
    what is looked at, which is never more than that.
    0.32's frontend has by then turned ``choice`` into a grammar, in place, if the backend is
    xgrammar (`validate_xgrammar_grammar`), so a grammar is read back if it is one of a choice.
    """
    choices = _choices_in(grammar or "") if choice is None else choice
    if choices is None or len(choices) > MOST_CHOICES:
        return None
    return list(choices) if sum(map(len, choices)) <= MOST_CHOICE_CHARACTERS else None


def _choices_in(grammar: str) -> list[str] | None:
    """The choices of a grammar that 0.32's `choice_as_grammar` has written; None of any other."""
    from vllm.v1.structured_output.utils import choice_as_grammar

    if len(grammar) > LONGEST_GRAMMAR or not grammar.startswith(ROOT):
        return None
    choices: list[str] = []
    place = len(ROOT)
    while len(choices) <= MOST_CHOICES and (literal := LITERAL.match(grammar, place)):
        try:  # its escapes are JSON's
            choices.append(json.loads(literal[0]))
        except ValueError:
            return None
        place = literal.end()
        if place == len(grammar):
            return choices if choice_as_grammar(choices) == grammar else None
        if not grammar.startswith(BETWEEN, place):
            return None
        place += len(BETWEEN)
    return None


def sampled_tokens(
    scheduler_output: Any, runner_output: Any, requests: Mapping[str, Request]
) -> Iterator[tuple[Request, list[int]]]:
    """The running requests with a grammar that have got tokens in a step, and those tokens.

    What is added to the tokens counts as sampled, too: 0.32's `Scheduler.update_from_output` reads
    them from there. Left out are requests whose output it drops, and drafts of speculation, whose
    number it compares with that of the tokens.
    """
    for request_id, tokens in zip(
        runner_output.req_ids, runner_output.sampled_token_ids, strict=False
    ):
        request = requests.get(request_id)
        if (
            tokens
            and request is not None
            and request.use_structured_output
            and not request.is_finished()
            and not has_stale_output(request)
            and request_id not in scheduler_output.scheduled_spec_decode_tokens
        ):
            yield request, tokens


def expect_more_tokens(scheduler: Any, request: Request, count: int) -> None:
    """Tell 0.32's `AsyncScheduler`, which counts the tokens it expects, of `count` more."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    if isinstance(scheduler, AsyncScheduler):
        request.num_output_placeholders += count


@contextmanager
def not_ahead(requests: Iterable[Request]) -> Iterator[None]:
    """Keep `Scheduler.schedule` from scheduling `requests` before their token in flight is known.

    0.32 leaves out those whose token in flight is their last by ``max_tokens``, and reads that for
    nothing else while it schedules.
    """
    asked = [(request, request.max_tokens) for request in requests]
    for request, _ in asked:
        request.max_tokens = request.num_output_tokens + 1
    try:
        yield
    finally:
        for request, max_tokens in asked:
            request.max_tokens = max_tokens


def takes_all(grammar: Any, tokens: list[int]) -> bool:
    """Whether a request's grammar would take `tokens` one after the other; its state stays.

    Only where 0.32's backend can look as far ahead: those of outlines and lm-format-enforcer roll
    back no further than speculation needs, and raise.
    """
    from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    if not isinstance(grammar, XgrammarGrammar | GuidanceGrammar):
        return False
    return grammar.validate_tokens(tokens) == tokens


def decision_question(name: str, asked: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """A question of ``/v1/systemone`` as vLLM puts it to the model, and its labels.

    Raises:
        ValueError: vLLM refuses the question.

    """
    try:
        from vllm.entrypoints.generate.structured_decisions import question_types
    except ImportError:  # 0.33 has moved it
        from vllm.entrypoints.openai.decisions import question_types

    question = question_types.build_question(
        name,
        asked["type"],
        asked.get("instructions", ""),
        asked.get("criteria"),
        len(question_types.LABELS),
    )
    return question.type.prompt(question), question.labels


def has_stale_output(request: Request) -> bool:
    """Whether the step that has just ended began before a request was preempted.

    0.32 preempts and schedules anew in one step where ``reset_prefix_cache`` is called for running
    requests, and counts the tokens of older steps still to come before it updates a request.
    """
    return request.num_stale_output_tokens > 0


def hash_block_size(kv_cache_manager: Any) -> int:
    """Tokens per entry of ``Request.block_hashes`` (0.32: an attribute of the block pool)."""
    return int(kv_cache_manager.block_pool.hash_block_size)


def use_stat_loggers(mixin: type) -> None:
    """Have engines with our switch in their config write our metrics and log lines, too.

    0.32 takes stat loggers from entry points, but then turns statistics on for every engine of
    every process, even where they are off and our switch is not set. So the class that builds
    loggers, which these two modules look up, gets `mixin` as its first base, once, when an engine
    is configured.
    """
    from vllm.v1.engine import async_llm, llm_engine
    from vllm.v1.metrics.loggers import StatLoggerManager

    ours = type("AdaInferStatLoggerManager", (mixin, StatLoggerManager), {})
    for module in (async_llm, llm_engine):
        if module.StatLoggerManager is StatLoggerManager:
            module.StatLoggerManager = ours


def attach_report(scheduler_stats: Any, report: dict[str, Any]) -> None:
    """Send `report` from the scheduler to the frontends, in `SchedulerStats`, beside others.

    0.32 has no field for plugins there. The one for KV connectors may hold any plain values, and is
    unused where there are none: with a policy they are refused, without one nothing is sent.
    """
    others = (scheduler_stats.kv_connector_stats or {}).get(REPORT_KEY, {})
    scheduler_stats.kv_connector_stats = {REPORT_KEY: {**others, **report}}


def take_report(scheduler_stats: Any) -> dict[str, Any] | None:
    """What `attach_report` sent; empties the field for vLLM's own loggers."""
    sent = None if scheduler_stats is None else scheduler_stats.kv_connector_stats
    if not sent or REPORT_KEY not in sent:
        return None
    scheduler_stats.kv_connector_stats = None
    report: dict[str, Any] = sent[REPORT_KEY]
    return report


REPORT_KEY = "adainfer"


def attach_note(output: Any, content: Any) -> None:
    """Send `content` from the worker to the scheduler, in a `ModelRunnerOutput`.

    0.32 has no field for plugins there, but it is pickled, so an extra attribute travels with it.
    V2 wraps it in an `AsyncOutput`, which passes it on once the tokens are known.
    """
    getattr(output, "model_runner_output", output).adainfer = content


def attached_note(output: Any) -> Any:
    """What `attach_note` sent; None if the worker has run no step."""
    return getattr(output, "adainfer", None)
