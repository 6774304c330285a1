"""Fingerprints of weights and adapters, reckoned here by hashlib alone: artifacts carry them."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from torch import Tensor

from vllm_adainfer.artifact.fingerprints import WeightsFingerprint, adapter_fingerprint

WEIGHTS = {
    "b.weight": torch.tensor([[1.0, -2.0], [0.5, 3.0]]),
    "a.weight": torch.tensor([0.25, 4.0], dtype=torch.bfloat16),
}


def digest_of(weights: dict[str, Tensor], served_in: torch.dtype = torch.float16) -> str:
    fingerprint = WeightsFingerprint(served_in)
    list(fingerprint.passing(weights.items()))
    return fingerprint.hexdigest


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def test_it_is_of_the_served_dtype_and_by_name_of_each_tensors_dtype_and_values():
    assert digest_of(WEIGHTS) == sha256(
        b"torch.float16",
        *(b"a.weight", b"torch.bfloat16", struct.pack("<2f", 0.25, 4)),
        *(b"b.weight", b"torch.float32", struct.pack("<4f", 1, -2, 0.5, 3)),
    )


@pytest.mark.parametrize(("size", "step"), [(1, 1), (1024, 1), (2048, 2), (5120, 5)])
def test_of_a_large_tensor_it_is_of_1024_evenly_spaced_elements(size, step):
    values = range(0, size, step)
    assert digest_of({"w": torch.arange(size, dtype=torch.int32)}) == sha256(
        b"torch.float16", b"w", b"torch.int32", struct.pack(f"<{len(values)}f", *values)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"b.weight": torch.tensor([[1.0, -2.0], [0.5, 3.0001]])},
        {"b.weight": WEIGHTS["b.weight"].T},
        {"b.weight": WEIGHTS["b.weight"].half()},
        {"a.weight": WEIGHTS["b.weight"], "b.weight": WEIGHTS["a.weight"]},
        {"c.weight": torch.zeros(1)},
    ],
    ids=["a value", "their order", "a dtype", "names", "one more"],
)
def test_other_weights_have_another_one(changes):
    assert digest_of({**WEIGHTS, **changes}) != digest_of(WEIGHTS)


def test_the_same_weights_served_in_another_dtype_have_another_one():
    assert digest_of(WEIGHTS, torch.float32) != digest_of(WEIGHTS, torch.float16)


def test_neither_the_order_nor_the_number_of_files_matters():
    fingerprint = WeightsFingerprint(torch.float16)
    for name in reversed(WEIGHTS):
        list(fingerprint.passing([(name, WEIGHTS[name])]))
    assert fingerprint.hexdigest == digest_of(WEIGHTS)


def test_weights_pass_through_as_they_are():
    passed = dict(WeightsFingerprint(torch.float16).passing(WEIGHTS.items()))
    assert list(passed) == list(WEIGHTS)
    assert all(passed[name] is WEIGHTS[name] for name in WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "unlike"),
    [
        ({}, set()),
        ({"b.weight": torch.tensor([[1.0, -2.0], [0.5, 3.0001]])}, {"b.weight"}),
        ({"b.weight": WEIGHTS["b.weight"].half()}, {"b.weight"}),
        ({"c.weight": torch.zeros(1)}, {"c.weight"}),
    ],
)
def test_it_names_the_tensors_that_are_not_as_in_another(changes, unlike):
    one, other = WeightsFingerprint(torch.float16), WeightsFingerprint(torch.float16)
    list(one.passing({**WEIGHTS, **changes}.items()))
    list(other.passing(WEIGHTS.items()))
    assert one.unlike(other) == unlike
    assert one.names == {*WEIGHTS, *changes}


def test_an_adapters_is_of_what_scales_it_and_of_its_weights(tmp_path):
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights" * 1_000_000)
    whole = b"[4, 8, true, null, null, null]" + b"weights" * 1_000_000
    assert adapter_fingerprint(tmp_path) == hashlib.sha256(whole).hexdigest()
