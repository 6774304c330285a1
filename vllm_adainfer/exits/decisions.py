"""What the policies have said in one step, kept until it is known who leaves with it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.engine.ranks import agreed
from vllm_adainfer.exits.layout import Ints
from vllm_adainfer.exits.residual import Stream
from vllm_adainfer.exits.shadow import ShadowAnswers
from vllm_adainfer.exits.step import StepContext
from vllm_adainfer.policy.exit_policy import ExitPolicy
from vllm_adainfer.policy.policy_set import PolicySet


class Decisions:
    """Asks policies about a step's requests, at one exit point after the other."""

    def __init__(self, policies: PolicySet, owners: Ints, step: StepContext) -> None:
        """`owners` [requests] are the policies that decide them."""
        self._policies = policies
        self._owners = owners
        self._step = step
        # By policy, [requests, ...] as in `Decision`: answers are defined where settled.
        self._answers: dict[int, Tensor] = {}
        self._memory: dict[int, Tensor] = {}

    def ask(self, exit_index: int, stream: Stream) -> None:
        """Ask about those in the batch who may exit and are not settled; settle who now is."""
        step, undecided = self._step, self._step.undecided()
        parts = list(self._policies.asked(exit_index, self._owners[undecided]))
        if not parts:  # then nothing is read, either
            return
        asked = [undecided[part.rows] for part in parts]
        every = asked[0] if len(asked) == 1 else np.concatenate(asked)
        own_tags = self._policies.own_tags(step.tags[every], self._owners[every])
        places, tags, rows = step.on_device(every, own_tags, step.sampled_rows(every))
        # Else tokens are generated: every row is asked about, in order.
        if len(every) < stream.num_rows or len(asked) > 1:
            stream = stream.rows(rows)
        hidden, start = stream.whole(), 0
        settled = []
        for part, requests in zip(parts, asked, strict=True):
            here = slice(start, start + len(requests))
            start = here.stop
            memory = self._memory.get(part.policy)
            decision = self._policies.policies[part.policy].decide(
                part.exit_index,
                hidden[here],
                tags[here],
                None if memory is None else memory[places[here]],
            )
            if decision.memory is not None:
                self._put(self._memory, part.policy, places[here], decision.memory)
            if decision.answers is not None:
                # Of those that are not settled, too: to pick the others out, the device would have
                # to wait.
                self._put(self._answers, part.policy, places[here], decision.answers)
            settled.append(decision.settled)
        if not self._answers:  # nobody can be settled
            return
        said = agreed(settled[0] if len(settled) == 1 else torch.cat(settled))
        step.settle(every[said.cpu().numpy()])  # the one read of an exit point

    def _put(self, kept: dict[int, Tensor], policy: int, places: Tensor, values: Tensor) -> None:
        """Keep `values` at `places` of a policy's [requests, ...], made if there is none."""
        if policy not in kept:
            kept[policy] = values.new_empty(self._step.num_requests, *values.shape[1:])
        kept[policy][places] = values

    def early(self) -> Iterator[tuple[ExitPolicy, Ints, Tensor]]:
        """Of each policy, the requests that its answers are to decide, and answers [requests, ...].

        Requests that stayed in are among them if that spares the LM head: where answers are scores,
        and full depth would score the whole vocabulary.
        """
        left, answered = self._step.left, self._step.answered()
        for index, answers in self._answers.items():
            policy = self._policies.policies[index]
            spares_head = policy.answer_ids is not None and not policy.restricted
            requests = answered if spares_head else left
            requests = requests[self._owners[requests] == index]
            if requests.size:
                yield policy, requests, answers

    def of_shadows(self) -> Iterator[ShadowAnswers]:
        """What shadow requests would have answered, of each policy that has some."""
        step = self._step
        if step.shadow is None:
            return
        for index in np.unique(self._owners[step.shadow]).tolist():
            shadow = step.shadow[self._owners[step.shadow] == index]
            settled = step.settled(shadow)
            [requests] = step.on_device(shadow[settled])
            answers = self._answers.get(index)
            yield ShadowAnswers(
                name=self._policies.names[index],
                policy=self._policies.policies[index],
                request_ids=[step.request_ids[place] for place in shadow.tolist()],
                tags=self._policies.own_tags(step.tags[shadow], self._owners[shadow]),
                settled=settled,
                requests=requests,
                answers=None if answers is None else answers[requests],
            )
