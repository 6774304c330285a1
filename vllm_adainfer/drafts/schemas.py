"""JSON schemas: which fields of an answer have few values, and which schemas ask for the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from typing import Any

from vllm_adainfer.drafts.fields import fields_of

LONGEST_SCHEMA = 1 << 16  # characters
MOST_PARTS = 1024  # of a schema: references may multiply them
MOST_WRITTEN = 2 * LONGEST_SCHEMA  # characters of names and values, which they multiply, too
DEEPEST = 16
LONGEST_PATH = 40  # characters, for people
KNOWN = 128  # schemas whose digests are kept
# What a schema says to people, and to programs other than those that read its answers.
ANNOTATIONS = frozenset(
    ("$comment", "$id", "$schema", "default", "deprecated", "description", "examples", "title")
)
DEFINITIONS = ("$defs", "definitions")
NAMED = ("properties", "patternProperties")  # whose keys are names, in the order of the answer


class NotPlainError(ValueError):
    """A schema has too many parts, or what it means depends on who reads it."""


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


def is_longer(schema: Any, most: int) -> bool:
    """Whether a schema has more than so many characters; looks at no more of it than these.

    Of one that is no text yet, names, strings and the number of its parts count.
    """
    if isinstance(schema, str):
        return len(schema) > most
    parts = [schema]
    while parts and most >= 0:
        part = parts.pop()
        most -= 1
        if isinstance(part, str):
            most -= len(part)
        elif isinstance(part, list):
            parts += part[: most + 1]
        elif isinstance(part, dict):
            names = [*islice(part, most + 1)]
            most -= sum(map(len, names))
            parts += map(part.__getitem__, names)
    return most < 0


def plain_schema(schema: str) -> dict[str, Any] | None:
    """A schema without what does not count in its digest; None if it has none.

    ``properties`` are lists of a name and a schema; enumerated values are JSON texts. None also for
    what vLLM's grammars may read in another way: a keyword twice, keywords beside a reference, and
    references within parts that have a name of their own.
    """
    if len(schema) > LONGEST_SCHEMA:
        return None
    try:
        found = json.loads(schema, object_pairs_hook=_without_twins)
        plain = _Plain(_definitions_of(found)).of(found)
    except (ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotPlainError
    return found


def _definitions_of(schema: Any) -> Mapping[str, Any]:
    """What references may refer to; names that these would write with escapes are left out."""
    found: dict[str, Any] = {}
    for name in DEFINITIONS if isinstance(schema, dict) else ():
        if isinstance(schema.get(name), dict):
            parts = schema[name].items()
            found |= {f"#/{name}/{key}": part for key, part in parts if not {*key} & {*"/~%"}}
    return found


@dataclass
class _Plain:
    """Writes a schema in one way; `left` parts may still be written, of `room` characters."""

    definitions: Mapping[str, Any]
    left: int = MOST_PARTS
    room: int = MOST_WRITTEN

    def of(self, part: Any, depth: int = 0) -> Any:
        """A part of a schema, without annotations and references."""
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise NotPlainError
        if isinstance(part, list):
            return [self.of(one, depth + 1) for one in part]
        if not isinstance(part, dict):
            self._json(part)
            return part
        if depth and "$id" in part:
            raise NotPlainError
        reference = part.get("$ref")
        if isinstance(reference, str):
            beside = part.keys() - ANNOTATIONS - {"$ref", *DEFINITIONS}
            if beside or reference not in self.definitions:
                raise NotPlainError
            return self.of(self.definitions[reference], depth + 1)
        return {
            key: self._keyword(key, part[key], depth)
            for key in sorted(part)
            if key not in ANNOTATIONS and key not in DEFINITIONS
        }

    def _keyword(self, key: str, value: Any, depth: int) -> Any:
        self.room -= len(key)
        if key in NAMED and isinstance(value, dict):
            return [[self._named(name), self.of(one, depth + 1)] for name, one in value.items()]
        if key in ("enum", "required", "type") and isinstance(value, list):
            self.left -= len(value)
            return sorted(map(self._json, value))
        if key == "const":
            self._json(value)
            return value
        return self.of(value, depth + 1)

    def _named(self, name: str) -> str:
        self._json(name)
        return name

    def _json(self, value: Any) -> str:
        text = json.dumps(value)
        self.room -= len(text)
        if self.room < 0:
            raise NotPlainError
        return text
