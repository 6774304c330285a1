"""The audit: a line for each request that ends, which says where its answer came from."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_adainfer.engine.compat.requests import short_id
from vllm_adainfer.engine.scheduler.decisions import Decisions, requested_fields, with_fields
from vllm_adainfer.engine.scheduler.line_files import LineFiles
from vllm_adainfer.engine.scheduler.observer import Observer, Step
from vllm_adainfer.exits.accounting.report import Provenance
from vllm_adainfer.settings.engine import NO_POLICY
from vllm_adainfer.settings.engine import Audit as AuditSettings

if TYPE_CHECKING:
    from vllm.v1.request import Request

QUEUED = 65_536  # lines that may wait for the disk
LONGEST_ANSWER = 32  # tokens or scores that a line quotes
LONGEST_TRACE = 64  # characters of a `traceparent` of W3C; a client may send any text


@dataclass
class Trail:
    """Where the tokens of one request came from: counts by layers run, and as in `Provenance`.

    `by` is the last policy that decided a token of it; None before its first token. `scores` are
    those of a classifier; None for a request that generates.
    """

    by: Provenance | None = None
    layers: Counter[int] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    full_depth: Counter[str] = field(default_factory=Counter)
    scores: list[float] | None = None

    def add(self, token: Provenance) -> None:
        """Note one more token."""
        if self.by is None or token.policy != NO_POLICY:
            self.by = token
        self.layers[token.layers] += 1
        self.outcomes[token.outcome] += 1
        if token.why_full_depth is not None:
            self.full_depth[token.why_full_depth] += 1


class Audit(Observer):
    """Writes the audit.

    A request runs exactly as it would without. What it costs is one tuple a token, from the worker,
    and one line a request, on another thread.
    """

    def __init__(
        self, settings: AuditSettings, engine: int, depth: int, tokenizer: Any = None
    ) -> None:
        """Open the directory of `settings`, for this `engine` among those that write to it.

        Without a `tokenizer`, no line has probabilities of fields.
        """
        self._trails: dict[str, Trail] = {}
        self._decisions: dict[str, Decisions] = {}
        self._depth = depth
        self._tokenizer = tokenizer
        self._lines = LineFiles("audit", settings, engine, QUEUED, tells_lost=True)

    @override
    def arrived(self, request: Request) -> None:
        """Look for decisions in the schema of an answer whose log-probabilities are asked for."""
        if self._tokenizer is not None and (fields := requested_fields(request)):
            self._decisions[request.request_id] = Decisions(fields)

    @override
    def stepped(self, step: Step) -> None:
        """Note where the tokens of the step came from, and the log-probabilities of decisions."""
        for request_id in self._decisions.keys() & step.requests.keys():
            self._decisions[request_id].add(step.logprobs(request_id))
        for token in () if step.note is None else step.note.decided:
            if token.request_id in step.requests:
                trail = self._trails.setdefault(token.request_id, Trail())
                trail.add(token)
                trail.scores = step.scores(token.request_id)

    @override
    def ended(self, request: Request, why: str | None) -> None:
        trail = self._trails.pop(request.request_id, Trail())
        line = line_of(request, trail, self._depth, why, time.time())
        decisions = self._decisions.pop(request.request_id, None)
        if decisions is None:
            self._lines.put(line)
        else:
            self._lines.put(partial(with_fields, line, decisions, self._tokenizer))

    @override
    def close(self) -> None:
        self._lines.close()


def line_of(
    request: Request, trail: Trail, depth: int, why: str | None, now: float
) -> dict[str, Any]:
    """The line about a request that has ended; `why` in vLLM's words, `now` since 1970."""
    by = trail.by
    trace = (request.trace_headers or {}).get("traceparent")
    answer = list(request.output_token_ids) if trail.scores is None else trail.scores
    return {
        "time": round(now, 3),
        "request": short_id(request.request_id),
        **({} if trace is None else {"traceparent": str(trace)[:LONGEST_TRACE]}),
        "policy": None if by is None or by.policy == NO_POLICY else by.policy,
        "artifact": None if by is None or not by.artifact else by.artifact,
        "epsilon": None if by is None else by.epsilon,
        "outcomes": dict(trail.outcomes),
        "layers": {str(layers): count for layers, count in sorted(trail.layers.items())},
        "depth": depth,
        **({} if by is None or by.not_covered is None else {"not_covered": by.not_covered}),
        **({"why_full_depth": dict(trail.full_depth)} if trail.full_depth else {}),
        "answer": answer[:LONGEST_ANSWER],
        "ended": why,
    }
