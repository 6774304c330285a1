"""`vllm-adainfer doctor` on the tiny model, with an engine of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.commands import command
from tests.tiny import served_fingerprint, tiny_config, tiny_tensors
from vllm_adainfer.artifact.files import save_artifact

CALIBRATION = {
    "template": "Review : {text} Sentiment :",
    "rows": 400,
    "rows_held_out": 200,
    "seed": 0,
    "majority_share": 0.5,
    "exit_points": [],
    "seconds": {"expected": {"full_depth": 0.004, "chosen": 0.002}},
}


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All settle at the first exit point, in the dtype that vLLM serves the model in."""
    directory = tmp_path_factory.mktemp("artifact") / "policy"
    config = tiny_config(tiny_model, weights_fingerprint=served_fingerprint(tiny_model, "bfloat16"))
    save_artifact(directory, config, tiny_tensors(config), CALIBRATION, "card\n")
    return directory


def test_an_engine_of_ours_lets_requests_leave_or_run_to_full_depth(tiny_model, artifact):
    done = command("doctor", "--model", str(tiny_model), "--artifact", str(artifact))
    lines = done.stdout.splitlines()
    assert {line[:6] for line in lines} == {"ok    "}
    found = "\n".join(lines)
    assert "engine: AdaInferLlamaForCausalLM runs on a CPU, with Model Runner V" in found
    assert "without CUDA graphs" in found
    assert "exits: 6 of 6 short requests exited, after layers 2 (6) of 6; " in found
    assert 'full depth: 6 of 6 requests with "adainfer": 0 ran all 6 layers' in found
    assert "expected by calibration, not measured here: 20% of layers saved" in found
    assert "a speed-up of the layers of 2.00x" in found


def test_an_engine_that_does_not_start_fails_with_its_last_words(tiny_model, tiny_policy):
    done = command("doctor", "--model", str(tiny_model), "--artifact", str(tiny_policy), expect=1)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert line.startswith(f"FAIL  engine: vLLM could not start {tiny_model}: ")
    assert "calibrated for other weights of this architecture" in line
    assert done.stdout.splitlines()[-1] == line
