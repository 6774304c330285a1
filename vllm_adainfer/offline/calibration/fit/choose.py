"""Choose: the exit points with the shortest expected time of a prompt within the bound.

The choice reads the fitted part alone: the held-out rows are for the bound.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.config_rules import are_exit_points
from vllm_adainfer.artifact.kinds import ProbeKind
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.chain import fit_crf_chain
from vllm_adainfer.offline.calibration.fit.cost import Costs, tokens_of
from vllm_adainfer.offline.calibration.fit.exits import FittedExit

MAX_EXIT_POINTS = 8
ALL_SETS_UP_TO = 3  # exit points: all sets of so many are tried
# An exit point must save at least this share of full depth's time to be worth its segment, which
# takes seconds to compile at each start, and whose end those that never exit pass, too. On four
# tasks, 0.002 kept up to twice as many points, which saved the same on unseen prompts.
MIN_GAIN = 0.005
CHOICE_ROWS = 3000


def candidate_layers(
    depth: int, asked: Sequence[int] | None = None, kind: ProbeKind = "label-head"
) -> list[int]:
    """The layers to record: those asked for, or about fifteen spread over the model.

    Only a pooled probe finds something to read before the first layer.

    An AdaInferError if a model of this depth has no such exit points.
    """
    first = 0 if kind == "pooled-label-head" else 1
    if asked is None:
        step = max(1, round(depth / 16))
        return list(range(first * step, depth, step))
    if not are_exit_points(asked, depth) or asked[0] < first:
        raise AdaInferError(
            f"--exit-points must ascend between {first} and {depth - 1} for this model of {depth} "
            f"layers and this probe, got {','.join(map(str, asked))}"
        )
    return list(asked)


def chosen(
    calibration: Calibration, candidates: Sequence[FittedExit], costs: Costs, allowed: float
) -> tuple[list[FittedExit], dict[str, float]]:
    """The exit points chosen among `candidates`, by layer; a layer each if layers were asked for.

    Also the expected times of a prompt, in seconds: ``full_depth``, ``chosen``, ``uniform`` (as
    many exit points, evenly spread).
    """
    tokens = tokens_of(calibration)
    choose = choose_exits if calibration.options.exit_points is None else one_per_layer
    exits = choose(candidates, costs, tokens, allowed)
    sets = {"full_depth": [], "chosen": exits, "uniform": evenly_spread(candidates, len(exits))}
    expected = {n: expected_seconds(some, costs, tokens, allowed) for n, some in sets.items()}
    if calibration.options.classifier == "crf" and exits:
        exits = fit_crf_chain(exits, calibration.target)
    return exits, expected


def choose_exits(
    candidates: Sequence[FittedExit], costs: Costs, tokens: Floats, allowed: float
) -> list[FittedExit]:
    """The set of up to `MAX_EXIT_POINTS`, at most one a layer, with the shortest expected time.

    It is empty if full depth is faster. The first `CHOICE_ROWS` rows decide. The best of all small
    sets is improved step by step: one exit point is added, removed or replaced for as long as that
    shortens the time. `tokens` [rows that fit] are those that the layers run for each, and
    `allowed` is the largest mean loss that the bound allows.
    """
    tokens = tokens[:CHOICE_ROWS]
    worth = MIN_GAIN * expected_seconds([], costs, tokens, allowed)

    @functools.cache
    def seconds(places: frozenset[int]) -> float:
        exits = [candidates[place] for place in sorted(places)]
        return expected_seconds(exits, costs, tokens, allowed) + worth * len(exits)

    def fits(places: frozenset[int]) -> bool:
        layers = {candidates[place].layer for place in places}
        return len(layers) == len(places) <= MAX_EXIT_POINTS

    everywhere = range(len(candidates))
    small = (
        frozenset(places)
        for count in range(ALL_SETS_UP_TO + 1)
        for places in combinations(everywhere, count)
    )
    best = min(filter(fits, small), key=seconds)
    while True:
        others = frozenset(everywhere) - best
        smaller = [best - {place} for place in best]
        larger = [some | {place} for some in (best, *smaller) for place in others]
        nearby = min(filter(fits, (*smaller, *larger)), key=seconds, default=best)
        if seconds(nearby) >= seconds(best):
            return [candidates[place] for place in sorted(best)]
        best = nearby


def one_per_layer(
    candidates: Sequence[FittedExit], costs: Costs, tokens: Floats, allowed: float
) -> list[FittedExit]:
    """All layers of the candidates; an alternative decides where that shortens the time."""
    tokens = tokens[:CHOICE_ROWS]
    best = {exit.layer: exit for exit in candidates if not exit.is_alternative}
    least = expected_seconds([*best.values()], costs, tokens, allowed)
    for other in (exit for exit in candidates if exit.is_alternative):
        found = {**best, other.layer: other}
        seconds = expected_seconds([*found.values()], costs, tokens, allowed)
        if seconds < least:
            best, least = found, seconds
    return [*best.values()]


def expected_seconds(
    exits: Sequence[FittedExit], costs: Costs, tokens: Floats, allowed: float
) -> float:
    """Expected time of a prompt with `exits` at the loosest joint threshold within `allowed`.

    In layers, probes, cuts and head; full depth has no probes and cuts. `tokens` may cover the
    first rows only.
    """
    rows, depth = len(tokens), costs.depth
    if not exits:
        none, deciding = np.ones(1), np.array([1 / tokens.mean()])
        return costs.of_layers(np.array([0, depth]), none, deciding, tokens) + costs.head
    probes = np.cumsum([costs.probe_of(exit) for exit in exits])
    probes = np.append(probes, probes[-1])  # the time that a row has paid when it leaves at each
    where = exits_taken(exits, rows, allowed)
    layers = np.array([*(exit.layer for exit in exits), depth])
    left = np.array([tokens[where > index].sum() for index in range(len(exits))]) / tokens.sum()
    deciding = np.array([np.sum(where > index) for index in range(len(exits))]) / tokens.sum()
    layer_seconds = costs.of_layers(layers, left, deciding, tokens)
    arriving = np.append(1.0, left[:-1])  # shares of a step's tokens
    cuts = costs.cut * tokens.mean() * arriving.sum()
    head = costs.head * np.mean(where == len(exits))
    exposed = costs.exposed(exits[-1].layer, float(left[-1]), tokens)
    return float(layer_seconds + head + probes[where].mean() + cuts + exposed)


def exits_taken(exits: Sequence[FittedExit], rows: int, allowed: float) -> Ints:
    """[rows], where the first rows leave at the loosest joint threshold within `allowed`.

    The index of an exit point, or their number at full depth. As the threshold falls, a row moves
    to an earlier exit point each time the threshold passes the best score before it. Sorted by
    score, these moves are the whole path.
    """
    scores = np.stack([exit.fitted.score[:rows].double().numpy() for exit in exits])
    scores[np.isnan(scores)] = -np.inf  # never passes
    # One more row for full depth, which needs no score and loses nothing.
    losses = np.vstack([*(exit.fitted.loss[:rows] for exit in exits), np.zeros(rows)])

    record = np.vstack([scores[:1] > -np.inf, scores[1:] > np.maximum.accumulate(scores)[:-1]])
    following = np.full(record.shape, len(record))  # the next exit point that is one
    for index in range(len(record) - 2, -1, -1):
        following[index] = np.where(record[index + 1], index + 1, following[index + 1])
    to, row = np.nonzero(record)
    start = following[to, row]  # where the row is until it moves
    score = scores[to, row]
    order = np.argsort(-score, kind="stable")
    to, row, start, score = to[order], row[order], start[order], score[order]

    risk = np.cumsum(losses[to, row] - losses[start, row]) / rows
    ends = np.flatnonzero(np.append(score, -np.inf)[1:] < score)  # equal scores move together
    failing = risk[ends] > allowed + 1e-12
    passing = int(failing.argmax()) if failing.any() else len(ends)
    moved = ends[passing - 1] + 1 if passing else 0
    where = np.full(rows, len(exits))
    where[row[:moved]] = to[:moved]  # the last move counts
    return where


def layers_saved(exits: Sequence[FittedExit], depth: int, allowed: float) -> float:
    """The share of layers that `exits` save on the prompts they were fitted on, out of fold."""
    if not exits:
        return 0.0
    where = exits_taken(exits, len(exits[0].fitted.loss), allowed)
    return 1 - float(np.array([*(exit.layer for exit in exits), depth])[where].mean()) / depth


def evenly_spread(candidates: Sequence[FittedExit], count: int) -> list[FittedExit]:
    """`count` evenly spaced candidates, no alternatives: the choice to beat."""
    candidates = [exit for exit in candidates if not exit.is_alternative]
    places = np.linspace(0, len(candidates) - 1, count + 2)[1:-1].round().astype(int)
    return [candidates[place] for place in sorted(set(places.tolist()))]
