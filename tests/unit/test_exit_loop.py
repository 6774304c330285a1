"""How exits work, on a toy stack without vLLM: start reading here.

The toy's hidden states are single numbers. A layer halves a row's state, adds what the row attends
to (the mean of the cached states of its sequence in this layer, its own included) and the layer's
number. So a state shows which layers it has been through, and a key that was never written shows as
NaN. The stack has six layers, cut after two and after four (the exit points) and before the last;
in some tests also before the first.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.exits.recording.recorder import Recorder
from vllm_adainfer.exits.recording.recording_loop import RecordingLoop
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.settings.engine import NO_POLICY
from vllm_adainfer.watch.watch import Watch

EXIT_POINTS, DEPTH = (2, 4), 6
SHAPE = StackShape(segment_layers=(2, 2, 1, 1), head_size=1)
# The last two layers attend to what the fourth does.
SHARING = StackShape(segment_layers=(2, 2, 2), head_size=1, own_kv_layers=4)
FROM_ZERO = StackShape(segment_layers=(0, 4, 1, 1), head_size=1)
SHARING_FROM_ZERO = StackShape(segment_layers=(0, 4, 2), head_size=1, own_kv_layers=4)
FULL_DEPTH, FIRST_EXIT, SECOND_EXIT = -1, 0, 1  # threshold rows
LONGEST = 100


def next_state(state: Tensor, attended: Tensor, layer: int) -> Tensor:
    return state / 2 + attended + layer


class ToyBatch:
    """Rows of some requests in the toy stack, as the loop's `Batch` protocol wants them.

    `cache` [layers, requests, positions] stands for vLLM's KV cache, `executed` counts layers by
    (request, position), `sizes` the rows of each run of a segment.
    """

    def __init__(
        self, shape: StackShape, cache: Tensor, layout: RowLayout, executed: Counter, sizes: list
    ) -> None:
        self.shape, self.cache, self.layout = shape, cache, layout
        self.executed, self.sizes = executed, sizes

    def rows(self) -> list[tuple[int, int]]:
        layout = self.layout
        return list(zip(layout.row_requests.tolist(), layout.positions.tolist(), strict=True))

    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        state = states.hidden.reshape(-1, 1).double()
        assert len(state) == self.layout.num_rows
        self.sizes.append(len(state))
        first = sum(self.shape.segment_layers[:segment])
        for layer in range(first, first + self.shape.segment_layers[segment]):
            if layer < self.shape.kv_layers:
                self.write(layer, state)
            source = min(layer, self.shape.kv_layers - 1)
            attended = [self.cache[source, r, : p + 1].mean() for r, p in self.rows()]
            state = next_state(state, torch.stack(attended).unsqueeze(1), layer)
            self.executed.update(self.rows())
        return HiddenStates(state)

    def write(self, layer: int, state: Tensor) -> None:
        for (request, position), value in zip(self.rows(), state[:, 0], strict=True):
            self.cache[layer, request, position] = value

    def write_last_kv(self, states: HiddenStates) -> None:
        self.write(DEPTH - 1, states.hidden)

    def compact(self, layout: RowLayout) -> ToyBatch:
        return ToyBatch(self.shape, self.cache, layout, self.executed, self.sizes)

    def side_batch(self, layout: RowLayout, last_layer_only: bool = False) -> ToyBatch:
        return self.compact(layout)


class ExitByRow(ExitPolicy):
    """Settles a request at the exit point that is its threshold row."""

    def __init__(self, exit_points: tuple[int, ...]) -> None:
        self.exit_points, self.num_threshold_rows = exit_points, len(exit_points)
        self.probe_inputs = (ProbeInput.LAST_TOKEN,) * len(exit_points)

    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        return Decision(rows.threshold_rows == exit_index, Answers(rows.hidden))


class InPlace(ToyBatch):
    """Each segment overwrites the states of the last, as graphs do."""

    memory: Tensor | None = None

    def run(self, segment: int, states: HiddenStates) -> HiddenStates:
        after = super().run(segment, states).hidden
        self.memory = after if self.memory is None else self.memory.copy_(after)
        return HiddenStates(self.memory)


class Toy:
    """An exit loop over the toy stack, fed step by step."""

    batch = ToyBatch

    def __init__(
        self, kv: Any = None, requests: int = 4, shape: StackShape = SHAPE, **changes: Any
    ) -> None:
        self.shape = shape
        self.cache = torch.full((DEPTH, requests, LONGEST), torch.nan, dtype=torch.float64)
        self.lengths = np.zeros(requests, dtype=np.int64)
        self.executed: Counter = Counter()
        self.sizes: list[int] = []
        settings = {"max_rows": LONGEST, "min_rows_saved": 1, "monitors": {}, **changes}
        exit_points = shape.depth_after(FIRST_EXIT), shape.depth_after(SECOND_EXIT)
        policies = PolicySet({"toy": ExitByRow(exit_points)})
        self.loop = ExitLoop(shape, policies, ExactKV() if kv is None else kv, **settings)

    def step(self, tokens: list[list[int]], exits: list[int], **context: Any) -> Any:
        """Run `tokens` of each request; returns the last state of each, and the output."""
        lens = np.array([len(each) for each in tokens])
        self.lengths += lens
        layout = RowLayout(lens, self.lengths - 1)
        defaults = {"continues": np.ones(len(lens), dtype=bool), "yields_token": lens > 0}
        step = StepContext(
            request_ids=[f"request {place}" for place in range(len(lens))],
            layout=layout,
            threshold_rows=np.array(exits),
            **{**defaults, **context},
        )
        ids = torch.tensor([token for each in tokens for token in each])
        batch = self.batch(self.shape, self.cache, layout, self.executed, self.sizes)
        output = self.loop.run(batch, ids, step)
        return output.hidden[layout.ends[lens > 0] - 1, 0].tolist(), output


def oracle(tokens: list[int], depth: int, kv_layers: int = DEPTH) -> tuple[float, Tensor]:
    """The last token's state after `depth` layers, and the cache: all others ran at full depth."""
    state = torch.tensor(tokens, dtype=torch.float64)
    cache, last = [], float(state[-1])
    for layer in range(DEPTH):
        cache.append(state)
        attended = cache[min(layer, kv_layers - 1)]
        means = attended.cumsum(0) / torch.arange(1, len(tokens) + 1)
        state = next_state(state, means, layer)
        if layer + 1 == depth:
            last = float(state[-1])
    return last, torch.stack(cache)


PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3]]
EXITS = [FIRST_EXIT, FULL_DEPTH, SECOND_EXIT, FIRST_EXIT]
DEPTHS = [2, 6, 4, 2]


def test_each_request_runs_the_layers_up_to_its_exit_point_and_gets_the_answer_from_there():
    """Work is counted where layers run, for the policy that decides."""
    toy = Toy()
    found, _ = toy.step(PROMPTS, EXITS, continues=np.zeros(4, dtype=bool))
    assert found == pytest.approx([oracle(p, d)[0] for p, d in zip(PROMPTS, DEPTHS, strict=True)])
    assert toy.executed == {
        (request, position): DEPTHS[request]
        for request, prompt in enumerate(PROMPTS)
        for position in range(len(prompt))
    }
    assert toy.sizes == [10, 6, 2, 2], "the batch shrinks at both exit points"
    toys, deep = toy.loop.stats.by_policy["toy"], toy.loop.stats.by_policy[NO_POLICY]
    assert (toys.layers_run, toys.layers_skipped) == (3 * 2 + 4 * 4 + 1 * 2, 3 * 4 + 4 * 2 + 1 * 4)
    assert (deep.layers_run, deep.layers_skipped) == (2 * 6, 0)
    assert toys.exit_histogram == {2: 2, 4: 1}


def test_a_settled_request_stays_where_too_few_rows_would_leave_with_it():
    toy = Toy(min_rows_saved=5)
    found, _ = toy.step(PROMPTS, EXITS)
    # Four rows are ready at the first exit point, eight at the second: there all three leave.
    assert found == pytest.approx(
        [oracle(p, d)[0] for p, d in zip(PROMPTS, [2, 6, 4, 2], strict=True)]
    ), "an answer stays the one that was settled"
    assert toy.sizes == [10, 10, 2, 2]


@pytest.mark.parametrize(
    ("changes", "context", "asked"),
    [
        ({}, {}, 0),
        ({"monitors": {"toy": Watch([0.05], 0.1)}}, {"is_shadow": [True] + [False] * 3}, 2),
        ({"answers_stand": True}, {}, 2),
        ({"min_rows_saved": 8}, {}, 2),
    ],
    ids=["nobody could leave", "a shadow request", "answers stand", "enough might leave"],
)
def test_nobody_is_asked_who_could_not_leave_by_the_answer(monkeypatch, changes, context, asked):
    """Eight rows may leave, two may not; to pay, nine must leave together."""
    monkeypatch.setattr(ExitByRow, "answers_stand", changes.pop("answers_stand", False))
    context = {name: np.array(value) for name, value in context.items()}
    toy, questions = Toy(**{"min_rows_saved": 9, **changes}), []
    decide = ExitByRow.decide

    def counted(self: ExitByRow, exit_index: int, rows: UndecidedRows) -> Decision:
        questions.append(exit_index)
        return decide(self, exit_index, rows)

    monkeypatch.setattr(ExitByRow, "decide", counted)
    found, _ = toy.step(PROMPTS, EXITS, **context)
    assert len(questions) == asked
    if not asked:
        assert found == pytest.approx([oracle(prompt, DEPTH)[0] for prompt in PROMPTS])


def test_who_was_not_asked_at_one_exit_point_is_asked_at_no_later_one():
    """A policy promises the first answer that settles a request, and that one was never sought.

    Eight of 88 rows may leave: too few at the first exit point. At the second, which is where later
    layers write no keys and values, the rows that yield no token are gone.
    """
    toy = Toy(requests=2, shape=SHARING, min_rows_saved=None, compaction_cost=50)
    context = {"yields_token": np.array([False, True]), "continues": np.zeros(2, dtype=bool)}
    toy.step([[3, 1, 4, 1] * 20, [7] * 8], [FULL_DEPTH, SECOND_EXIT], **context)
    assert toy.executed[1, 7] == DEPTH


def test_an_answer_outlives_the_states_that_it_was_read_from():
    """All are asked, so none is copied for that; the first is settled, and stays."""
    toy = Toy(min_rows_saved=4)
    toy.batch = InPlace
    found, _ = toy.step([[3], [5], [9], [2]], [FIRST_EXIT, *[SECOND_EXIT] * 3])
    depths = [2, 4, 4, 4]
    texts = [[3], [5], [9], [2]]
    assert found == pytest.approx([oracle(t, d)[0] for t, d in zip(texts, depths, strict=True)])


def test_requests_that_leave_before_the_first_layer_run_none():
    toy = Toy(shape=FROM_ZERO)
    found, _ = toy.step(PROMPTS, [FIRST_EXIT] * 4, continues=np.zeros(4, dtype=bool))
    assert found == [prompt[-1] for prompt in PROMPTS], "the embedding of each last token"
    assert toy.executed == {}
    assert toy.cache.isnan().all()
    toys = toy.loop.stats.by_policy["toy"]
    assert (toys.layers_run, toys.layers_skipped, toys.layers_possible) == (0, 60, 60)
    assert toys.exit_histogram == {0: 4}


def test_a_chunk_before_the_last_of_a_prompt_never_leaves():
    toy = Toy(requests=2)
    toy.step([[3, 1], [7]], [FIRST_EXIT, FIRST_EXIT], yields_token=np.array([False, True]))
    assert toy.executed == {(0, 0): DEPTH, (0, 1): DEPTH, (1, 0): 2}


def test_rows_that_decide_no_request_only_get_keys_and_values_in_the_last_layer():
    toy, prompt = Toy(requests=2), [3, 1, 4, 1] * 20
    found, _ = toy.step([prompt, [7]], [FULL_DEPTH, FULL_DEPTH])
    full_depth, cache = oracle(prompt, DEPTH)
    assert found[0] == pytest.approx(full_depth)
    assert torch.allclose(toy.cache[:, 0, :80], cache)
    assert toy.sizes == [81, 81, 81, 2]


def test_where_later_layers_write_no_keys_and_values_rows_that_decide_nothing_stop():
    toy, prompt = Toy(requests=2, shape=SHARING), [3, 1, 4, 1] * 20
    found, _ = toy.step([prompt, [7]], [FULL_DEPTH, FULL_DEPTH])
    full_depth, cache = oracle(prompt, DEPTH, SHARING.kv_layers)
    assert found[0] == pytest.approx(full_depth)
    assert torch.allclose(toy.cache[:4, 0, :80], cache[:4])
    assert toy.sizes == [81, 81, 2]
    deep = toy.loop.stats.by_policy[NO_POLICY]
    assert deep.layers_run == sum(toy.executed.values()) == 81 * 4 + 2 * 2
    assert deep.layers_skipped == 79 * 2
    assert deep.layers_run + deep.layers_skipped == deep.layers_possible


def test_a_token_that_leaves_where_later_layers_write_nothing_leaves_nothing_missing():
    toy = Toy(requests=2, shape=SHARING)
    toy.step([[3, 1], [7]], [SECOND_EXIT, FIRST_EXIT])
    assert [toy.loop.kv.missing(f"request {place}", 2) for place in range(2)] == [0, 1]
    found, _ = toy.step([[4], [1]], [FULL_DEPTH, FULL_DEPTH])
    wanted = [oracle(text, DEPTH, SHARING.kv_layers)[0] for text in ([3, 1, 4], [7, 1])]
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("max_rows", [LONGEST, 4], ids=["rejoins", "catches up in parts"])
def test_exact_kv_runs_skipped_layers_with_the_next_token_that_goes_there(max_rows):
    toy, text = Toy(requests=1, max_rows=max_rows), [3, 1, 4, 1, 5, 9, 2, 6]
    for position, exit in enumerate([FIRST_EXIT, SECOND_EXIT, FIRST_EXIT, FIRST_EXIT, FIRST_EXIT]):
        toy.step([[text[position]]], [exit])
    assert toy.cache[4, 0, 0].isnan(), "the layers that the first token skipped are not run yet"
    [found], _ = toy.step([[text[5]]], [FULL_DEPTH])
    full_depth, cache = oracle(text[:6], DEPTH)
    assert found == pytest.approx(full_depth)
    assert torch.allclose(toy.cache[:, 0, :6], cache)
    assert max(toy.sizes) <= max_rows


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "shape",
    [SHAPE, SHARING, FROM_ZERO, SHARING_FROM_ZERO],
    ids=["own", "shared", "own, from zero", "shared, from zero"],
)
def test_drawn_exits_give_the_oracles_states_whatever_left_before(shape, seed):
    """Several requests, prompts and tokens, with `exact`: others' exits change nobody's state."""
    generator = np.random.default_rng(seed)
    cost, max_rows = int(generator.choice([1, 64])), int(generator.integers(8, LONGEST))
    toy = Toy(ExactKV(capacity=6), shape=shape, max_rows=max_rows, compaction_cost=cost)
    texts: list[list[int]] = [[], [], [], []]
    for _ in range(12):
        lens = generator.integers(0, 3, 4)
        if not lens.any():
            continue
        tokens = [generator.integers(1, 9, count).tolist() for count in lens]
        exits = generator.integers(FULL_DEPTH, 2, 4)
        overdue = toy.loop.kv.overdue()
        exits[[f"request {place}" in overdue for place in range(4)]] = FULL_DEPTH
        found, _ = toy.step(tokens, exits.tolist())
        texts = [text + more for text, more in zip(texts, tokens, strict=True)]
        wanted = [
            oracle(
                text,
                DEPTH if exit == FULL_DEPTH else shape.depth_after(exit),
                shape.kv_layers,
            )[0]
            for text, exit, count in zip(texts, exits, lens, strict=True)
            if count
        ]
        assert found == pytest.approx(wanted)
    waiting = sum(toy.loop.kv.missing(f"request {place}", 0) for place in range(4))
    assert waiting or not toy.loop.kv._waiting
    for place in range(4):
        toy.loop.forget(f"request {place}")
    for own in toy.loop.stats.by_policy.values():
        assert own.layers_run + own.layers_skipped == own.layers_possible


@pytest.mark.parametrize(("threshold", "differs"), [(6.0, True), (100.0, False)])
def test_a_shadow_request_runs_to_full_depth_and_its_early_answer_is_compared(threshold, differs):
    monitor = Watch([0.1, 0.2], alpha=0.1)
    toy = Toy(requests=2, monitors={"toy": monitor})
    found, output = toy.step(
        [[3, 1], [7]], [FIRST_EXIT, FIRST_EXIT], is_shadow=np.array([True, False])
    )
    assert found == pytest.approx([oracle([3, 1], DEPTH)[0], oracle([7], 2)[0]])
    [shadow] = output.shadows
    assert shadow.answers.values.flatten().tolist() == pytest.approx([oracle([3, 1], 2)[0]])

    def head(states: Tensor) -> Tensor:
        """Token 1 for a state above the threshold, else token 0."""
        return torch.cat([torch.full_like(states, threshold), states], dim=1)

    shadow.compare(head(output.hidden[[1, 2]]), head).judge()
    reading = monitor.readings()[FIRST_EXIT]
    assert (reading.checked, reading.disagreed) == (1, differs)


@pytest.mark.parametrize("layers", [(2, 4, DEPTH), (0, 2, 4, DEPTH)])
def test_a_recording_loop_runs_everything_and_keeps_the_states(layers):
    recorder = Recorder(layers, lens=None)
    toy = Toy(requests=2)
    segments = np.diff([0, *layers, DEPTH]).tolist()  # the last one: the final norm
    toy.shape = StackShape(segments, head_size=1)
    toy.loop = RecordingLoop(toy.shape, recorder)
    toy.step([[3, 1], [7]], [FULL_DEPTH] * 2, record_rows=np.array([0, 1]))
    taken, _ = recorder.take()
    for layer in layers:
        wanted = [oracle([3, 1], layer)[0], oracle([7], layer)[0]]
        name = "final" if layer == DEPTH else f"layer.{layer}"
        assert taken[name].flatten().tolist() == pytest.approx(wanted)
    assert taken["tags"].tolist() == [0, 1]
    assert toy.loop.stats.layers_run == toy.loop.timings.layers_run == 3 * DEPTH
    rehearsed = 2 * (3 + 1) * 2  # each twice, of all rows and of those of one request: two layers
    assert sum(toy.executed.values()) == 3 * DEPTH + rehearsed
