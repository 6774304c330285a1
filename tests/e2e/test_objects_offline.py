"""The commands around a policy for objects: they ask for its objects, and see what it sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.byte_model import save_byte_model
from tests.e2e.commands import command
from tests.e2e.objects import SCHEMA, objects
from tests.e2e.test_doctor import CALIBRATION
from tests.tiny import EXIT_POINTS, LAYERS, served_fingerprint, tiny_config, tiny_tensors
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import save_artifact

pytestmark = pytest.mark.full
TEXTS = [f"Review {number}: {'so ' * number}so." for number in range(1, 9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory) -> Path:
    """All objects are early, after the first exit point."""
    directory = tmp_path_factory.mktemp("artifact") / "policy"
    of_labels = tiny_config(model, weights_fingerprint=served_fingerprint(model, "bfloat16"))
    config = ArtifactConfig.model_validate({**dict(of_labels), "output": objects()})
    details = {**CALIBRATION, "schema": json.dumps(SCHEMA)}
    save_artifact(directory, config, tiny_tensors(config), details, "card\n")
    return directory


def test_doctor_sends_requests_for_the_objects(model, artifact):
    said = command("doctor", "--model", str(model), "--artifact", str(artifact)).stdout
    assert f"exits: 6 of 6 short requests exited, after layers {EXIT_POINTS[0]} (6)" in said
    assert f'full depth: 6 of 6 requests with "adainfer": 0 ran all {LAYERS} layers' in said


def test_explain_shows_the_object_at_each_exit_point_and_at_full_depth(model, artifact):
    done = command(
        "explain", TEXTS[0], "--model", str(model), "--artifact", str(artifact), "--json"
    )
    found = json.loads(done.stdout)
    assert found["leaves_after"] == EXIT_POINTS[0]
    assert [view["layer"] for view in found["views"]] == [*EXIT_POINTS, LAYERS]
    paths = [field.path for field in objects().fields]
    for view in found["views"]:
        assert [part.partition("=")[0] for part in view["answer"].split(", ")] == paths
        assert view["least_sure"] in paths


def test_evaluate_compares_the_objects_of_requests_with_this_schema(model, artifact, tmp_path):
    def line(text: str, schema: Any) -> str:
        asked = {"type": "json_schema", "json_schema": {"name": "o", "schema": schema}}
        body = {"model": "m", "prompt": text, "temperature": 0, "response_format": asked}
        return json.dumps({"custom_id": "1", "url": "/v1/completions", "body": body}) + "\n"

    data, report = tmp_path / "requests.jsonl", tmp_path / "report.json"
    lines = [line(text, {**SCHEMA, "title": "A review"}) for text in TEXTS]
    data.write_text("".join([*lines, line("Another.", {"type": "object"})]))
    given = ["--model", str(model), "--artifact", str(artifact), "--data", str(data)]
    given += ["--repeat", "1", "--epsilon", "0.05", "--report", str(report)]
    said = command("evaluate", *given).stdout
    found = json.loads(report.read_text())
    assert found["n"] == len(TEXTS)
    assert found["adainfer"]["exit_histogram"] == {str(EXIT_POINTS[0]): 1.0, str(LAYERS): 0.0}
    shares = {row["field"]: row["differs"] for row in found["by_field"]}
    assert list(shares) == [field.path for field in objects().fields]
    between = found["disagreement_between_passes"]
    assert max(shares.values()) <= between <= sum(shares.values())
    assert between <= found["text_differs"]
    assert found["disagreement"] == pytest.approx(between, abs=1 / len(TEXTS))
    assert "any field differs" in said
