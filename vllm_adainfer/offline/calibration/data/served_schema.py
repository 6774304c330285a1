"""The schema that an artifact for objects serves, and the answers to it as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.outputs import NO_OBJECT, Objects
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.objects import Schema, read_schema

TIMES_AN_OBJECT = 4  # as many tokens as a policy writes


def served_schema(objects: Objects, details: Mapping[str, Any], asked: Path | None = None) -> str:
    """The text of the schema that requests send: that of a file `asked`, or of the calibration.

    The config of an artifact has a digest of it; `details`, its ``calibration.json``, has the text.
    An AdaInferError if there is no text, or it is another schema's.
    """
    if asked is not None:
        schema, place = read_schema(asked), f"--schema {asked}"
    elif isinstance(text := details.get("schema"), str):
        place = "the schema in the artifact's calibration.json"
        schema = Schema.of(text, place)
    else:
        raise AdaInferError(
            "the artifact has no schema in its calibration.json, which requests for its objects "
            "must send: calibrate again"
        )
    if schema.digest != objects.schema_digest:
        fields = ", ".join(field.path for field in objects.fields)
        raise AdaInferError(
            f"{place} is not the one that the policy serves, which decides {fields}: names, "
            "values and the order of the properties must be those of the calibration"
        )
    return schema.text


def longest_object(objects: Objects) -> int:
    """The ``max_tokens`` of requests for objects: a model may write white space, too."""
    return TIMES_AN_OBJECT * objects.longest + 1


def in_words(objects: Objects, code: int) -> str:
    """An answer by its number, for people."""
    if code == NO_OBJECT:
        return "no object of the schema"
    return objects.in_words(objects.link.places(code))
