"""Policies that decide objects, on random weights, and the requests that ask for these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.byte_model import byte_tokenizer
from tests.e2e.drafted_traffic import an_object
from tests.tiny import tiny_config, tiny_tensors
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.artifact.outputs import DecidedField, Objects, Value
from vllm_adainfer.artifact.tensors import GUESS_TOKENS, GUESS_WEIGHT
from vllm_adainfer.drafts.schemas import digest_of

ENGINE: dict[str, Any] = {
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_batched_tokens": 2048,  # room for every guess
    "structured_outputs_config": {"backend": "xgrammar"},
}
VALUES: dict[str, list[Any]] = {
    "mood": ["positive", "negative"],
    "plot": ["good", "bad", "none"],
    "seen": [True, False],
}
SCHEMA = an_object(
    mood={"enum": VALUES["mood"]}, plot={"enum": VALUES["plot"]}, seen={"type": "boolean"}
)
POOLED_FROM = 2
THRESHOLDS = torch.tensor([[0.45, 0.40, 0.50], [0.32, 0.28, 0.30]])  # half of all settle


def objects(space: str = " ") -> Objects:
    """The second value of each field is guessed; `space` stands behind commas and colons."""
    encode = byte_tokenizer().encode
    behind = [f'",{space}"plot":{space}"', f'",{space}"seen":{space}', "}"]
    fields = []
    for (path, values), rest in zip(VALUES.items(), behind, strict=True):
        found = [
            Value(
                text=json.dumps(one),
                written=tuple(encode(one if isinstance(one, str) else json.dumps(one)))
                + tuple(encode(rest)),
            )
            for one in values
        ]
        fields.append(DecidedField(path=path, values=tuple(found), guess=1))
    digest = digest_of(json.dumps(SCHEMA))
    assert digest is not None
    start = tuple(encode(f'{{"mood":{space}"'))
    return Objects(schema_digest=digest, start=start, fields=tuple(fields))


def save_policy(
    model: Path, directory: Path, thresholds: Tensor = THRESHOLDS, space: str = " ", **changes: Any
) -> Path:
    """Write a policy with random heads, and a guess by text; `changes` are of its config."""
    of_labels = tiny_config(model, **changes)
    guessed = objects(space).model_copy(update={"guesser": "random"})
    config = ArtifactConfig.model_validate({**dict(of_labels), "output": guessed})
    letters = torch.arange(ord("a"), ord("z") + 1)
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(len(letters) + 1, len(config.labels), generator=random)
    tensors = tiny_tensors(config, thresholds)
    tensors |= {GUESS_TOKENS: letters, GUESS_WEIGHT: weight}
    save_artifact(directory, config, tensors, {}, "card\n")
    return directory


def params(**changes: Any) -> SamplingParams:
    """Those of a request for an object."""
    values = {
        "temperature": 0,
        "max_tokens": 120,
        "structured_outputs": StructuredOutputsParams(json=SCHEMA),
        **changes,
    }
    return SamplingParams(**values)
