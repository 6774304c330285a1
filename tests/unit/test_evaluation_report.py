"""What `evaluate` reports of runs whose times, depths and answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from tests.tiny import LAYERS, tiny_config
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.report import build_report, summary_line
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run, Times
from vllm_adainfer.offline.evaluation.same_pass import SamePass
from vllm_adainfer.offline.facts.document import as_text
from vllm_adainfer.offline.reports.evaluation_facts import evaluation_facts

EXAMPLES = [Example(f"line {number}", "a review", list(range(10)), None) for number in range(4)]
STRICT, OURS = 0.02, 0.05  # the tiny artifact's levels; the second is its own
FULL_DEPTH = {LAYERS: 4}


def run(seconds: float, answers: str, exits: dict[int, int] = FULL_DEPTH) -> Run:
    """A digit per prompt is its answer; `exits` counts rows by the layer they left after."""
    return Run(
        seconds,
        [[int(answer)] for answer in answers],
        layers_run=sum(layer * rows for layer, rows in exits.items()),
        layers_possible=LAYERS * sum(exits.values()),
        exit_histogram=exits,
    )


@pytest.fixture
def report(tiny_model) -> Any:
    def make(*rounds: tuple[Run, dict[float, Run]]) -> dict[str, Any]:
        config = tiny_config(tiny_model)
        return build_report("a/policy", Path("b/c.jsonl"), config, EXAMPLES, share_of_1, rounds)

    return make


def share_of_1(texts: Sequence[Sequence[int]]) -> list[bool]:
    """The answer 1 is right."""
    return [text == [1] for text in texts]


def exact(hits: int, of: int = 4) -> Any:
    """Clopper and Pearson's interval, by SciPy."""
    found = binomtest(hits, of).proportion_ci(0.95, method="exact")
    return pytest.approx((found.low, found.high))


def one_round(seconds: float, exits: dict[int, int], answers: str = "2111") -> Any:
    """Stock takes 10 seconds, and ours at its own epsilon as long as is said."""
    ours = {
        NEVER_EXIT: run(12.5, "1111"),
        STRICT: run(8, "1111", {3: 1, LAYERS: 3}),
        OURS: run(seconds, answers, exits),
    }
    return run(10, "1133"), ours


def test_a_round_is_reported_at_the_artifacts_own_epsilon(report):
    found = report(one_round(5, {2: 2, LAYERS: 2}))
    assert (found["artifact"], found["data"], found["n"]) == ("policy", "c.jsonl", 4)
    assert (found["prompt_tokens_mean"], found["layers_total"]) == (10, 6)
    assert (found["epsilon"], found["speedup"]) == (OURS, 2)
    assert found["layers_saved"] == pytest.approx(1 / 3)
    assert found["efficiency"] == pytest.approx(4 / 3)
    assert (found["disagreement"], found["disagreement_with_stock"]) == (0.25, 0.75)
    assert found["stock"] == {
        "requests_per_second": 0.4,
        "tokens_per_second": 4.4,
        "accuracy": 0.5,
        "accuracy_95": exact(2),
        "runs": [{"seconds": 10, "requests": 4}],
    }
    assert found["adainfer"] == {
        "requests_per_second": 0.8,
        "tokens_per_second": 8.8,
        "accuracy": 0.75,
        "accuracy_95": exact(3),
        "runs": [{"seconds": 5, "requests": 4}],
        "layers_run_mean": pytest.approx(4),
        "exit_histogram": {"2": 0.5, "6": 0.5},
        "exit_histogram_95": {"2": exact(2), "6": exact(2)},
    }
    assert found["never_exit"] == {
        "speedup": 0.8,
        "speedup_95": None,
        "speedup_rounds": [0.8],
        "disagreement_with_stock": 0.5,
        "disagreement_with_stock_95": exact(2),
    }
    assert found["disagreement_95"] == exact(1)
    assert found["disagreement_with_stock_95"] == exact(3)
    assert summary_line(found) == (
        "speedup 2.00x, layers saved 33 %, disagreement 25.0 % (95 %: 0.6 to 80.6 %), compatible "
        "with the bound of 5.0 %"
    )


def test_the_bound_is_held_against_early_answers_in_the_same_pass(tiny_model):
    config, data = tiny_config(tiny_model), Path("c.jsonl")
    passes, same = [one_round(5, {2: 2, LAYERS: 2})], {STRICT: SamePass(4, 1), OURS: SamePass(4, 0)}
    again = [[1], [1], [3], [2]]  # of stock vLLM, in other batches
    found = build_report(data.name, data, config, EXAMPLES, share_of_1, passes, None, same, again)
    assert (found["disagreement"], found["disagreement_95"]) == (0, exact(0))
    assert (found["disagreement_between_passes"], found["rounding"]) == (0.25, 0.25)
    assert found["disagreement_between_passes_95"] == found["rounding_95"] == exact(1)
    strict, ours = found["levels"]
    assert (strict["disagreement"], strict["disagreement_95"]) == (0.25, exact(1))
    assert strict["disagreement_between_passes"] == 0
    assert [one["verdict"].split()[0] for one in (strict, ours)] == ["compatible", "within"]
    assert "stock against itself 25.0 %" in summary_line(found)
    told = as_text(evaluation_facts(found))
    assert "Two passes of stock vLLM differ in 25.0% (0.6 to 80.6%)" in told


@pytest.mark.parametrize("compared", [0, 2])
def test_answers_that_were_not_compared_tell_nothing(tiny_model, compared):
    config, data = tiny_config(tiny_model), Path("c.jsonl")
    passes, same = [one_round(5, {2: 2, LAYERS: 2})], {STRICT: SamePass(4, 0)}
    same[OURS] = SamePass(compared, 0)
    found = build_report(data.name, data, config, EXAMPLES, share_of_1, passes, None, same)
    if compared:
        assert (found["disagreement"], found["compared"]) == (0, 2)
        assert found["disagreement_95"] == exact(0, of=2)
    else:
        assert found["disagreement"] == 0.25  # between two passes
        assert "disagreement_between_passes" not in found


def test_every_level_has_a_row_of_its_own_run(report):
    strict, ours = report(one_round(5, {2: 2, LAYERS: 2}))["levels"]
    assert strict == {
        "epsilon": STRICT,
        "speedup": 1.25,
        "speedup_95": None,
        "speedup_rounds": [1.25],
        "layers_saved": pytest.approx(1 / 8),
        "disagreement": 0,
        "disagreement_95": exact(0),
        "disagreement_with_stock": 0.5,
        "disagreement_with_stock_95": exact(2),
        "efficiency": pytest.approx(1.25 * 7 / 8),
        "accuracy": 1,
        "accuracy_95": exact(4),
        "exit_histogram": {"3": 0.25, str(LAYERS): 0.75},
        "exit_histogram_95": {"3": exact(1), str(LAYERS): exact(3)},
        "by_label": [],  # these answers are none
        "verdict": "within the bound of 2.0%",
    }
    assert (ours["epsilon"], ours["speedup"], ours["accuracy"]) == (OURS, 2, 0.75)


def test_of_several_rounds_the_median_counts_and_the_work_of_all(report):
    found = report(
        one_round(5, {2: 2, LAYERS: 2}),
        one_round(20, {2: 1, LAYERS: 3}, "1111"),
        one_round(4, {3: 4}, "2211"),
    )
    assert (found["speedup"], found["disagreement"]) == (2, 0.25)
    assert found["adainfer"]["requests_per_second"] == 0.8
    runs = found["adainfer"]["runs"]
    assert runs == [{"seconds": one, "requests": 4} for one in (5, 20, 4)]
    assert found["layers_saved"] == pytest.approx((8 + 4 + 12) / 72)
    shares = {"2": 3 / 12, "3": 4 / 12, "6": 5 / 12}
    assert found["adainfer"]["exit_histogram"] == pytest.approx(shares)


def test_speed_is_that_of_the_rounds_in_which_all_ran_in_turn(tiny_model):
    """Those are of some of the prompts; answers and layers are those of the pass over all."""
    stock = [2.0, 2.2, 1.8, 4.0, 2.0, 2.1]
    times = Times(
        {
            None: stock,
            NEVER_EXIT: [2 * one for one in stock],
            STRICT: stock,
            OURS: [one / 4 for one in stock],
        },
        [2] * 6,
    )
    config, data = tiny_config(tiny_model), Path("c.jsonl")
    passes = [one_round(5, {2: 2, LAYERS: 2})]
    found = build_report("policy", data, config, EXAMPLES, share_of_1, passes, times)
    assert (found["speedup"], found["speedup_95"]) == (4.0, (4.0, 4.0))
    assert (found["never_exit"]["speedup"], found["never_exit"]["speedup_95"]) == (0.5, (0.5, 0.5))
    assert found["efficiency"] == pytest.approx(4 * 2 / 3)
    assert found["stock"]["requests_per_second"] == pytest.approx((2 / 2.0 + 2 / 2.1) / 2)
    assert found["stock"]["runs"][3] == {"seconds": 4.0, "requests": 2}
    assert found["disagreement"] == 0.25
    assert summary_line(found).startswith("speedup 4.00x (95 %: 4.00 to 4.00), ")


def test_a_noisy_host_is_named_in_the_report(tiny_model):
    calm, wild = [1.0] * 6, [0.5, 1.0, 2.0, 0.7, 1.4, 3.0]
    times = Times({None: calm, NEVER_EXIT: calm, STRICT: calm, OURS: wild}, [4] * 6)
    passes = [one_round(5, {2: 2, LAYERS: 2})]
    report = build_report(
        "policy", Path("c.jsonl"), tiny_config(tiny_model), EXAMPLES, share_of_1, passes, times
    )
    assert "This host is too noisy to tell" in as_text(evaluation_facts(report))
    times = Times(dict.fromkeys([None, NEVER_EXIT, STRICT, OURS], calm), [4] * 6)
    report = build_report(
        "policy", Path("c.jsonl"), tiny_config(tiny_model), EXAMPLES, share_of_1, passes, times
    )
    assert "noisy" not in as_text(evaluation_facts(report))


def test_a_run_counts_what_the_engine_did_meanwhile():
    names = "layers_run", "layers_possible", "passes_run", "passes_possible"
    before = dict(zip(names, (1, 6, 2, 6), strict=True)) | {"exit_histogram": {1: 1}}
    after = dict(zip(names, (17, 30, 5, 12), strict=True)) | {"exit_histogram": {1: 1, 2: 2, 6: 2}}
    found = Run.counted(5, [[1, 2], [3]], before, after)
    assert (found.seconds, found.tokens) == (5, 3)
    assert found.layers_saved == pytest.approx(1 / 3)
    assert found.passes_saved == pytest.approx(1 / 2)
    assert found.exit_histogram == {2: 2, 6: 2}
