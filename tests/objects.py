"""A policy's objects of two fields, for tests that need no engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_config
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.outputs import DecidedField, Objects, Value
from vllm_adainfer.drafts.schemas import digest_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"type": "string", "enum": ["bad", "fair", "good"]},
        "seen": {"type": "boolean"},
    },
    "required": ["mood", "seen"],
    "additionalProperties": False,
}
# The numbers of answers: mood by mood, each with what is not seen before what is.
BAD, BAD_SEEN, FAIR, FAIR_SEEN, GOOD, GOOD_SEEN = range(6)


def two_fields() -> Objects:
    """Objects of `SCHEMA`; a good mood that was seen is guessed."""
    values = {"mood": ['"bad"', '"fair"', '"good"'], "seen": ["false", "true"]}
    tokens = iter(range(10, 99))
    fields = [
        DecidedField(
            path=path,
            values=tuple(Value(text=one, written=(next(tokens), 5)) for one in own),
            guess=len(own) - 1,
        )
        for path, own in values.items()
    ]
    digest = digest_of(json.dumps(SCHEMA))
    assert digest is not None
    return Objects(schema_digest=digest, start=(1, 2), fields=tuple(fields))


def object_config(model: Path, **changes: Any) -> ArtifactConfig:
    """The config of a policy for them, for the tiny model."""
    values = {**dict(tiny_config(model)), "output": two_fields(), **changes}
    return ArtifactConfig.model_validate(values)
