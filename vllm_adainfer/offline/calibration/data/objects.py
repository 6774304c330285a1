"""Objects of decisions: what a schema lets a model decide, and how the model writes what it has.

The model's own answers say which tokens it writes for a value, and which object is the best guess.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from math import prod
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.fields import MOST_ANSWERS, MOST_FIELDS, MOST_OBJECTS, Label
from vllm_adainfer.artifact.outputs import DecidedField, Objects, Value
from vllm_adainfer.drafts.fields import MOST_VALUES, places_in, values_in
from vllm_adainfer.drafts.schemas import LONGEST_SCHEMA, digest_of, plain_schema
from vllm_adainfer.engine.compat.drafts import LONGEST_DRAFT
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example

STILL_DRAFTED = "requests with this schema are drafted and verified all the same, without a policy"


@dataclass(frozen=True)
class Schema:
    """A schema of objects whose fields all have few values.

    Attributes:
        text: as requests send it.
        digest: see `vllm_adainfer.drafts.schemas.digest_of`.
        fields: path -> the values that a field may have, as JSON.

    """

    text: str
    digest: str
    fields: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, text: str, place: str) -> Schema:
        """That of a JSON `text` from `place`; an AdaInferError if its answers are not decisions."""
        plain, digest = plain_schema(text), digest_of(text)
        if plain is None or digest is None:
            raise AdaInferError(
                f"{place} is no JSON schema of at most {LONGEST_SCHEMA} characters, without "
                "references to itself"
            )
        fields = dict(_leaves(plain, "", place))
        if not fields or len(fields) > MOST_FIELDS:
            raise AdaInferError(
                f"{place} must have 1 to {MOST_FIELDS} fields with values, and has {len(fields)}"
            )
        if all(len(values) == 1 for values in fields.values()):
            raise AdaInferError(f"{place} allows one object alone: there is nothing to decide")
        labels = sum(map(len, fields.values()))
        if labels > MOST_ANSWERS or prod(map(len, fields.values())) > MOST_OBJECTS:
            raise AdaInferError(
                f"the fields of {place} have {labels} values in all, and a policy decides at most "
                f"{MOST_ANSWERS}, of at most 2^62 objects: {STILL_DRAFTED}"
            )
        return cls(text, digest, fields)

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        """As in `Objects`."""
        names = [f"{path}={value}" for path, values in self.fields.items() for value in values]
        return tuple(Label(name=name, token_id=place) for place, name in enumerate(names))

    def places(self, answer: str) -> tuple[int, ...] | None:
        """Which value each field of an answer has; None if it is no such object."""
        return places_in(answer, self.fields)


def read_schema(path: Path) -> Schema:
    """The schema of a file; an AdaInferError if it cannot be read, see `Schema.of`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdaInferError(f"cannot read --schema {path}: {error}") from None
    return Schema.of(text, f"--schema {path}")


def common_schema(
    examples: Sequence[Example], asked: Schema | None, data: str
) -> tuple[list[Example], Schema | None]:
    """The requests with the schema `asked` for, or with that of all; None where they have none.

    An AdaInferError if no request has it, or requests differ and none is asked for.
    """
    by_digest: dict[str | None, list[Example]] = {}
    for one in examples:
        digest = None if one.schema is None else digest_of(one.schema) or one.schema
        by_digest.setdefault(digest, []).append(one)
    if asked is not None:
        if asked.digest not in by_digest:
            raise AdaInferError(f"no request of {data} has the schema of --schema")
        return by_digest[asked.digest], asked
    if not any(by_digest) or len(by_digest) == 1:
        first = examples[0]
        schema = None if first.schema is None else Schema.of(first.schema, first.place)
        return list(examples), schema
    counts = ", ".join(str(len(own)) for own in by_digest.values())
    raise AdaInferError(
        f"the requests of {data} ask for {len(by_digest)} different answers ({counts} requests "
        "each), and a policy is for one: give the --schema of one of them, or take out the others"
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _leaves(
    part: Mapping[str, Any], path: str, place: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The fields below a part of a plain schema, and their values."""
    values = _values_of(part)
    if path and values:
        yield path, values
        return
    properties = part.get("properties")
    if not properties:
        raise AdaInferError(
            f"{path or 'the answer'} of {place} is not one of few values (enum, const, boolean, or "
            f"at most {MOST_VALUES} integers), nor an object of such fields: a policy decides no "
            f"free text, numbers or lists. {STILL_DRAFTED}"
        )
    names = [name for name, _ in properties]
    if set(part.get("required", ())) != set(map(json.dumps, names)):
        raise AdaInferError(
            f"{path or 'the answer'} of {place} has fields that may be missing: name all of them "
            f"in required. {STILL_DRAFTED}"
        )
    if part.get("additionalProperties", False) is not False or part.get("patternProperties"):
        raise AdaInferError(
            f"{path or 'the answer'} of {place} may have other fields: set additionalProperties "
            f"to false, without patternProperties. {STILL_DRAFTED}"
        )
    for name, inner in properties:
        if "." in name or "=" in name:
            raise AdaInferError(f"the field {name!r:.80} of {place} has a dot or an = in its name")
        own = inner if isinstance(inner, dict) else {}
        yield from _leaves(own, f"{path}.{name}" if path else name, place)


def _values_of(part: Mapping[str, Any]) -> tuple[str, ...]:
    """The values of a part of a plain schema as JSON; none if they are many, or no decision."""
    parts = part.get("allOf")
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], dict):
        return _values_of(parts[0])
    found: list[str] = []
    kinds = [part]
    for key in "anyOf", "oneOf":
        if isinstance(part.get(key), list):
            kinds = [one if isinstance(one, dict) else {} for one in part[key]]
    for kind in chain.from_iterable(map(_by_type, kinds)):
        own: list[str] = []
        if isinstance(kind.get("enum"), list):
            own = [_json(json.loads(one)) for one in kind["enum"]]
        elif "const" in kind:
            own = [_json(kind["const"])]
        elif kind.get("type") == "boolean":
            own = ["false", "true"]
        elif kind.get("type") == "null":
            own = ["null"]
        elif kind.get("type") == "integer":
            low, high = kind.get("minimum"), kind.get("maximum")
            if isinstance(low, int) and isinstance(high, int) and 0 <= high - low < MOST_VALUES:
                own = [str(one) for one in range(low, high + 1)]
        if not own:
            return ()
        found += own
    values = tuple(dict.fromkeys(found))
    return values if len(values) <= MOST_VALUES else ()


def _by_type(kind: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A part of several types as one for each, unless it names its values."""
    types = kind.get("type")
    if not isinstance(types, list) or "enum" in kind or "const" in kind:
        return [kind]
    return [{**kind, "type": json.loads(one)} for one in types]


def objects_of(schema: Schema, answers: Sequence[Sequence[int]], tokenizer: Any) -> Objects:
    """How a model that has given these `answers`, in tokens without the end, writes objects.

    The commonest object is the guess. Of the ways in which a value was written, the commonest that
    goes with the guess's other values is taken; else the tokenizer's, in the whole object or alone.

    An AdaInferError if none of them is an object of the schema, or the guess is too long.
    """
    texts = [tokenizer.decode(answer) for answer in answers]
    objects = [
        (places, tuple(answer), text)
        for answer, text in zip(answers, texts, strict=True)
        if (places := schema.places(text)) is not None
    ]
    if not objects:
        raise AdaInferError(
            f"none of {len(answers)} answers of the model is an object of the schema, such as "
            f"{texts[0]!r:.200}: check the prompts, and that the model ends its answers"
        )
    [(guess, _)] = Counter(places for places, *_ in objects).most_common(1)
    [((guessed, text), _)] = Counter(one[1:] for one in objects if one[0] == guess).most_common(1)
    if len(guessed) > LONGEST_DRAFT:
        raise AdaInferError(
            f"the object {text!r:.200} takes {len(guessed)} tokens, and at most {LONGEST_DRAFT} "
            f"can stand behind a prompt: shorten the names of its fields. {STILL_DRAFTED}"
        )
    start, *parts = _parts(guessed, text, schema, tokenizer)
    seen = [[Counter[tuple[int, ...]]() for _ in values] for values in schema.fields.values()]
    for places, answer, own_text in objects:
        for field, part in enumerate(_parts(answer, own_text, schema, tokenizer)[1:]):
            seen[field][places[field]][part] += 1

    def goes_with_others(field: int, place: int, part: Sequence[int]) -> bool:
        tokens = [*start, *chain(*parts[:field], part, *parts[field + 1 :])]
        wanted = (*guess[:field], place, *guess[field + 1 :])
        return schema.places(tokenizer.decode(tokens)) == wanted

    fields = []
    for field, (path, values) in enumerate(schema.fields.items()):
        own = []
        for place, value in enumerate(values):
            ways = [part for part, _ in seen[field][place].most_common()]
            if place == guess[field]:
                ways = [parts[field]]
            elif not any(goes_with_others(field, place, one) for one in ways):
                other = _with_value(text, path, value)
                whole = tokenizer.encode(other, add_special_tokens=False)
                begin, end = (
                    len(tokenizer.decode([*start, *chain(*parts[:count])]))
                    for count in (field, field + 1)
                )
                alone = other[begin : end + len(other) - len(text)]
                ways = [
                    _parts(whole, other, schema, tokenizer)[field + 1],
                    tuple(tokenizer.encode(alone, add_special_tokens=False)),
                ]
            written = next((one for one in ways if goes_with_others(field, place, one)), None)
            if written is None:
                raise AdaInferError(
                    f"the tokenizer does not write the value {value:.80} of {path} in tokens of "
                    f"its own where it writes others. {STILL_DRAFTED}"
                )
            own.append(Value(text=value, written=written))
        fields.append(DecidedField(path=path, values=tuple(own), guess=guess[field]))
    return Objects(schema_digest=schema.digest, start=start, fields=tuple(fields))


def _parts(
    tokens: Sequence[int], text: str, schema: Schema, tokenizer: Any
) -> tuple[tuple[int, ...], ...]:
    """The tokens before the first value, and those from each value to the next.

    A value begins with the token that has its first character; behind the quote, if all values of
    its field are strings.
    """
    begins = dict(values_in(text))
    at = [
        begins[path] + all(one[0] == '"' for one in values)
        for path, values in schema.fields.items()
    ]
    ends = [len(tokenizer.decode(tokens[: count + 1])) for count in range(len(tokens))]
    cuts = [next(place for place, end in enumerate(ends) if end > one) for one in at]
    return tuple(tuple(tokens[start:end]) for start, end in pairwise([0, *cuts, len(tokens)]))


def _with_value(text: str, path: str, value: str) -> str:
    """An answer whose field has another value."""
    begin = dict(values_in(text))[path]
    _, end = json.JSONDecoder().raw_decode(text, begin)
    return text[:begin] + value + text[end:]
