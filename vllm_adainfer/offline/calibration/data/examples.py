"""Data: read JSON lines, fill in the template, tokenise, and find the tokens of labels."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.errors import AdaInferError


@dataclass(frozen=True)
class Row:
    """One JSON object of a data file, and its place in the file."""

    place: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A tokenised prompt and its label, if the row has one.

    Attributes:
        place: the file and line of the row.
        text: the text of the prompt.
        token_ids: the tokens of the prompt.
        label: the right label: its name, or its token id if the row is a request for a token.
        labels: token ids of the labels that the request names; None if the row is no request.
        choices: the texts that the request chooses from; None if it does not.
        schema: the JSON schema of the object that the request asks for; None if it does not.
        question: the name of the request's question about its state.
        wording: the question as the prompt puts it; a question may have several.
        group: the group of prompts that came together, such as the questions about one state; None
            if the prompt came alone.

    """

    place: str
    text: str
    token_ids: list[int]
    label: str | None
    labels: tuple[int, ...] | None = None
    choices: tuple[str, ...] | None = None
    question: str | None = None
    wording: str | None = None
    group: str | None = None
    schema: str | None = None


def read_rows(path: Path) -> list[Row]:
    """Read a JSON-lines file of objects, or all files ``*.jsonl`` of a directory.

    An AdaInferError if there is none, it is empty, or a line is not a JSON object.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    rows = [row for file in files for row in _rows_of(file)]
    if not rows:
        raise AdaInferError(f"--data {path} has no rows: give one JSON object per line")
    return rows


def _rows_of(path: Path) -> list[Row]:
    try:
        # Not splitlines(), which also splits at U+2028 and the like inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AdaInferError(f"cannot read --data {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise AdaInferError(f"{place} is not JSON ({error.msg})") from None
        if not isinstance(fields, dict):
            raise AdaInferError(f"{place} must be a JSON object, not {type(fields).__name__}")
        rows.append(Row(place, fields))
    return rows


def read_template(template: str | None) -> str | None:
    """The content of FILE for ``@FILE``; anything else is the template itself.

    A shell leaves ``\\n`` in quotes as it is, so it stands for a line break, as in the requests of
    clients.

    An AdaInferError if the file cannot be read.
    """
    if template is None or not template.startswith("@"):
        return None if template is None else template.replace("\\n", "\n")
    try:
        return Path(template[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdaInferError(f"cannot read --template {template}: {error}") from None


def make_examples(
    rows: Sequence[Row],
    tokenizer: Any,
    template: str | None,
    label_field: str,
    max_tokens: int,
) -> list[Example]:
    """Render and tokenise `rows`, whose `label_field` may hold a label.

    Without a template (a format string over a row's fields), a row needs the field ``prompt`` or
    ``messages`` (chat). `max_tokens` is the longest prompt the model takes.

    An AdaInferError if a field is missing or of the wrong kind, or a prompt is too long.
    """
    examples = []
    for row in rows:
        text, special = _render(row, tokenizer, template)
        token_ids = tokenizer.encode(text, add_special_tokens=special)
        if not 0 < len(token_ids) <= max_tokens:
            raise AdaInferError(
                f"{row.place}: the prompt has {len(token_ids)} tokens, but the model takes 1 to "
                f"{max_tokens}: shorten the text or the template"
            )
        label = row.fields.get(label_field)
        if isinstance(label, dict):  # an object of a schema
            label = json.dumps(label, ensure_ascii=False)
        examples.append(Example(row.place, text, token_ids, None if label is None else str(label)))
    return examples


def _render(row: Row, tokenizer: Any, template: str | None) -> tuple[str, bool]:
    """The prompt's text, and whether the tokenizer should add its special tokens."""
    if template is not None:
        return fill(template, row), True
    prompt, messages = row.fields.get("prompt"), row.fields.get("messages")
    if isinstance(prompt, str):
        return prompt, True
    if isinstance(messages, list):
        try:
            return render_chat(tokenizer, messages, add_generation_prompt=True), False
        except ValueError as error:
            raise AdaInferError(
                f"{row.place}: the model's chat template rejects the messages: {error}"
            ) from None
    raise AdaInferError(
        f"{row.place} has neither a 'prompt' (text) nor 'messages' (list): give a --template"
    )


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The prompt that the tokenizer's chat template makes of `messages`.

    A ValueError if the template rejects them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a chat template can raise anything
        raise ValueError(" ".join(str(error).split())) from None


def fill(template: str, row: Row) -> str:
    """`template`, a format string, filled in with the row's fields.

    An AdaInferError if the row lacks a field, or the template is not a valid format string.
    """
    try:
        for _, name, _, _ in string.Formatter().parse(template):
            field = None if name is None else name.split(".")[0].split("[")[0]
            if field is not None and field not in row.fields:
                raise AdaInferError(
                    f"{row.place}: the template needs the field {field!r}, but the row has "
                    f"{', '.join(map(repr, row.fields)) or 'none'}"
                )
        return template.format_map(row.fields)
    except AdaInferError:
        raise
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise AdaInferError(
            f"{row.place}: the template is not a valid format string for this row ({error}); write "
            "{{ and }} for literal braces"
        ) from None


def find_labels(names: Sequence[str], example: Example, tokenizer: Any) -> tuple[Label, ...]:
    """The token that stands for each label: its first one after the prompt.

    An AdaInferError if there are fewer than two labels, or two labels share their first token.
    """
    if len(set(names)) != len(names) or len(names) < 2 or not all(names):
        raise AdaInferError(f"--labels needs at least two different names, got {list(names)}")
    labels: dict[int, Label] = {}
    for name in names:
        token_id = first_token(example.text, name, tokenizer)
        if token_id in labels:
            raise AdaInferError(
                f"the labels {labels[token_id].name!r} and {name!r} both begin with the token "
                f"{tokenizer.decode([token_id])!r}: choose other label names"
            )
        labels[token_id] = Label(name=name, token_id=token_id)
    return tuple(labels.values())


def first_token(prompt: str, answer: str, tokenizer: Any) -> int:
    """The first token of `answer` after `prompt`.

    A space goes between the two unless the prompt ends with white space.

    An AdaInferError if the answer merges with the prompt into one token.
    """
    separator = "" if prompt[-1:].isspace() else " "
    alone = tokenizer.encode(prompt, add_special_tokens=False)
    whole = tokenizer.encode(prompt + separator + answer, add_special_tokens=False)
    if whole[: len(alone)] != alone or len(whole) == len(alone):
        raise AdaInferError(
            f"the first token of the label {answer!r} merges with the end of the prompt "
            f"({prompt[-12:]!r}): end the template without white space"
        )
    return int(whole[len(alone)])


def check_labels_known(examples: Sequence[Example], labels: Sequence[Label]) -> None:
    """Check that every label in the data is one of `labels`.

    An AdaInferError if one is not; the message names the first such row.
    """
    names = [label.name for label in labels]
    for example in examples:
        if example.label is not None and example.label not in names:
            raise AdaInferError(
                f"{example.place}: the label {example.label!r} is not among {', '.join(names)}"
            )


def shared_start(prompts: Sequence[list[int]]) -> int:
    """How many tokens all of `prompts` begin with."""
    first, last = min(prompts), max(prompts)  # in lexical order: all begin as these two do
    pairs = enumerate(zip(first, last, strict=False))
    differing = (place for place, (one, other) in pairs if one != other)
    return next(differing, min(len(first), len(last)))
