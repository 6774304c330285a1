"""What the policies have decided in one step, kept until it is known who leaves with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.exits.counters import ExitStats
from vllm_adainfer.exits.hidden_states import HiddenStates
from vllm_adainfer.exits.layout import Ints
from vllm_adainfer.exits.shadow import ShadowAnswers
from vllm_adainfer.exits.step import StepContext
from vllm_adainfer.monitoring.monitor import Monitor
from vllm_adainfer.policy.exit_policy import Asked, ExitPolicy
from vllm_adainfer.policy.policy_set import PolicySet


class Decisions:
    """Asks policies about a step's requests, at one exit point after the other."""

    def __init__(
        self,
        policies: PolicySet,
        owners: Ints,
        step: StepContext,
        agreed: Callable[[Tensor], Tensor],
    ) -> None:
        """`owners` [requests] are the policies that decide them; see `ExitLoop` for `agreed`."""
        self._policies = policies
        self._owners = owners
        self._step = step
        self._agreed = agreed
        # By policy, [requests, ...] as in `Decision`: answers are defined where settled.
        self._answers: dict[int, Tensor] = {}
        self._memory: dict[int, Tensor] = {}

    def ask(self, exit_index: int, states: HiddenStates) -> None:
        """Ask about requests that may exit and are not settled; settle those that now are.

        `states` are those of the batch at the exit point.
        """
        step, undecided = self._step, self._step.undecided()
        parts = list(self._policies.rows_by_policy(exit_index, self._owners[undecided]))
        if not parts:
            return
        asked = [undecided[part.rows] for part in parts]
        requests = asked[0] if len(asked) == 1 else np.concatenate(asked)
        tags = self._policies.tags_within(step.tags[requests], self._owners[requests])
        subsets = () if step.subsets is None else (step.subsets[requests],)
        places, device_tags, rows, *bits = step.on_device(
            requests, tags, step.sampled_rows(requests), *subsets
        )
        # Rows are not copied if all are asked about in order, as where tokens are generated.
        if len(requests) < states.num_rows or len(asked) > 1:
            states = states.rows(rows)
        hidden, start = states.combined(), 0
        settled = []
        for part in parts:
            span = slice(start, start + len(part.rows))
            start = span.stop
            memory = self._memory.get(part.policy)
            part_asked = Asked(
                hidden[span],
                device_tags[span],
                None if memory is None else memory[places[span]],
                bits[0][span] if bits else None,
            )
            decision = self._policies.policies[part.policy].decide(part.exit_index, part_asked)
            if decision.memory is not None:
                self._put(self._memory, part.policy, places[span], decision.memory)
            if decision.answers is not None:
                # Also of those that are not settled: picking out the others would make the device
                # wait.
                self._put(self._answers, part.policy, places[span], decision.answers)
            settled.append(decision.settled)
        if not self._answers:  # nobody can be settled
            return
        settled_rows = self._agreed(settled[0] if len(settled) == 1 else torch.cat(settled))
        # The only time that an exit point waits for the device.
        step.settle(requests[settled_rows.cpu().numpy()])

    def _put(self, kept: dict[int, Tensor], policy: int, places: Tensor, values: Tensor) -> None:
        """Keep `values` at `places` of a policy's [requests, ...], made if there is none."""
        if policy not in kept:
            kept[policy] = values.new_empty(self._step.num_requests, *values.shape[1:])
        kept[policy][places] = values

    def early(self) -> Iterator[tuple[ExitPolicy, Ints, Tensor]]:
        """For each policy, the requests that its answers decide, and answers [requests, ...].

        They include requests that stayed to full depth if that spares the LM head: where answers
        are scores, and full depth would score the whole vocabulary.
        """
        exited, answered = self._step.exited, self._step.answered()
        for index, answers in self._answers.items():
            policy = self._policies.policies[index]
            spares_head = policy.answer_ids is not None and not policy.restricted
            requests = answered if spares_head else exited
            requests = requests[self._owners[requests] == index]
            if requests.size:
                yield policy, requests, answers

    def of_shadows(
        self, monitors: Mapping[str, Monitor], stats: ExitStats
    ) -> Iterator[ShadowAnswers]:
        """What shadow requests would have answered, for each policy that has some."""
        step = self._step
        if step.shadow is None:
            return
        for index in np.unique(self._owners[step.shadow]).tolist():
            shadow = step.shadow[self._owners[step.shadow] == index]
            settled = step.settled(shadow)
            [requests] = step.on_device(shadow[settled])
            answers = self._answers.get(index)
            name = self._policies.names[index]
            tags = self._policies.tags_within(step.tags[shadow], self._owners[shadow])
            yield ShadowAnswers(
                name=name,
                policy=self._policies.policies[index],
                monitor=monitors[name],
                stats=stats.by_policy[name],
                request_ids=[step.request_ids[place] for place in shadow.tolist()],
                levels=monitors[name].levels_of(tags),
                settled=settled,
                requests=requests,
                answers=None if answers is None else answers[requests],
                agreed=self._agreed,
            )
