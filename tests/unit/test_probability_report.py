"""What `evaluate` asks, reports, prints and draws for policies that promise probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tiny import LAYERS, tiny_config
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.requested import Form
from vllm_adainfer.engine.admission.requested_output import requested_output
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.measure import measure
from vllm_adainfer.offline.evaluation.report import build_report, summary_line
from vllm_adainfer.offline.evaluation.requests import (
    engine_settings,
    label_logprobs,
    request_params,
)
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.facts.document import as_text
from vllm_adainfer.offline.reports.evaluation_facts import evaluation_facts

EXAMPLES = [
    Example(f"line {number}", "a review", [0] * 10, label)
    for number, label in enumerate(("bad", "good", "good", "good"))
]
STRICT, OURS = 0.02, 0.05
NONE = 0  # a token that is no label
FULL = [[0.8, 0.1], [0.2, 0.7], [0.1, 0.8], [0.3, 0.4]]


def promising(tiny_model: Path, label_mass: bool = True) -> ArtifactConfig:
    return tiny_config(tiny_model, risk="probability", tolerance=0.05, label_mass=label_mass)


def run(
    config: ArtifactConfig, shares: Sequence[Sequence[float]], none_at: int | None = None
) -> Run:
    """Its best labels are answered, but no label at `none_at`."""
    logprobs = np.log(np.array(shares)).astype(np.float32)
    texts = [[config.label_ids[best]] for best in logprobs.argmax(axis=1)]
    if none_at is not None:
        texts[none_at] = [NONE]
    work = {"layers_run": 12, "layers_possible": 24, "exit_histogram": {3: 4}}
    return Run(5, texts, logprobs=logprobs, **work)


def moved(row: int, shares: list[float]) -> list[list[float]]:
    return [shares if number == row else full for number, full in enumerate(FULL)]


def one_round(config: ArtifactConfig, ours: Sequence[Sequence[float]]) -> Any:
    """Stock rounds one row, and full depth's best token for the last row is no label."""
    return run(config, moved(0, [0.78, 0.12]), none_at=3), {
        NEVER_EXIT: run(config, FULL, none_at=3),
        STRICT: run(config, FULL, none_at=3),
        OURS: run(config, ours),
    }


def report_of(config: ArtifactConfig, rounds: Any, examples: Any = EXAMPLES) -> dict[str, Any]:
    return build_report("policy", Path("c.jsonl"), config, examples, lambda _: None, rounds)


@pytest.fixture
def report(tiny_model) -> dict[str, Any]:
    config = promising(tiny_model)
    return report_of(config, [one_round(config, moved(1, [0.5, 0.4]))])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, Form.TOKEN),
        ({"risk": "probability", "tolerance": 0.05}, Form.AMONG_LABELS),
        ({"risk": "probability", "tolerance": 0.05, "label_mass": True}, Form.IN_VOCABULARY),
    ],
)
def test_requests_read_the_most_that_the_policy_promises(tiny_model, changes, what):
    config = tiny_config(tiny_model, **changes)
    settings = engine_settings(config)
    params = request_params(config, None, {"adainfer_epsilon": 0.02})
    read = requested_output(params, settings.get("logprobs_mode", "raw_logprobs"))
    assert read is not None
    assert read.form is what
    assert read.is_promised_by(config)
    assert (params.max_tokens, params.extra_args) == (1, {"adainfer_epsilon": 0.02})


def answer(token: int, by_token: dict[int, float]) -> Any:
    logprobs = {other: SimpleNamespace(logprob=value) for other, value in by_token.items()}
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token], logprobs=[logprobs])])


def test_log_probabilities_are_kept_by_prompt_in_the_order_of_the_labels(tiny_model):
    config = promising(tiny_model)
    bad, good = config.label_ids
    outputs = [answer(good, {good: -0.5, bad: -1.0}), answer(NONE, {NONE: 0, bad: -3, good: -2})]
    found = label_logprobs(outputs, config.labels)
    assert found.dtype == np.float32
    assert found.tolist() == [[-1.0, -0.5], [-3.0, -2.0]]


class Engine:
    """Answers each prompt with the same log-probabilities and keeps what was asked."""

    def __init__(self, config: ArtifactConfig) -> None:
        self.asked: list[Any] = []
        bad, good = config.label_ids
        self._answer = answer(good, {good: -0.5, bad: -1.0})

    def reset_prefix_cache(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[Any], params: Any, lora_request: None, use_tqdm: bool
    ) -> list[Any]:
        self.asked += params
        return [self._answer] * len(prompts)


def test_both_engines_get_the_same_requests_and_every_run_keeps_what_it_read(
    tiny_model, monkeypatch
):
    names = "layers_run", "layers_possible", "passes_run", "passes_possible"
    counted = dict.fromkeys(names, 1) | {"exit_histogram": {LAYERS: 1}}
    monkeypatch.setattr("vllm_adainfer.offline.evaluation.measure.stats", lambda _: counted)
    config = promising(tiny_model)
    stock, ours = Engine(config), Engine(config)
    passes, times, again = measure(stock, ours, EXAMPLES, config, [NEVER_EXIT, OURS], 2)
    [(baseline, by_epsilon)] = passes
    ids = list(config.label_ids)
    assert {tuple(params.logprob_token_ids) for params in stock.asked + ours.asked} == {tuple(ids)}
    assert again == baseline.texts
    for found in baseline, *by_epsilon.values():
        assert found.logprobs is not None
        assert found.logprobs.shape == (4, 2)
    assert times.requests == [4, 4]  # fewer would be no batch
    assert {side: len(seconds) for side, seconds in times.seconds.items()} == {
        None: 2, NEVER_EXIT: 2, OURS: 2
    }  # fmt: skip


def test_the_report_repeats_the_promise(report):
    assert (report["risk"], report["tolerance"], report["label_mass"]) == (
        "probability",
        0.05,
        True,
    )


def test_a_policy_that_promises_no_probabilities_has_none_in_its_report(tiny_model):
    config = tiny_config(tiny_model)
    runs = one_round(config, FULL)
    found = report_of(config, [runs])
    assert not {"risk", "tolerance", "label_mass", "probabilities"} & found.keys()
    assert "probabilities" not in as_text(evaluation_facts(found))
    assert "tolerance" not in summary_line(found)


def test_a_row_says_how_good_the_probabilities_are(report):
    never = report["probabilities"]["never_exit"]
    assert never["label_mass"] == pytest.approx((0.9 + 0.9 + 0.9 + 0.7) / 4)
    tops = [8 / 9, 7 / 9, 8 / 9, 4 / 7]  # all of them are the true labels
    assert never["ece"] == pytest.approx(1 - sum(tops) / 4)
    assert never["brier"] == pytest.approx(sum(2 * (1 - top) ** 2 for top in tops) / 4)
    assert [one["confidence"] for one in never["bins"]] == pytest.approx(sorted(tops))
    assert all((one["rows"], one["accuracy"]) == (1, 1) for one in never["bins"])


def test_each_level_is_compared_with_never_exiting(report):
    strict, ours = report["probabilities"]["levels"]
    assert (strict["epsilon"], ours["epsilon"]) == (STRICT, OURS)
    assert (strict["move_max"], strict["wrong"]) == (0, 0)
    assert ours["label_differs"] == 0.25
    # The second row's label differs, and the last has a label where full depth has none.
    assert ours["wrong"] == 0.5
    assert ours["move_max"] == pytest.approx(7 / 9 - 4 / 9, abs=1e-6)


def test_moves_are_the_medians_of_the_rounds_and_the_ece_is_the_first_rounds(tiny_model):
    config = promising(tiny_model)
    alike, other = one_round(config, FULL), one_round(config, moved(1, [0.5, 0.4]))
    first = report_of(config, [alike])["probabilities"]["levels"][1]
    second = report_of(config, [other])["probabilities"]["levels"][1]
    found = report_of(config, [alike, other, other])["probabilities"]["levels"][1]
    assert found["move_mean"] == second["move_mean"] != first["move_mean"]
    assert found["ece"] == first["ece"] != second["ece"]


def test_among_the_labels_there_is_no_mass_and_only_moves_among_them_count(tiny_model):
    config = promising(tiny_model, label_mass=False)
    halved = [[share / 2 for share in row] for row in FULL]
    found = report_of(config, [one_round(config, halved)])["probabilities"]["levels"][1]
    assert found["label_mass"] is None
    assert found["move_max"] == pytest.approx(0, abs=1e-6)
    assert found["wrong"] == 0


@pytest.fixture
def unlabelled(tiny_model) -> dict[str, Any]:
    config = promising(tiny_model)
    examples = [*EXAMPLES[:3], replace(EXAMPLES[3], label=None)]
    return report_of(config, [one_round(config, FULL)], examples)


def test_a_row_without_label_leaves_what_needs_none(unlabelled):
    row = unlabelled["probabilities"]["levels"][1]
    assert (row["ece"], row["brier"], row["bins"]) == (None, None, None)
    assert row["label_mass"] == pytest.approx(0.85)
    assert row["wrong"] == 0.25


def test_the_summary_names_the_tolerance_and_the_share_beyond_it(report):
    assert summary_line(report) == (
        "speedup 1.00x, layers saved 50 %, disagreement 50.0 % (95 %: 6.8 to 93.2 %), 50.0 % "
        "(95 %: 6.8 to 93.2 %) beyond the tolerance of 0.05, above the bound of 5.0 %"
    )


def cells(report: dict[str, Any], name: str) -> list[str]:
    table = as_text(evaluation_facts(report)).split("probabilities ", 1)[1]
    [line] = [line for line in table.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


NOBODY = "0.0% (0.0 to 60.2%)"  # of four prompts


def test_the_table_has_a_line_for_stock_never_exiting_and_each_bound(report):
    assert " ".join(cells(report, "stock vLLM")[2:]) == f"0.850 0.006 0.019 0.022 {NOBODY} {NOBODY}"
    assert " ".join(cells(report, "never exit")[2:]) == f"0.850 0.000 0.000 0.000 {NOBODY} {NOBODY}"
    own = " ".join(cells(report, "bound 5.0%"))
    assert own.endswith("25.0% (0.6 to 80.6%) 50.0% (6.8 to 93.2%)")
    assert "beyond 0.05" in as_text(evaluation_facts(report))


def test_what_could_not_be_measured_is_a_dash_in_the_table(unlabelled):
    assert cells(unlabelled, "stock vLLM")[:3] == ["-", "-", "0.850"]
