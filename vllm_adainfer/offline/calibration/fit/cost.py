"""Cost: the time of layers, cuts and probes on this machine, for choosing exit points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from adainfer_kernels import Head
from torch import Tensor, nn

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.branch_shapes import MOST_BRANCH_TOKENS
from vllm_adainfer.exits.accounting.clock import Clock
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.exits import FittedExit
from vllm_adainfer.offline.calibration.fit.probes import answers_of_probe
from vllm_adainfer.offline.calibration.fit.training import SERVED_DTYPE
from vllm_adainfer.offline.calibration.record.rows import Rows, ServedModel
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.probe import Probe

ROUNDS = 20
TRAINED_ROUNDS = 5
STEP_ROWS = 2048  # token rows of a full step, vLLM's default on a CPU
HEAD_ROWS = 128  # tokens that a full step yields, likewise


@dataclass(frozen=True)
class Costs:
    """Measured times, in seconds.

    Attributes:
        depth: layers of the model.
        layer: one layer for one token row of a whole step.
        fewer: share of a step's rows -> the share of its time that layers take for them, ascending.
            Where the weights are read for however few rows, time falls less than the rows do.
        cut: one exit point for one token row of a step: the boundary between two segments, and
            gathering the rows that go on.
        probe: layer -> the probe after it, for one prompt.
        head: the LM head for one row; 0 if an early answer needs it as well.
        branch: layer -> the branch after it, likewise, where there is one.
        between: time of the host between the layers of two steps, for one prompt of a step. vLLM's
            asynchronous scheduling hides it behind the layers of the step before; a question waits
            for these, and what hides it then is the layers after the last one. 0 on a CPU.
        own_kv_layers: layers that write keys and values. Only rows that decide a token run others.

    """

    depth: int
    layer: float
    cut: float
    probe: Mapping[int, float]
    own_kv_layers: int
    head: float = 0.0
    fewer: tuple[tuple[float, float], ...] = ()
    branch: Mapping[int, float] = field(default_factory=dict)
    between: float = 0.0

    def exposed(self, last: int, left: float, tokens: Floats) -> float:
        """The time `between` steps that nothing hides once a question was asked after layer `last`.

        The share `left` of a step's tokens goes on from there.
        """
        return max(0.0, self.between - self.layer * tokens.mean() * left * (self.depth - last))

    def probe_of(self, exit: FittedExit) -> float:
        """The time of an exit point's probe for one prompt."""
        return (self.branch if exit.is_branch else self.probe)[exit.layer]

    def of_layers(self, layers: Ints, left: Floats, deciding: Floats, tokens: Floats) -> float:
        """Expected time of a prompt in `layers`: those of the exit points, and full depth.

        `left` [exit points] is the share of a step's tokens that run the layers after each,
        `deciding` the share that is sampled and still runs: only these run the layers that share
        keys and values. `tokens` [rows] are those that the layers run for each.
        """
        # The share of a step's time by the share of its rows; no rows take no time.
        shares, times = np.array([(0.0, 0.0), *self.fewer, (1.0, 1.0)]).T
        own = np.diff(np.minimum(layers, self.own_kv_layers))
        sharing = np.diff(layers) - own
        own_time = min(layers[0], self.own_kv_layers) + own @ np.interp(left, shares, times)
        first_sharing = max(layers[0] - self.own_kv_layers, 0)
        everyone = np.interp(1 / tokens.mean(), shares, times)
        sharing_time = first_sharing * everyone + sharing @ np.interp(deciding, shares, times)
        return float(self.layer * tokens.mean() * (own_time + sharing_time))


def tokens_of(calibration: Calibration) -> Floats:
    """[rows that fit], the token rows that the layers run for each.

    At later tokens of a text, reading a layer's weights is what takes time.
    """
    tokens: Floats = calibration.rows.computed[calibration.fitted]
    return np.ones_like(tokens) if calibration.options.max_tokens > 1 else tokens


def measured_costs(calibration: Calibration, candidates: Sequence[FittedExit]) -> Costs:
    """Time the probes of `candidates`; when the rows were recorded, the layers were timed."""
    rows, model = calibration.rows, calibration.rows.model
    clock = clock_of(model)
    heads = {e.layer: e.probe for e in candidates if e.probe.encoder is None}
    tokens, pooled = float(tokens_of(calibration).mean()), calibration.target.is_pooled
    some = np.arange(min(max(1, round(STEP_ROWS / tokens)), len(rows.tokens)))
    states = rows.final[some]
    asked = rows.read_by_probe(next(iter(heads)), some, pooled) if heads else states
    pool = model.pool_seconds * tokens if pooled else 0.0
    if timed := model.label_head_seconds:
        seconds = dict.fromkeys(heads, pool + timed["prompt" if pooled else "last_token"])
    else:
        seconds = {n: pool + probe_seconds(probe, asked, clock) for n, probe in heads.items()}
    trained = {one.layer: trained_seconds(one, rows, some) for one in calibration.trained}
    student = {layer: time for layer, time in trained.items() if layer == 0}
    head = 0.0
    if calibration.options.max_tokens > 1:  # an early answer of a text needs no LM head
        lens = model.logit_lens.on(clock.device)
        read, weight = lens.readout(states[:HEAD_ROWS].to(clock.device)), lens.head.weight
        head = clock.seconds_of(lambda: nn.functional.linear(read, weight), ROUNDS) / len(read)
    return Costs(
        depth=model.depth,
        layer=model.layer_seconds,
        cut=model.cut_seconds,
        probe=seconds | student,
        own_kv_layers=model.own_kv_layers,
        head=head,
        fewer=shares_of_time(model.fewer),
        branch={layer: time for layer, time in trained.items() if layer > 0},
        between=0.0 if clock.device.type == "cpu" else model.between_seconds / len(some),
    )


def clock_of(model: ServedModel) -> Clock:
    """The clock of what has served `model`, where all of `Costs` are timed."""
    return Clock(torch.device(model.device), model.threads)


def shares_of_time(
    fewer: Sequence[Sequence[tuple[float, float]]],
) -> tuple[tuple[float, float], ...]:
    """`Costs.fewer` from the pairs of several steps, for each number of cuts.

    See `Timings` of the recording loop. Medians, and never falling with more rows.
    """
    medians = [np.median(np.array(pairs), axis=0) for pairs in reversed(fewer) if len(pairs)]
    times = np.maximum.accumulate([min(float(time), 1.0) for _, time in medians] or [1.0])
    rows = [float(share) for share, _ in medians]
    return tuple(zip(rows, times.tolist(), strict=False))


def trained_seconds(trained: TrainedProbe, rows: Rows, some: Ints) -> float:
    """Time of a student or a branch for one prompt, when a step asks it about as many as `some`."""
    prompts = np.unique(rows.prompts)
    prompts = prompts[trained.asked(prompts)][: len(some)]
    clock = clock_of(rows.model)
    probe, inputs = trained.probe.on(clock.device), trained.inputs(prompts)
    if trained.base is None:
        seconds = branch_seconds(probe, torch.cat(list(inputs)), [*map(len, inputs)], clock)
    else:
        nothing = torch.zeros(0, device=clock.device)
        seconds = clock.seconds_of(
            lambda: probe.label_scores(nothing, texts=inputs).cpu(), TRAINED_ROUNDS
        )
    return seconds / len(prompts)


def branch_seconds(branch: Probe, states: Tensor, lens: Sequence[int], clock: Clock) -> float:
    """Time of `branch` for prompts of which `states` are those of all tokens, one after another."""
    states, tokens = states.to(clock.device), np.array(lens)
    return clock.seconds_of(
        lambda: branch.label_scores(branch.project(states), lens=tokens).cpu(), TRAINED_ROUNDS
    )


def untrained_branch_layers(calibration: Calibration) -> float:
    """Time of a branch for prompts like these, in times of a layer for the same prompts."""
    states, model = calibration.rows.final, calibration.rows.model
    tokens = float(tokens_of(calibration).mean())
    encoder = StateEncoder(states.shape[1]).to(SERVED_DTYPE).eval().requires_grad_(False)
    head = Head(torch.zeros(2, encoder.width), torch.zeros(2))
    probe = Probe(head, token_ids=torch.arange(2), encoder=encoder, fused=False)
    clock = clock_of(model)
    length = min(max(1, round(tokens)), MOST_BRANCH_TOKENS)
    lens = [length] * max(1, round(STEP_ROWS / tokens))
    rows = states[torch.arange(length) % len(states)].repeat(len(lens), 1)
    seconds = branch_seconds(probe.on(clock.device), rows, lens, clock)
    return seconds / len(lens) / (model.layer_seconds * tokens)


def probe_seconds(probe: Probe, states: Tensor, clock: Clock) -> float:
    """Time of `probe` for one prompt, when a step probes all `states` [prompts, width].

    Until the host knows what it says: that is what an exit point waits for.
    """
    served, read = probe.on(clock.device), states.to(clock.device)
    return clock.seconds_of(lambda: answers_of_probe(served, read)[0].cpu(), ROUNDS) / len(states)
