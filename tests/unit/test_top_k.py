"""First documents of queries: what an order may lose, how it is certified, watched and sampled."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import Head

from tests.scored import scored
from vllm_adainfer.arrays import Floats
from vllm_adainfer.engine.admission import traffic_sample
from vllm_adainfer.engine.admission.traffic_sample import GroupSample
from vllm_adainfer.engine.compat.requests import LONGEST, begins_group, request_group
from vllm_adainfer.engine.startup.refusals import refuse_policy, refuse_torn_captures
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import certified, certify, rows_allowed
from vllm_adainfer.offline.calibration.certify.path import Queries, threshold_path
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.enough_rows import check_rows, split_of
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.prompts import PREFIX_BLOCK, begin_alike
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.first_documents import FirstDocuments
from vllm_adainfer.settings.engine import Settings

TOP = FirstDocuments(k=2, margin=0.1)


@pytest.mark.parametrize(
    ("early", "full", "lost"),
    [
        ([0.9, 0.8, 0.1], [0.9, 0.8, 0.1], False),
        ([0.8, 0.9, 0.1], [0.9, 0.8, 0.1], False),  # another order, the same documents
        ([0.9, 0.1, 0.2], [0.9, 0.8, 0.1], True),
        ([0.9, 0.1, 0.2], [0.9, 0.45, 0.4], False),  # the second was hardly better than the third
        ([0.1, 0.9, 0.8], [0.9, 0.45, 0.4], True),
        ([0.1, 0.9], [0.9, 0.1], False),  # both are first
        ([0.5, 0.5, 0.5], [0.9, 0.8, 0.1], False),  # ties keep their order, as in /rerank
        ([0.5, 0.5, 0.5], [0.1, 0.8, 0.9], True),
        ([], [], False),
    ],
)
def test_a_document_is_lost_if_it_was_clearly_among_the_first(early, full, lost):
    assert TOP.breaks(np.array(early), np.array(full)) is lost


def test_no_document_is_lost_while_each_score_moves_by_at_most_half_the_margin():
    draw = np.random.default_rng(0)
    for _ in range(500):
        full = draw.random(8)
        early = full + draw.uniform(-TOP.margin / 2, TOP.margin / 2, 8)
        assert not TOP.breaks(early, full)


def test_it_is_what_its_definition_says():
    draw = np.random.default_rng(1)
    found = set()
    for _ in range(2000):
        early, full = draw.random(6), draw.random(6)
        next_score = sorted(full)[-TOP.k - 1]
        kept = sorted(range(6), key=lambda place: -early[place])[: TOP.k]
        clear = {place for place in range(6) if full[place] > next_score + TOP.margin}
        expected = not clear <= {*kept}
        found.add(expected)
        assert TOP.breaks(early, full) is expected
    assert found == {True, False}


DOCUMENTS, LAYERS, DEPTH = 6, [4, 8], 10
PROBE = Probe(Head(torch.zeros(2, 4)))


def population(queries: int, seed: int) -> tuple[list[Scored], Floats, Any]:
    """Documents at two exit points: the surer a score, the smaller its move."""
    draw = np.random.default_rng(seed)
    full = draw.random(queries * DOCUMENTS)
    exits = []
    for noise in (0.3, 0.1):
        moves = draw.normal(0, noise, len(full)) * draw.random(len(full))
        early = np.clip(full + moves, 0, 1)
        score = torch.from_numpy(-np.abs(moves) + draw.normal(0, 0.05, len(full)))
        loss = (np.abs(early - full) > TOP.margin / 2).astype(np.float64)
        exits.append(scored(score, early > 0.5, full > 0.5, loss, early))
    return exits, full, np.repeat(np.arange(queries), DOCUMENTS)


def path_of(exits: list[Scored], rows: Any = None) -> Any:
    scored = exits if rows is None else [one.of_rows(rows) for one in exits]
    grid = [np.inf, *np.linspace(0, -1, 40)]
    return threshold_path(LAYERS, scored, DEPTH, grid)


def test_the_certified_order_loses_documents_in_more_than_epsilon_of_queries_in_few_draws():
    """Over draws of the queries that certify, the true share exceeds epsilon in at most delta."""
    epsilon, delta, draws, sample = 0.1, 0.1, 200, 150
    exits, full, groups = population(3000, seed=0)
    everyone = Queries.of_groups(TOP, groups, full)
    true = {p.threshold: everyone.losses(p).mean() for p in path_of(exits)}
    bound, draw = Bound.promised(PolicyOptions(delta=delta, promise=TOP)), np.random.default_rng(2)
    exceeded, saved = 0, []
    for _ in range(draws):
        chosen = draw.integers(0, 3000, sample)
        rows = (chosen[:, None] * DOCUMENTS + np.arange(DOCUMENTS)).ravel()
        queries = Queries.of_groups(TOP, np.repeat(np.arange(sample), DOCUMENTS), full[rows])
        path = (replace(p, losses=queries.losses(p)) for p in path_of(exits, rows))
        point = certify(path, [epsilon], bound)[epsilon]
        exceeded += true[point.threshold] > epsilon
        saved.append(point.layers_saved)
    assert exceeded / draws <= delta
    assert np.mean(saved) > 0.1


def test_a_query_is_one_row_of_the_bound():
    bound = Bound.promised(PolicyOptions(bound="exact", promise=TOP), np.arange(9), together=20)
    assert (bound.kind, bound.groups, bound.longest) == ("exact", None, 1)


def test_the_choice_of_exit_points_allows_the_rows_what_keeps_the_queries_within_the_bound():
    exits, full, groups = population(400, seed=3)
    queries = Queries.of_groups(TOP, groups, full)
    allowed = rows_allowed(path_of(exits), queries, 0.05)
    within = [p for p in path_of(exits) if p.risk <= allowed]
    assert allowed > 0
    assert queries.losses(within[-1]).mean() <= 0.05
    beyond = next(p for p in path_of(exits) if p.risk > allowed)
    assert queries.losses(beyond).mean() > 0.05


def test_what_is_certified_of_each_of_two_parts_is_a_share_of_queries():
    exits, full, groups = population(800, seed=4)
    fit, held_out = np.split(np.arange(len(full)), 2)
    parts = [
        FittedExit(layer, PROBE, torch.zeros(0), one.of_rows(fit), one.of_rows(held_out))
        for layer, one in zip(LAYERS, exits, strict=True)
    ]
    fitted, queries = (Queries.of_groups(TOP, groups[own], full[own]) for own in (fit, held_out))
    asked = SimpleNamespace(
        options=SimpleNamespace(epsilon=0.1, by_question=False),
        any_exit_point=False,
        rows=SimpleNamespace(model=SimpleNamespace(depth=DEPTH)),
    )
    bound = Bound("exact", 0.1, 0.0)
    terms: Any = SimpleNamespace(
        calibration=asked, queries=queries, fitted_queries=fitted, bound=bound, tests=[]
    )
    (whole, _), (last, _) = certified(terms, parts, parts[1:])
    assert whole[0.1].layers_saved > 0
    for points in whole, last:
        for epsilon, point in points.items():
            assert point.losses.tolist() == queries.losses(point).tolist()
            assert bound.within(epsilon, point.losses) <= epsilon


def test_queries_are_split_and_counted_whole():
    groups = np.repeat(np.arange(400), 5)
    options = PolicyOptions(epsilon=0.1, promise=TOP)
    split = split_of(groups, options)
    certify = len(np.unique(groups[split.certify]))
    assert len(split.certify) == 5 * certify < 1000  # no more than the bound needs
    check_rows(split, options, "data")
    few = split_of(np.repeat(np.arange(30), 5), options)
    with pytest.raises(
        AdaInferError, match=r"at least 43 queries .half of them held out., but data"
    ):
        check_rows(few, options, "data")


@pytest.mark.parametrize(("documents", "held"), [(1, "stand alone"), (2, "at most 2 documents")])
def test_an_order_needs_queries_with_more_documents(documents, held):
    with pytest.raises(AdaInferError, match=rf"--top 2 is about queries .*{held}"):
        TOP.check_groups(np.repeat(np.arange(9), documents), "data")


@pytest.mark.parametrize(
    ("shared", "alike"), [(PREFIX_BLOCK - 1, False), (PREFIX_BLOCK, True), (40, True)]
)
def test_documents_that_a_prefix_cache_would_tear_apart_are_decided_by_their_last_token(
    shared, alike
):
    """One query of three shares so much, and prompts of others share nothing with it."""
    examples = [
        Example("", "", [*range(100, 100 + shared), number], None) for number in range(3)
    ] + [Example("", "", [number] * 50, None) for number in range(6)]
    assert begin_alike(examples, np.repeat(np.arange(3), 3)) is alike


@pytest.mark.parametrize(
    ("request_id", "query", "first"),
    [
        ("score-abc-7-0123abcd", "score-abc", False),
        ("score-abc-0-0123abcd", "score-abc", True),
        ("score-abc-10", "score-abc", False),
        ("score-a-1-0-0123abcd", "score-a-1", True),
        ("0-0123abcd", None, False),  # LLM.score names no query
        ("score-1", None, False),
        # A client chose it: the end of it, which is as long as any id that we keep.
        ("score-" + "x" * 70_000 + "-1-0123abcd", "x" * (LONGEST - len("-1-0123abcd")), False),
    ],
)
def test_documents_of_one_http_request_are_a_query(request_id, query, first):
    assert request_group(request_id) == query
    assert begins_group(request_id) == first


def test_a_sample_takes_queries_whole_and_its_share_of_them():
    sample = GroupSample(0.3, "shadow")
    drawn = [
        {sample.has(f"score-{query}-{place}-{place:08x}", f"score-{query}") for place in range(20)}
        for query in range(2000)
    ]
    assert all(len(one) == 1 for one in drawn)
    assert 0.26 < sum(one == {True} for one in drawn) / 2000 < 0.34


@pytest.mark.parametrize("documents", [1, 7])
def test_a_client_that_uses_an_id_again_learns_nothing_of_the_next_draw(documents):
    """It knows by the time that an answer takes whether its query was drawn."""
    sample, found = GroupSample(0.5, "shadow"), []
    for number in range(50):
        drawn = {
            sample.has(f"score-mine-{place}-{number:08x}", "score-mine")
            for place in range(documents)
        }
        assert len(drawn) == 1
        found += drawn
    assert {*found} == {True, False}


def test_a_sample_remembers_a_limited_number_of_queries(monkeypatch):
    monkeypatch.setattr(traffic_sample, "MOST_GROUPS", 10)
    sample = GroupSample(0.5, "shadow")
    for number in range(100):
        sample.has(f"score-{number}-0", f"score-{number}")
    assert len(sample._first) == 10


@pytest.mark.parametrize(
    ("replicas", "promise", "refused"),
    [(2, TOP, "shadow_rate"), (2, Changed(), None), (1, TOP, None)],
    ids=["an order", "single scores", "one engine"],
)
def test_queries_are_not_watched_where_vllm_spreads_their_documents_over_engines(
    replicas, promise, refused
):
    config: Any = SimpleNamespace(promise=promise, score_head="sigmoid", student=None)
    vllm_config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=replicas),
        model_config=SimpleNamespace(runner_type="pooling"),
    )
    for rate, sentence in ((0, None), (0.1, refused)):
        settings = Settings(artifact="policy", shadow_rate=rate)
        with nullcontext() if sentence is None else pytest.raises(AdaInferError, match=sentence):
            refuse_policy("default", config, vllm_config, settings)


@pytest.mark.parametrize(
    ("replicas", "runner", "refused"),
    [(2, "pooling", True), (2, "generate", False), (1, "pooling", False)],
)
def test_queries_are_not_captured_where_vllm_spreads_their_documents_over_engines(
    replicas, runner, refused
):
    vllm_config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=replicas),
        model_config=SimpleNamespace(runner_type=runner),
    )
    with pytest.raises(AdaInferError, match="capture") if refused else nullcontext():
        refuse_torn_captures(vllm_config)
