"""JSON schemas: which fields of an answer have few values, and which schemas ask for the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

from vllm_adainfer.drafts.fields import fields_of

LONGEST_SCHEMA = 1 << 16  # characters
MOST_PARTS = 1024  # of a schema: references may multiply them
DEEPEST = 16
LONGEST_PATH = 40  # characters, for people
KNOWN = 128  # schemas whose digests are kept
# What a schema says to people, and to programs other than those that read its answers.
ANNOTATIONS = frozenset(
    ("$comment", "$id", "$schema", "default", "deprecated", "description", "examples", "title")
)
DEFINITIONS = ("$defs", "definitions")
NAMED = ("properties", "patternProperties")  # whose keys are names, in the order of the answer


class TooLargeError(ValueError):
    """A schema refers to itself, or has too many parts."""


@lru_cache(KNOWN)
def digest_of(schema: str) -> str | None:
    """A digest that schemas share if they allow the same answers, by what they say; None for none.

    Annotations do not count, nor does the order of keywords, of enumerated values and of the names
    of required properties. Parts that are referred to count as if they stood there. The order of
    properties counts: it is that of the answer. Linear in the text, up to `LONGEST_SCHEMA`.
    """
    plain = plain_schema(schema)
    if plain is None:
        return None
    return sha256(json.dumps(plain).encode(errors="surrogatepass")).hexdigest()


@lru_cache(KNOWN)
def paths_of(schema: str) -> tuple[str, ...]:
    """The fields with few values of a schema that has a digest, each cut to `LONGEST_PATH`."""
    return tuple(path[:LONGEST_PATH] for path in fields_of(json.loads(schema)))


def plain_schema(schema: str) -> dict[str, Any] | None:
    """A schema without what does not count in its digest; None if it has none.

    ``properties`` are lists of a name and a schema; enumerated values are JSON texts.
    """
    if len(schema) > LONGEST_SCHEMA:
        return None
    try:
        found = json.loads(schema)
        plain = _Plain(_definitions_of(found)).of(found)
    except (ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None


def _definitions_of(schema: Any) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name in DEFINITIONS if isinstance(schema, dict) else ():
        if isinstance(schema.get(name), dict):
            found |= {f"#/{name}/{key}": part for key, part in schema[name].items()}
    return found


@dataclass
class _Plain:
    """Writes a schema in one way; `left` parts may still be written."""

    definitions: Mapping[str, Any]
    left: int = MOST_PARTS

    def of(self, part: Any, depth: int = 0) -> Any:
        """A part of a schema, without annotations and references."""
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise TooLargeError
        if isinstance(part, list):
            return [self.of(one, depth + 1) for one in part]
        if not isinstance(part, dict):
            return part
        reference = part.get("$ref")
        if isinstance(reference, str):
            if reference not in self.definitions:
                raise TooLargeError
            others = {key: one for key, one in part.items() if key != "$ref"}
            target = self.definitions[reference]
            part = {**target, **others} if isinstance(target, dict) else others
            return self.of(part, depth + 1)
        return {
            key: self._keyword(key, part[key], depth)
            for key in sorted(part)
            if key not in ANNOTATIONS and key not in DEFINITIONS
        }

    def _keyword(self, key: str, value: Any, depth: int) -> Any:
        if key in NAMED and isinstance(value, dict):
            return [[name, self.of(one, depth + 1)] for name, one in value.items()]
        if key in ("enum", "required", "type") and isinstance(value, list):
            self.left -= len(value)
            return sorted(map(json.dumps, value))
        if key == "const":
            return value
        return self.of(value, depth + 1)
