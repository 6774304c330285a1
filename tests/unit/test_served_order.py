"""What a policy with `--top` certifies is what it serves, whichever documents leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm import PoolingParams, SamplingParams

from tests.running import new_request, running_requests
from tests.scored import scored
from tests.tiny import LAYERS, tiny_artifact, tiny_config
from vllm_adainfer.arrays import Bools, Floats
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.engine.admission.running import attach_resolved
from vllm_adainfer.engine.model import score_head
from vllm_adainfer.engine.model.score_head import EarlyScoreHead
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.step import CPU, StepContext
from vllm_adainfer.offline.calibration.certify.path import Queries, threshold_path
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.promise.first_documents import FirstDocuments

TOP = FirstDocuments(k=5, margin=0.05)
QUERIES, DOCUMENTS = 60, 20
# The heads' log odds: those of full depth, shrunk, with some noise.
SHRINKS, NOISE, SURE = (0.6, 0.8), 0.06, 0.2
EXIT_POINTS, SHAPE = (2, 5), StackShape((2, 3, 1), head_size=64)


@pytest.fixture(scope="module")
def policy(tiny_model, tmp_path_factory) -> Path:
    """Its heads read one number of a state each; a score is settled from `SURE` on."""
    config = tiny_config(
        tiny_model,
        architecture="LlamaForSequenceClassification",
        score_head="sigmoid",
        labels=(Label(name="no", token_id=0), Label(name="yes", token_id=1)),
        risk="probability",
        top_k=TOP,
        exit_points=EXIT_POINTS,
    )
    tensors = {"thresholds": torch.full((2, len(EXIT_POINTS)), SURE)}
    for place, layer in enumerate(EXIT_POINTS):
        weight = torch.zeros(3, 64)
        weight[1, 1 + place] = 1
        tensors[f"exit.{layer}.head_weight"] = weight
        tensors[f"exit.{layer}.head_bias"] = torch.zeros(3)
        tensors[f"exit.{layer}.classifier"] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    directory: Path = tmp_path_factory.mktemp("ranking") / "policy"
    save_artifact(directory, config, tensors, {}, "card\n")
    return directory


@pytest.fixture(autouse=True)
def one_rank(monkeypatch) -> None:
    monkeypatch.setattr(score_head, "broadcast_from_rank0", lambda values: values)


@pytest.fixture(scope="module")
def states() -> Tensor:
    """fp32 [queries, documents, 64]: the log odds of full depth, then those of each head."""
    draw = np.random.default_rng(0)
    full = draw.normal(0, 1.5, (QUERIES, DOCUMENTS))
    early = [shrink * full + draw.normal(0, NOISE, full.shape) for shrink in SHRINKS]
    known = torch.from_numpy(np.stack([full, *early], axis=2)).float()
    return torch.nn.functional.pad(known, (0, 64 - known.shape[2]))


class Identity:
    """Layers that change no state; the input ids are numbers of documents."""

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        return HiddenStates(self.states[states.hidden]) if segment == 0 else states

    def compact(self, layout: Any) -> Identity:
        return self

    side_batch = compact


class FirstNumber(nn.Module):
    """The score layer of the model."""

    def forward(self, states: Tensor) -> Tensor:
        return states[:, :1].clone()


class Server:
    """A worker and the pooler, for queries whose documents all come in one step."""

    def __init__(self, policy: Path, min_rows_saved: int, ranks: bool = True) -> None:
        artifact = load_artifact(str(policy))
        self.labels = artifact.config.labels
        own = Policy(artifact, CPU)
        policies = PolicySet({"default": own})
        self.loop = ExitLoop(SHAPE, policies, ExactKV(), {}, 100, min_rows_saved)
        switch = {"artifact": str(policy), "finish_choices": False}
        self.running = running_requests(switch, self.loop, prefix_caching=True)

    def describe(self, params: Sequence[Any], forced: Bools) -> StepContext:
        """The step of new requests, each of one token; those `forced` complete the prefix cache."""
        names = [*map(str, range(len(params)))]
        for name, wanted, completes in zip(names, params, forced.tolist(), strict=True):
            request = new_request(wanted, [1], name)
            resolved = self.running.admission.arrival.resolve(name, wanted)
            attach_resolved(request, replace(resolved, force_full_depth_prefill=completes))
            self.running.add(request)
        ones = np.ones(len(names), dtype=np.int64)
        return self.running.describe(names, ones, ones - 1, ones > 0, CPU)

    def scores(self, states: Tensor, forced: Bools) -> Floats:
        """The scores of a query's documents."""
        step = self.describe([PoolingParams(task="classify")] * len(states), forced)
        batch: Any = Identity(states)
        output = self.loop.run(batch, torch.arange(len(states)), step)
        self.step, self.note = step, self.running.take_note()
        head = EarlyScoreHead(FirstNumber(), lambda: output, lambda one: one.judge())
        return np.asarray(head(output.hidden).sigmoid()[:, 0].numpy(), dtype=np.float64)


def certified_losses(states: Tensor) -> Floats:
    """[queries], as calibration counts them at the policy's threshold."""
    full = states[:, :, 0].flatten().sigmoid().double().numpy()
    exits = [
        scored(
            states[:, :, 1 + place].flatten().abs(),
            np.zeros(len(full)),
            relevance=states[:, :, 1 + place].flatten().sigmoid().double().numpy(),
        )
        for place in range(len(EXIT_POINTS))
    ]
    [point] = threshold_path(EXIT_POINTS, exits, LAYERS, [SURE])
    groups = np.repeat(np.arange(len(states)), DOCUMENTS)
    return Queries.of_groups(TOP, groups, full).losses(point)


@pytest.mark.parametrize(
    ("share_forced", "min_rows_saved"),
    [(0.0, 18), (0.1, 1), (0.5, 1), (0.2, 15)],
    ids=["leaving seldom pays", "a tenth forced", "half forced", "both"],
)
def test_served_queries_lose_documents_as_certified_whoever_stays(
    policy, states, share_forced, min_rows_saved
):
    """Heads that shrink scores keep the order among early ones, not among early and full ones."""
    draw, server = np.random.default_rng(1), Server(policy, min_rows_saved)
    served = []
    for query in states:
        found = server.scores(query, draw.random(DOCUMENTS) < share_forced)
        served.append(TOP.breaks(found, query[:, 0].sigmoid().double().numpy()))
    assert served == certified_losses(states).tolist()
    assert 0 < np.mean(served) < 0.05  # of mixed scores, 14 % of the queries lost one


def test_a_document_that_stays_is_answered_early_and_counted_where_it_ran(policy, states):
    """It completes its blocks; the histogram and the layers of the audit are full depth's."""
    server = Server(policy, min_rows_saved=1)
    forced = np.arange(DOCUMENTS) < DOCUMENTS // 2
    found = server.scores(states[0], forced)
    settled = states[0, :, 1].abs() >= SURE
    early = states[0, :, 1].sigmoid()
    assert found[settled] == pytest.approx(early[settled].numpy(), abs=1e-6)
    stayed = np.flatnonzero(forced & settled.numpy())
    assert stayed.size > 2
    assert server.note.complete is not None
    assert {server.note.complete[str(place)] for place in stayed} == {1}
    decided = {place: token for place, *token in server.loop.decided(server.step)}
    assert {tuple(decided[place][1:]) for place in stayed} == {(LAYERS, "early")}
    stats = server.loop.stats.by_policy["default"]
    left = int((settled.numpy() & ~forced).sum())
    assert stats.exit_histogram[EXIT_POINTS[0]] == left
    assert stats.layers_run + stats.layers_skipped == stats.layers_possible == DOCUMENTS * LAYERS


@pytest.mark.parametrize(
    ("promise", "decided"),
    [({"risk": "disagreement"}, False), ({"risk": "accuracy", "bound": "wsr"}, True)],
    ids=["changed answers", "accuracy"],
)
def test_where_early_answers_make_up_for_others_the_answer_of_one_that_stays_is_early(
    tiny_model, tmp_path, promise, decided
):
    """A changed answer that full depth gives after all is no loss: nobody needs to be asked."""
    server = Server(tiny_artifact(tiny_model, tmp_path / "policy", **promise), 1, ranks=False)
    params = SamplingParams(
        max_tokens=1, temperature=0, allowed_token_ids=[one.token_id for one in server.labels]
    )
    step = server.describe([params, params], np.array([True, False]))
    assert step.undecided().tolist() == ([0, 1] if decided else [1])
    assert step.may_leave().tolist() == [1]
    step.settle(step.undecided())
    assert step.answered().tolist() == ([0, 1] if decided else [1])
