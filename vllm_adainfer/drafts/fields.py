"""The decisions in a JSON answer, and how probable the model found the values of each.

A client can read them from the log-probabilities of an answer, too: this file needs nothing but
Python. vLLM's log-probabilities of a structured answer are those under its grammar.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

MOST_FIELDS, MOST_VALUES, DEEPEST = 64, 256, 8
MOST_PARTS = 1024  # of a schema that are looked at: references may multiply them
SPACE = " \t\n\r"
Fields: TypeAlias = Mapping[str, Sequence[str]]  # a field's path -> its values, as JSON


@dataclass(frozen=True)
class Token:
    """A token of an answer, with its log-probability and those of other tokens at its place."""

    text: str
    logprob: float
    others: Mapping[str, float]


def fields_of(schema: Any) -> dict[str, list[str]]:
    """The fields with few values of an object's JSON schema, by their paths, such as ``a.b``.

    Enumerations, constants, booleans and small ranges of integers, in nested objects, too. Empty
    for anything else, and what lies deeper or behind too many is left out.
    """
    definitions = schema.get("$defs", schema.get("definitions")) if isinstance(schema, dict) else {}
    fields = _fields_in(schema, definitions if isinstance(definitions, dict) else {}, "", 0)
    return dict(islice((one for one in islice(fields, MOST_PARTS) if one[1]), MOST_FIELDS))


def _fields_in(
    schema: Any, definitions: Mapping[str, Any], path: str, depth: int
) -> Iterator[tuple[str, list[str]]]:
    """Each part of a schema: its path and its values; none if it has many, or parts itself."""
    for _ in range(DEEPEST):  # references may refer to one another
        if not isinstance(schema, dict):
            break
        reference, parts = schema.get("$ref"), schema.get("allOf")
        if isinstance(reference, str):
            schema = definitions.get(reference.rpartition("/")[2])
        elif isinstance(parts, list) and len(parts) == 1:
            [schema] = parts
    if not isinstance(schema, dict) or depth > DEEPEST:
        yield path, []
        return
    yield path, (path and _values_of(schema)) or []
    properties = schema.get("properties")
    for name, inner in properties.items() if isinstance(properties, dict) else ():
        yield from _fields_in(inner, definitions, f"{path}.{name}" if path else name, depth + 1)


def _values_of(schema: Mapping[str, Any]) -> list[str] | None:
    """The values of a field as JSON; None if they are many."""
    values: Any = None
    if isinstance(schema.get("enum"), list):
        values = schema["enum"]
    elif "const" in schema:
        values = [schema["const"]]
    elif schema.get("type") == "boolean":
        values = [False, True]
    elif schema.get("type") in (["boolean", "null"], ["null", "boolean"]):
        values = [False, None, True]
    elif schema.get("type") == "integer":
        low, high = schema.get("minimum"), schema.get("maximum")
        if isinstance(low, int) and isinstance(high, int) and 0 <= high - low < MOST_VALUES:
            values = range(low, high + 1)
    if values is None or not 0 < len(values) <= MOST_VALUES:
        return None
    return [*map(_as_json, values)]


def probabilities(answer: Sequence[Token], fields: Fields) -> dict[str, dict[str, float]]:
    """By field, the probability of each value among the field's values, as far as it is known.

    Only tokens in `Token.others` are known, so values that nobody asked about may be missing; that
    of the answer never is. White space that could stand instead of a value decides nothing. A field
    that the answer lacks is left out.
    """
    return {
        path: {json.loads(one) if one[0] == '"' else one: share for one, share in found.items()}
        for path, found in probabilities_by_json(answer, fields).items()
    }


def probabilities_by_json(answer: Sequence[Token], fields: Fields) -> dict[str, dict[str, float]]:
    """The same with each value as JSON, as in `fields`."""
    starts, text = [0], "".join(token.text for token in answer)
    for token in answer:
        starts.append(starts[-1] + len(token.text))
    found: dict[str, dict[str, float]] = {}
    for path, begin in values_in(text):
        if path in fields and path not in found and begin < len(text):  # else it was cut short
            first = next(place for place, end in enumerate(starts[1:]) if end > begin)
            read = _read_value(answer[first:], fields[path], begin - starts[first])
            if read:
                found[path] = read
    return found


def _read_value(answer: Sequence[Token], values: Sequence[str], skip: int) -> dict[str, float]:
    """The probabilities of `values`, whose first character follows `skip` ones of the answer."""
    left, mass = list(values), 1.0
    written = ""
    found: dict[str, float] = {}
    for place, token in enumerate(answer):
        before = token.text[:skip] if place == 0 else ""
        begun = token.text[len(before) :]
        idle, decided = 0.0, []
        for text, logprob in token.others.items():
            if text == token.text:
                continue
            other = (written + text.removeprefix(before)).lstrip(SPACE)
            if before.startswith(text):
                other = written
            compatible = _compatible(left, other)
            if len(compatible) == len(left) and not found and len(left) > 1:
                idle += math.exp(logprob)  # as undecided as before
            elif len(compatible) == 1:
                decided.append((compatible[0], math.exp(logprob)))
        known = max(1.0 - idle, math.exp(token.logprob))
        for value, probability in decided:
            found[value] = found.get(value, 0.0) + mass * probability / known
        mass *= math.exp(token.logprob) / known
        written = (written + begun).lstrip(SPACE)
        left = _compatible(left, written)
        if len(left) <= 1:
            break
    if len(left) != 1:
        return {}
    found[left[0]] = found.get(left[0], 0.0) + mass
    return found


def _compatible(values: Sequence[str], begun: str) -> list[str]:
    """The values that may be meant, after `begun` was written."""
    return [
        value
        for value in values
        if value.startswith(begun)
        or (begun.startswith(value) and not begun[len(value) : len(value) + 1].isalnum())
    ]


def values_in(text: str) -> Iterator[tuple[str, int]]:
    """The paths of an object's values in order, and where each begins; up to a syntax error."""
    decoder = json.JSONDecoder()
    inside: list[str] = []  # the names of the objects that are open
    place, name = _skip(text, 0), ""
    try:
        while place < len(text):
            if text[place] == "}":
                if inside:
                    inside.pop()
                place = _skip(text, place + 1)
            elif text[place] in "{,":
                if text[place] == "{" and name:
                    inside.append(name)
                place = _skip(text, place + 1)
                if text[place] == "}":
                    continue
                name, place = decoder.raw_decode(text, place)
                place = _skip(text, place)
                if text[place] != ":" or not isinstance(name, str):
                    return
                place = _skip(text, place + 1)
                yield ".".join([*inside, name]), place
                if text[place] != "{":
                    _, place = decoder.raw_decode(text, place)
                    place = _skip(text, place)
            else:
                return
    except (ValueError, IndexError, RecursionError):
        return  # the answer was cut short, or nests too deep


def places_in(answer: str, fields: Fields) -> tuple[int, ...] | None:
    """Which value each field of a JSON answer has; None if it lacks one, or has another value."""
    try:
        found = json.loads(answer)
        values = [_as_json(_inside(found, path)) for path in fields]
        pairs = zip(fields.values(), values, strict=True)
        return tuple(own.index(value) for own, value in pairs)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _inside(found: Any, path: str) -> Any:
    for name in path.split("."):
        found = found[name]
    return found


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in SPACE:
        place += 1
    return place
