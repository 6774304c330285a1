"""Calibrate, evaluate and explain a classifier through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.classifier import COLUMNS, classifier
from tests.e2e.commands import command
from tests.full import needed
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.promise.first_documents import FirstDocuments

TEMPLATE = "Review : {{ messages[0].content }} Sentiment : {{ messages[1].content }}"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(model: Path) -> list[str]:
    return [word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalpha()]


@pytest.fixture(scope="module", params=needed(["sigmoid"], of=COLUMNS))
def model(request, tiny_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("classifier") / request.param
    return classifier(tiny_model, directory, COLUMNS[request.param])


@pytest.fixture(scope="module")
def data(model, tmp_path_factory) -> list[str]:
    """Queries with three documents each for a reranker, texts for other classifiers."""
    vocabulary, directory = words(model), tmp_path_factory.mktemp("data")
    texts = [" ".join(vocabulary[i % 900 : i % 900 + 2 + i % 5]) for i in range(0, 2700, 3)]
    if model.name == "sigmoid":
        rows = [
            {"query": texts[i], "documents": texts[i + 1 : i + 4], "labels": [0, 1, 0]}
            for i in range(0, 800, 2)
        ]
        more = ["--chat-template", TEMPLATE]
    else:
        rows = [{"text": text, "label": f"c{i % 3}"} for i, text in enumerate(texts)]
        more = ["--template", "Review : {text}"]
    return ["--data", str(written(directory / "rows.jsonl", rows)), *more]


@pytest.fixture(scope="module")
def calibrated(model, data, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("artifact") / "policy"
    # Exit points late enough to save layers on any processor, however its random states round.
    promise = {"sigmoid": ["--top", "1:0.05"], "sigmoids": ["--gate", "c1:0.5"]}.get(model.name, [])
    done = command(
        "calibrate", "--model", str(model), *data, *promise, "--epsilon", "0.2",
        "--exit-points", "3,5", "--output", str(output),
    )  # fmt: skip
    return output, done.stdout


def test_a_classifiers_policy_is_for_the_columns_of_its_scores(calibrated, model):
    output, said = calibrated
    config = load_artifact_config(str(output))
    names = ["no", "yes"] if model.name == "sigmoid" else ["c0", "c1", "c2"]
    assert (config.score_head, [label.name for label in config.labels]) == (model.name, names)
    assert f"of a classifier ({model.name})" in said
    asked = {
        "sigmoid": "the score of a prompt, its probability of yes",
        "sigmoids": f"the classes of a prompt among {', '.join(names)}",
    }
    default = f"the class of a prompt among {', '.join(names)}"
    assert f"requests for {asked.get(model.name, default)}" in said
    right = "probabilities are right about which is largest"
    if model.name == "sigmoids":
        right = "probabilities are right about their side of the gates"
    if model.name == "sigmoid":
        right = "scores are right about which documents of a query come first"
        assert "with at most 20 % of the queries wrong" in said
        assert config.promise.model_dump() == FirstDocuments(k=1, margin=0.05).model_dump()
    assert f"{right}, not in value" in said
    assert config.bound == "exact"


@pytest.mark.full
def test_evaluate_runs_it_beside_stock(calibrated, model, data, tmp_path):
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    command(
        "evaluate", "--model", str(model), "--artifact", str(calibrated[0]), *data,
        "--repeat", "1", "--report", str(report), "--html", str(page),
    )  # fmt: skip
    found = json.loads(report.read_text())
    assert found["layers_saved"] > 0
    assert found["never_exit"]["disagreement_with_stock"] < 0.02  # ties in bfloat16
    assert ("queries that lose a document" in page.read_text()) == ("queries" in found)
    about = next((found[name] for name in ("queries", "gates") if name in found), found)
    promised, name = about["levels"], "disagreement" if about is found else "wrong"
    assert all(level[name] <= level["epsilon"] for level in promised)
    assert 0 < found["stock"]["accuracy"] < 1


@pytest.mark.full
def test_explain_and_doctor_know_it(calibrated, model):
    output, _ = calibrated
    done = command(
        "explain",
        "a good film with a warm heart and a thin plot",
        "--model",
        str(model),
        "--artifact",
        str(output),
        "--json",
    )
    views = json.loads(done.stdout)["views"]
    names = {repr(label.name) for label in load_artifact_config(str(output)).labels}
    assert {view["answer"] for view in views} <= names
    found = command("doctor", "--model", str(model), "--artifact", str(output))
    assert "LlamaForSequenceClassification is supported by AdaInferLlamaForCausalLM" in found.stdout
    assert "ran all 6 layers" in found.stdout
