"""Artifacts of November 2026 load, and are read, certified and reported to the last bit as then.

Where another kind of processor computes, numbers may differ in the last bits, because vectors of
another width add up in another order, or MKL takes other code; what is decided may not. So it may
on every processor where a tuned lens, a norm, a branch or a student multiplies numbers whose
products are not exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from tests.golden.reading import (
    DECISIONS,
    HERE,
    NUMBERS,
    RUNS,
    SCORED,
    Inputs,
    certified,
    decisions,
    kept,
    loaded,
    read,
    report,
    scored,
)
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.source import CONFIG_FILE

CASES = sorted(path.parent.name for path in HERE.glob("*/config.json"))
CERTIFIED = sorted(path.parent.name for path in HERE.glob(f"*/{SCORED}"))
REPORTED = sorted(path.parent.name for path in HERE.glob(f"*/{RUNS}"))
INEXACT = ("text-", "branch", "student")
IN_HALF = ("branch",)  # computed in float16, so that another order of adding up shows earlier
INPUTS = Inputs.load()


@pytest.fixture(params=CASES)
def artifact(request, tmp_path) -> tuple[str, Artifact]:
    return request.param, loaded(request.param, tmp_path)


def numbers_of(case: str) -> Any:
    return json.loads(read(HERE / case / NUMBERS))


def tensors_of(case: str, file: str) -> dict[str, Tensor]:
    return load(read(HERE / case / file))


def same_processor(case: str) -> bool:
    """Results were made on processors of Intel, where MKL has other exponentials than elsewhere."""
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    capability = torch.backends.cpu.get_cpu_capability()
    return is_intel and bool(numbers_of(case)["capability"] == capability)


def assert_same(case: str, found: Tensor, wanted: Tensor, what: str) -> None:
    if wanted.is_floating_point() and (case.startswith(INEXACT) or not same_processor(case)):
        close = 1e-3 if case.startswith(IN_HALF) and not same_processor(case) else 1e-5
        torch.testing.assert_close(found, wanted, rtol=close, atol=close, equal_nan=True, msg=what)
        return
    assert found.dtype == wanted.dtype, what
    assert torch.equal(found.nan_to_num(7.5), wanted.nan_to_num(7.5)), what


def test_there_is_one_of_each_output_and_promise():
    assert len(CASES) == 22
    assert (len(CERTIFIED), len(REPORTED)) == (20, 18)


def test_a_config_of_version_1_is_written_in_version_2_and_says_the_same(artifact):
    config = artifact[1].config
    before = json.loads((HERE / artifact[0] / CONFIG_FILE).read_text())
    written = json.loads(config.model_dump_json())
    assert (before["schema_version"], written["schema_version"]) == (1, 2)
    assert written["promise"]["kind"] == config.promise.kind
    # What programs read from the file stands where it stood.
    assert written["candidates"] == before["candidates"]
    ids = [[label["token_id"] for label in one["labels"]] for one in (written, before)]
    assert ids[0] == ids[1]
    assert ArtifactConfig.model_validate(written) == config


@pytest.mark.parametrize("key", ["choices", "score_head"])
def test_a_config_of_version_1_whose_labels_are_other_tokens_is_refused(key):
    flats = (json.loads((HERE / case / CONFIG_FILE).read_text()) for case in CASES)
    flat = next(flat for flat in flats if flat.get(key))
    flat["labels"].reverse()
    with pytest.raises(ValueError, match=r"in (their )?order"):
        ArtifactConfig.model_validate(flat)


def test_it_decides_and_answers_as_it_did(artifact):
    case, found = artifact[0], decisions(artifact[1], INPUTS)
    wanted = tensors_of(case, DECISIONS)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_same(case, found[name], tensor, name)


@pytest.mark.parametrize("case", CERTIFIED)
def test_calibration_scores_it_as_it_did(case, tmp_path):
    wanted = kept(tensors_of(case, SCORED))
    found = scored(loaded(case, tmp_path), INPUTS)
    assert found.keys() == wanted.keys()
    for name, exits in wanted.items():
        for one, other in zip(found[name], exits, strict=True):
            assert_same(case, one.score, other.score, f"{name} score")
            for what in ("tokens", "full", "loss"):
                assert (getattr(one, what) == getattr(other, what)).all(), f"{name} {what}"


@pytest.mark.parametrize("case", CERTIFIED)
def test_the_same_thresholds_are_certified_by_the_same_rows(case, tmp_path):
    config = loaded(case, tmp_path).config
    found = certified(config, kept(tensors_of(case, SCORED)), INPUTS)
    assert json.loads(json.dumps(found)) == numbers_of(case)["certified"]


@pytest.mark.parametrize("case", REPORTED)
def test_an_evaluation_of_the_same_answers_reports_the_same(case, tmp_path):
    config = loaded(case, tmp_path).config
    found = report(config, tensors_of(case, RUNS))
    wanted = numbers_of(case)["report"]
    if same_processor(case):
        assert json.loads(json.dumps(found)) == wanted
    assert found["summary"] == wanted["summary"]
