"""The suite on the tiny model, with answers that it gives itself: every method, measured."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.e2e.commands import of_a_user
from tests.tiny import LAYERS

pytestmark = pytest.mark.full  # a benchmark

TEMPLATE = "Review: {text}\nSentiment:"  # the suite's, of SST-2
WORDS = ("negative", "positive")
EPSILON, TRAIN, TEST = 0.2, 240, 60
METHODS = {"static_truncation", "adainfer", "adainfer_labels", "adainfer_certified", "calm", "ours"}

RUN = """
from pathlib import Path
from benchmarks.suite.run_suite import run_suite
run_suite(
    model={model!r}, output=Path({output!r}), data_dir=Path({data!r}), tasks=("sst2", "squad"),
    shots=0, epsilon={epsilon}, repeat=1)
"""


@pytest.fixture(scope="module")
def data_dir(tiny_model: Path, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 as the model itself labels it, a fifth of it wrong; SQuAD without such an order."""
    directory = tmp_path_factory.mktemp("data")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer.convert_tokens_to_ids(list(WORDS))
    lines = (
        files("vllm_adainfer.offline.demo").joinpath("calibration.jsonl").read_text().splitlines()
    )
    texts = [json.loads(line)["text"] for line in lines[: TRAIN + TEST]]
    rows = []
    for number, text in enumerate(texts):
        prompt = tokenizer.encode(TEMPLATE.format(text=text))
        with torch.inference_mode():
            scores = reference(torch.tensor([prompt])).logits[0, -1, ids]
        answer = int(scores.argmax()) ^ (number % 5 == 0)
        rows.append({"text": text, "label": WORDS[answer]})
    questions = [
        {"context": text, "question": "good?", "answer": [text.split()[0], "bad"]} for text in texts
    ]
    for name, of in (("sst2", rows), ("squad", questions)):
        (directory / name).mkdir()
        for part, some in (("train", of[:TRAIN]), ("test", of[TRAIN:])):
            path = directory / name / f"{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return directory


@pytest.fixture(scope="module")
def written(tiny_model: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = tmp_path_factory.mktemp("report") / "suite.json"
    code = RUN.format(
        model=str(tiny_model), output=str(report), data=str(data_dir), epsilon=EPSILON
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=of_a_user(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return report


@pytest.fixture(scope="module")
def report(written: Path) -> dict[str, Any]:
    return json.loads(written.read_text())


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [task for task in report["tasks"] if task["task"] == name]
    return found


def test_full_depth_is_as_accurate_as_the_labels_were_made(report):
    found = row(report, "sst2")
    assert found["full_depth"]["accuracy"] == pytest.approx(0.8, abs=0.03)
    assert found["measured"]["stock_accuracy"] == found["full_depth"]["accuracy"]
    assert not found["at_chance"]


@pytest.mark.parametrize("name", ["sst2", "squad"])
def test_every_method_stands_beside_ours(report, name):
    found = row(report, name)
    assert found["methods"].keys() == METHODS
    for outcome in found["methods"].values():
        if outcome is not None:
            assert outcome["layers_run"] == pytest.approx(LAYERS * (1 - outcome["layers_saved"]))
            assert 0 <= outcome["disagreement"] <= 1


def test_what_is_measured_in_vllm_is_what_was_judged_from_the_recording(report):
    found = row(report, "sst2")
    judged, measured = found["methods"]["ours"], found["measured"]
    # Judged by the prompt, measured by the token row; the last rows of a batch leave for nothing.
    assert measured["layers_saved"] == pytest.approx(judged["layers_saved"], abs=0.1)
    assert measured["disagreement"] == pytest.approx(judged["disagreement"], abs=2 / TEST)
    assert measured["accuracy"] == pytest.approx(judged["accuracy"], abs=2 / TEST)
    assert judged["layers_saved"] > 0


def test_a_task_at_chance_is_marked_and_left_out_of_the_means(report):
    found = row(report, "squad")
    assert found["at_chance"]
    assert found["measured"] is None
    assert report["averages"]["measured"]["tasks"] == 1
    assert report["averages"]["measured"]["speedup"] == row(report, "sst2")["measured"]["speedup"]


def test_the_table_lies_beside_the_report(written):
    table = written.with_suffix(".md").read_text()
    for name in ("SST-2", "SQuAD", "AdaInfer as published", "static truncation", "at chance"):
        assert name in table
