"""The decisions of the policies in one step, kept until it is known who leaves by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from adainfer_kernels import normed
from torch import Tensor

from vllm_adainfer.arrays import AnyArray, Ints
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.loop.forward_pass import ForwardPass
from vllm_adainfer.exits.loop.loop import ScoredRequests
from vllm_adainfer.exits.loop.pooling import CarriedPrompts, PooledPrompts
from vllm_adainfer.exits.loop.shadow import ShadowAnswers
from vllm_adainfer.exits.loop.step import NOBODY
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import Decision, UndecidedRows
from vllm_adainfer.policy.policy_set import PolicyRows, PolicySet
from vllm_adainfer.transfers import HostCopy
from vllm_adainfer.watch.units import NO_LEVEL
from vllm_adainfer.watch.watch import Watch

Reader: TypeAlias = tuple[PolicyRows, Ints]  # a policy, and the requests that it reads


class Decisions:
    """Lets policies decide a step's requests, at one exit point after the other."""

    def __init__(
        self,
        policies: PolicySet,
        forward: ForwardPass,
        carried: CarriedPrompts,
        read: Callable[[Tensor], AnyArray],
    ) -> None:
        """Decide requests of `forward`; see `ExitLoop` for `carried` and `read`."""
        self._policies = policies
        self._forward = forward
        self._step = forward.step
        self._read = read
        self._prompts = PooledPrompts(forward.step, carried)
        self._carried_on = NOBODY  # the chunks that policies have read at the last exit point
        # By policy, for all requests of the step; answers are valid where settled.
        self._answers: dict[int, Answers] = {}
        self._memory: dict[int, Tensor] = {}

    @property
    def has_chunks(self) -> bool:
        """Whether prompts in the batch continue in later steps, and a pooled policy reads them."""
        return self._prompts.chunks.size > 0

    def decide(self, exit_index: int) -> None:
        """Decide the requests that may exit and are not settled; settle those that now are."""
        step, undecided = self._step, self._step.undecided()
        policies = self._policies.policies
        asked = [
            (part, self._asked(undecided[part.rows], part.probe_input))
            for part in self._policies.rows_by_policy(exit_index, self._forward.owners[undecided])
        ]
        waiting = self._prompts.chunks
        chunks = [
            (part, waiting[part.rows])
            for part in self._policies.rows_by_policy(exit_index, self._forward.owners[waiting])
        ]
        prompt, last_token = ProbeInput.PROMPT, ProbeInput.LAST_TOKEN
        self._carried_on = _who_read(prompt, chunks)
        states = {  # once for all policies
            prompt: self._means(exit_index, _who_read(prompt, asked), self._carried_on),
            last_token: self._last_states(_who_read(last_token, asked)),
        }
        of_branches = self._own_states(exit_index, asked, chunks)
        requests = asked[0][1] if len(asked) == 1 else _who_read(None, asked)
        if not requests.size:
            return
        own_rows = self._policies.own_rows(
            step.threshold_rows[requests], self._forward.owners[requests]
        )
        subsets = () if step.subsets is None else (step.subsets[requests],)
        places, threshold_rows, *bits = step.on_device(requests, own_rows, *subsets)
        start = 0
        settled = []
        of_objects = np.zeros(len(requests), np.bool_)
        for part, own in asked:
            span = slice(start, start + len(own))
            start = span.stop
            if not own.size:
                continue
            memory = self._memory.get(part.policy)
            hidden, lens = self._forward.states.hidden[:0], NOBODY
            if part.probe_input in states:
                hidden, states[part.probe_input] = states[part.probe_input].split_with_sizes(
                    [len(own), len(states[part.probe_input]) - len(own)]
                )
            elif part.probe_input is ProbeInput.OWN_STATES:
                hidden, lens = of_branches[part.policy]
            if policies[part.policy].decides_objects and part.probe_input in states:
                hidden = self._of_fields(own, part.probe_input, hidden)
            decision = policies[part.policy].decide(
                part.exit_index,
                UndecidedRows(
                    hidden,
                    threshold_rows[span],
                    None if memory is None else memory[places[span]],
                    bits[0][span] if bits else None,
                    self._texts(own, part.probe_input),
                    lens,
                ),
            )
            self._keep(part.policy, decision, places[span])
            if decision.codes is None:
                settled.append(decision.settled)
            else:  # both in one number, negative where it is not settled
                settled.append(torch.where(decision.settled, decision.codes, ~decision.codes))
                of_objects[span] = True
        # The only time that an exit point waits for the device.
        found = self._read(settled[0] if len(settled) == 1 else torch.cat(settled))
        if not of_objects.any():
            step.settle(requests[found])
            return
        codes = found[of_objects].astype(np.int64)
        step.codes[requests[of_objects]] = np.maximum(codes, ~codes)
        step.settle(requests[np.where(of_objects, found >= 0, found > 0)])

    def _keep(self, policy: int, decision: Decision, places: Tensor) -> None:
        """Keep the memory and the answers of the requests at `places`.

        Also of those that are not settled: to pick out the others, the device would wait.
        """
        everyone = len(places) == self._step.num_requests
        if decision.memory is not None:
            if everyone:
                self._memory[policy] = decision.memory
            else:
                if policy not in self._memory:
                    self._memory[policy] = self._for_all(decision.memory)
                self._memory[policy][places] = decision.memory
        if everyone and decision.answers.token_ids is not None:
            self._answers[policy] = decision.answers  # new memory, unlike some answers as states
            return
        if policy not in self._answers:
            values = self._for_all(decision.answers.values)
            self._answers[policy] = replace(decision.answers, values=values)
        self._answers[policy].values[places] = decision.answers.values

    def _asked(self, requests: Ints, probe_input: ProbeInput) -> Ints:
        """Those of `requests` that a policy that reads this can decide."""
        if probe_input is not ProbeInput.TEXT:
            return requests
        texts = self._step.texts or ()
        return requests[[bool(texts[request]) for request in requests.tolist()]]

    def _texts(self, requests: Ints, probe_input: ProbeInput) -> Sequence[Sequence[int]]:
        """See `UndecidedRows.texts`."""
        if probe_input is not ProbeInput.TEXT or self._step.texts is None:
            return ()
        return [self._step.texts[request] for request in requests.tolist()]

    def _means(self, exit_index: int, requests: Ints, chunks: Ints) -> Tensor:
        """The input of pooled heads for `requests`; sums of `chunks` are carried on."""
        forward = self._forward
        if not requests.size and not chunks.size:
            return forward.states.hidden[:0]
        return self._prompts.read(exit_index, requests, chunks, forward.layout, forward.states)

    def recorded_means(self, exit_index: int) -> Tensor:
        """fp32 [recorded, hidden size], the mean of the normed states of each recorded prompt.

        NaN where some rows of it never ran. Sums of prompts that continue in a later step are
        carried on, once at each exit point: call it after `decide`.
        """
        step, forward = self._step, self._forward
        recorded = NOBODY if step.recorded is None else step.recorded.places
        size = forward.states.hidden.shape[1]
        means = forward.states.hidden.new_full(
            (len(recorded), size), torch.nan, dtype=torch.float32
        )
        if step.keeps_means is None:
            return means
        whole = np.flatnonzero(step.keeps_means[recorded])
        waiting = self._prompts.chunks
        chunks = np.setdiff1d(waiting[step.keeps_means[waiting]], self._carried_on)
        if whole.size or chunks.size:
            read = self._means(exit_index, recorded[whole], chunks)
            [places] = step.on_device(whole)
            means[places] = read[:, size:]
        return means

    def _own_states(
        self, exit_index: int, asked: Sequence[Reader], chunks: Sequence[Reader]
    ) -> dict[int, tuple[Tensor, Ints]]:
        """By policy, what its branch reads of prompts, and of how many tokens of each."""
        forward, found = self._forward, {}
        requests, waiting = (
            {part.policy: own for part, own in some if part.probe_input is ProbeInput.OWN_STATES}
            for some in (asked, chunks)
        )
        for part, _ in (*asked, *chunks):
            if part.probe_input is ProbeInput.OWN_STATES and part.policy not in found:
                probe = self._policies.policies[part.policy].probes[part.exit_index]
                found[part.policy] = self._prompts.read_states(
                    exit_index,
                    probe.project,
                    requests.get(part.policy, NOBODY),
                    waiting.get(part.policy, NOBODY),
                    forward.layout,
                    forward.states,
                )
        return found

    def _last_states(self, requests: Ints) -> Tensor:
        """[requests, hidden size], the state of the last token of each."""
        states, last_rows = self._forward.states, self._forward.layout.last_rows(requests)
        # No copy if all rows are read in order, as where tokens are generated.
        if len(last_rows) < states.num_rows or (np.diff(last_rows) < 0).any():
            [rows] = self._step.on_device(last_rows)
            states = states.rows(rows)
        return states.combined()

    def _of_fields(self, requests: Ints, probe_input: ProbeInput, read: Tensor) -> Tensor:
        """[requests, fields, width], what probes of objects read, see `UndecidedRows.hidden`.

        `read` [requests, width] is what others read of these requests.
        """
        field_rows = self._step.field_rows(requests, self._forward.layout)
        [rows] = self._step.on_device(field_rows.ravel())
        states = replace(self._forward.states, per_layer=None).rows(rows).combined()
        if probe_input is ProbeInput.LAST_TOKEN:
            return states.view(*field_rows.shape, -1)
        own = normed(states).view(*field_rows.shape, -1)
        means = read[:, own.shape[2] :].unsqueeze(1).expand_as(own)
        return torch.cat([own, means], dim=2)

    def _for_all(self, values: Tensor) -> Tensor:
        """Room for such values [rows, ...] of all requests, not initialised."""
        return values.new_empty(self._step.num_requests, *values.shape[1:])

    def place(self, hidden: Tensor) -> tuple[ScoredRequests, ...]:
        """Write answers that are states to `hidden`, the LM head's input; return the scores.

        They include answers of requests that stayed to full depth, where those stand.
        """
        step = self._step
        exited, answered, scored = step.exited, step.answered(), []
        for index, answers in self._answers.items():
            requests = answered if self._policies.answers_stand[index] else exited
            requests = requests[self._forward.owners[requests] == index]
            if not requests.size:
                continue
            if self._policies.policies[index].decides_objects:
                self._read_values(requests, answers)
                continue
            if answers.token_ids is not None:
                [places] = step.on_device(requests)
                scored.append((requests, answers.subset(places)))
            else:
                places, rows = step.on_device(requests, step.layout.last_rows(requests))
                hidden[rows] = answers.values[places]
        return tuple(scored)

    def _read_values(self, requests: Ints, answers: Answers) -> None:
        """Copy the log-probabilities of values to the host for those of `requests` that read them.

        No logits tell of objects: the scheduler writes them.
        """
        step = self._step
        if step.reads_values is None or not answers.has_rest:
            return
        own = requests[step.reads_values[requests]]
        if own.size:
            [places] = step.on_device(own)
            for place, row in zip(own.tolist(), self._read(answers.scores[places]), strict=True):
                step.value_logprobs[place] = tuple(row.tolist())

    def of_shadows(
        self, monitors: Mapping[str, Watch], stats: ExitStats, send: Callable[[Tensor], HostCopy]
    ) -> Iterator[ShadowAnswers]:
        """The early answers of shadow requests, for each policy that has some; see `ExitLoop`.

        An order is also that of documents which no policy may decide. Objects are not among them,
        see `ShadowObjects`.
        """
        step = self._step
        if step.shadow is None:
            return
        names, undecidable = self._policies.names, step.shadow_at_full_depth()
        owners = self._forward.owners[step.shadow]
        seen = set(owners.tolist())
        if undecidable.size:
            of_queries = {name for name, watch in monitors.items() if watch.queries is not None}
            seen |= {index for index, name in enumerate(names) if name in of_queries}
        for index in sorted(seen):
            if self._policies.policies[index].decides_objects:
                continue
            name, own = names[index], step.shadow[owners == index]
            monitor = monitors[name]
            own_rows = self._policies.own_rows(step.threshold_rows[own], self._forward.owners[own])
            shadow, levels = own, monitor.levels_of(own_rows)
            if monitor.queries is not None:
                shadow = np.concatenate([own, undecidable])
                levels = np.concatenate([levels, np.full(len(undecidable), NO_LEVEL)])
            settled = step.settled(shadow)
            [requests] = step.on_device(shadow[settled])
            answers = self._answers.get(index)
            yield ShadowAnswers(
                name=name,
                policy=self._policies.policies[index],
                monitor=monitor,
                stats=stats.by_policy[name],
                request_ids=[step.request_ids[place] for place in shadow.tolist()],
                levels=levels,
                settled=settled,
                everyone=shadow,
                requests=requests,
                subsets=None if step.subsets is None else step.subsets[shadow],
                answers=None if answers is None else answers.subset(requests),
                send=send,
            )


def _who_read(probe_input: ProbeInput | None, readers: Sequence[Reader]) -> Ints:
    """The requests of policies that read this; None: of all policies."""
    some = [own for part, own in readers if probe_input in (None, part.probe_input)]
    return np.concatenate([NOBODY, *some])
