"""Prompts, labels and choices from requests as users send them: lines of vLLM's batch files.

A line is ``{"custom_id", "method", "url", "body"}``; other keys are ignored, except ``label`` (the
right answer, if it is the token id of a label that the request names, or one of its choices),
``question`` (a name for the question) and ``group`` (the same in requests that came together, such
as those about one state; prompts of one line always did). The labels or choices are in the body.

Prompts are rendered as vLLM 0.32 renders those of each endpoint, with the tokenizer's own chat
template. vLLM's renderer itself needs an engine's config, and covers two of the four endpoints.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vllm_adainfer.engine.compat.server import decision_question
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example, Row, render_chat
from vllm_adainfer.offline.calibration.data.questions import LONGEST_NAME, with_questions

logger = logging.getLogger("vllm.adainfer.batch_files")  # vLLM's logging shows "vllm." alone

# With one of these in its body, a completion or chat runs at full depth.
FULL_DEPTH_KEYS = (
    "prompt_logprobs", "min_tokens", "logit_bias", "bad_words", "thinking_token_budget",
)  # fmt: skip
# Likewise, if it chooses from texts, or asks for an object.
FULL_DEPTH_CHOICE_KEYS = (
    "logprobs",
    "logprob_token_ids",
    "allowed_token_ids",
    "stop",
    "ignore_eos",
)


class LeftOutError(Exception):
    """A line that cannot exit; the message says why."""


def are_requests(rows: Sequence[Row]) -> bool:
    """Whether a file holds requests rather than rows for a template."""
    return "url" in rows[0].fields and "body" in rows[0].fields


def read_requests(
    rows: Sequence[Row], tokenizer: Any, vocabulary: int, max_tokens: int
) -> list[Example]:
    """The prompts of requests that can exit; a warning counts the lines that cannot.

    A request with several items or questions becomes as many prompts, as in vLLM. Token ids must be
    below `vocabulary`. Prompts of more than `max_tokens` tokens are left out.

    An AdaInferError if a line is not a request, or none can exit.
    """

    def read(row: Row, url: str, body: Mapping[str, Any]) -> Iterator[Example]:
        if url not in READERS:
            raise LeftOutError(f"{url}: not an endpoint that reads labels")
        yield from READERS[url](row, body, tokenizer)
        if isinstance(body.get("tool_choice"), Mapping):
            of_tools.append(row.place)

    of_tools: list[str] = []
    examples = read_lines(rows, read, vocabulary, max_tokens)
    if of_tools:
        logger.warning(
            "the arguments of a tool are early on servers alone that ask for nothing around them: "
            "with most tool parsers, start these with VLLM_ENFORCE_STRICT_TOOL_CALLING=0"
        )
    return with_questions(examples, tokenizer)


def read_lines(
    rows: Sequence[Row],
    read: Callable[[Row, str, Mapping[str, Any]], Iterator[Example]],
    vocabulary: int,
    max_tokens: int,
) -> list[Example]:
    """What `read` makes of the url and body of each line; see `read_requests`.

    An AdaInferError if a line is not a request, or none can exit.
    """
    examples: list[Example] = []
    left_out = Counter[str]()
    for row in rows:
        try:
            examples += _examples_of(row, read, vocabulary, max_tokens)
        except LeftOutError as error:
            left_out[str(error)] += 1
    if not examples:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in left_out.items())
        raise AdaInferError(f"no line of {rows[0].place.partition(',')[0]} can exit: {reasons}")
    for reason, count in left_out.items():
        logger.warning("%d of %d lines were left out: %s", count, len(rows), reason)
    return examples


def _examples_of(
    row: Row,
    read: Callable[[Row, str, Mapping[str, Any]], Iterator[Example]],
    vocabulary: int,
    max_tokens: int,
) -> list[Example]:
    body, url = row.fields.get("body"), str(row.fields.get("url"))
    if not isinstance(body, Mapping) or "url" not in row.fields:
        raise AdaInferError(f"{row.place} is not a request: it needs 'url' and 'body'")
    try:
        examples = list(read(row, url, body))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise LeftOutError(f"{url}: vLLM would refuse it ({reason:.80})") from None
    for example in examples:
        if not 0 < len(example.token_ids) <= max_tokens:
            raise LeftOutError(f"a prompt that does not have 1 to {max_tokens} tokens")
        tokens = [*example.token_ids, *(example.labels or ())]
        if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
            raise LeftOutError("token ids that are not in the vocabulary")
    return examples


def _completion(row: Row, body: Mapping[str, Any], tokenizer: Any) -> Iterator[Example]:
    answers, prompt = _answers(body, tokenizer), body["prompt"]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        yield _example(row, tokenizer.decode(prompt), prompt, **answers)
        return
    special = bool(body.get("add_special_tokens", True))
    for text in [prompt] if isinstance(prompt, str) else prompt:
        token_ids = tokenizer.encode(text, add_special_tokens=special)
        yield _example(row, text, token_ids, **answers)


def _chat(row: Row, body: Mapping[str, Any], tokenizer: Any) -> Iterator[Example]:
    text = render_chat(
        tokenizer,
        plain_messages(body["messages"]),
        add_generation_prompt=body.get("add_generation_prompt", True),
        continue_final_message=body.get("continue_final_message", False),
        tools=body.get("tools"),
        **(body.get("chat_template_kwargs") or {}),
    )
    special = bool(body.get("add_special_tokens", False))
    token_ids = tokenizer.encode(text, add_special_tokens=special)
    yield _example(row, text, token_ids, **_answers(body, tokenizer))


def _score(row: Row, body: Mapping[str, Any], tokenizer: Any) -> Iterator[Example]:
    """As in ``vllm/entrypoints/generate/generative_scoring/serving.py``."""

    def tokens(part: str | list[int], special: bool) -> list[int]:
        if isinstance(part, list):
            return part
        found: list[int] = tokenizer.encode(part, add_special_tokens=special)
        return found

    query = tokens(body["query"], bool(body.get("add_special_tokens", True)))
    labels = _at_least_two(body["label_token_ids"])
    for item in body["items"]:
        own = tokens(item, False)
        token_ids = own + query if body.get("item_first") else query + own
        yield _example(row, tokenizer.decode(token_ids), token_ids, labels)


def _decision(row: Row, body: Mapping[str, Any], tokenizer: Any) -> Iterator[Example]:
    """As in ``vllm/entrypoints/generate/structured_decisions/strategies.py``."""
    if any(body.get(kind) for kind in ("images", "audio", "videos")):
        raise LeftOutError("/v1/systemone: a state with images, audio or video")
    state = body["state"]
    if not isinstance(state, str):
        state = "" if state is None else json.dumps(state, ensure_ascii=False, indent=2)
    for name, asked in body["questions"].items():
        question, named = decision_question(name, asked)
        messages = [{"role": "user", "content": f"{state}\n\n{question}"}]
        if body.get("instructions"):
            messages.insert(0, {"role": "system", "content": body["instructions"]})
        more = {"enable_thinking": False, **(body.get("chat_template_kwargs") or {})}
        text = render_chat(tokenizer, messages, add_generation_prompt=True, **more)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        labels = [tokenizer.encode(text + one, add_special_tokens=False)[-1] for one in named]
        yield _example(row, text, token_ids, _at_least_two(labels), question=name)


READERS: Mapping[str, Callable[[Row, Mapping[str, Any], Any], Iterator[Example]]] = {
    "/v1/completions": _completion,
    "/v1/chat/completions": _chat,
    "/generative_scoring": _score,
    "/v1/systemone": _decision,
}


def _answers(body: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The ``labels``, ``choices`` or ``schema`` of a completion or chat."""
    for key in FULL_DEPTH_KEYS:
        if body.get(key):
            raise LeftOutError(f"a request with {key}, which runs at full depth")
    if body.get("repetition_penalty", 1) != 1:
        raise LeftOutError("a request with repetition_penalty, which runs at full depth")
    tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    if (schema := _schema(body)) is not None:
        for key in FULL_DEPTH_CHOICE_KEYS:
            if body.get(key):
                raise LeftOutError(f"a request for an object and {key}, which runs at full depth")
        return {"schema": schema}
    if body.get("tools") and body.get("tool_choice") == "required":
        raise LeftOutError("a request that must call any of its tools, and does not name one")
    if (body.get("response_format") or {}).get("type", "text") != "text":
        raise LeftOutError("a request with a response_format other than json_schema")
    if body.get("structured_outputs"):
        return {"choices": _choices(body, tokens, tokenizer)}
    if tokens != 1:
        raise LeftOutError("a request for more than one token")
    labels = body.get("allowed_token_ids") or body.get("logprob_token_ids")
    if labels is None:
        raise LeftOutError("a request that names no labels")
    return {"labels": _at_least_two(labels)}


def _schema(body: Mapping[str, Any]) -> str | None:
    """The JSON schema of the object that a request asks for, as vLLM 0.32 reads it.

    As the arguments of the tool that it must call, in ``response_format``, or else in
    ``structured_outputs``.
    """
    asked = body.get("response_format") or {}
    schema = (body.get("structured_outputs") or {}).get("json")
    if asked.get("type") == "json_schema":
        schema = asked["json_schema"].get("schema")
    tool = body.get("tool_choice")
    if isinstance(tool, Mapping):
        named = {one["function"]["name"]: one["function"] for one in body.get("tools") or ()}
        schema = named[tool["function"]["name"]].get("parameters")
    return schema if schema is None or isinstance(schema, str) else json.dumps(schema)


def _choices(body: Mapping[str, Any], tokens: int | None, tokenizer: Any) -> tuple[str, ...]:
    """The texts that a request chooses from; the longest must fit into `tokens`."""
    choices = tuple(dict.fromkeys(body["structured_outputs"].get("choice") or ()))
    if not choices:
        raise LeftOutError("a request with structured_outputs other than choice")
    for key in FULL_DEPTH_CHOICE_KEYS:
        if body.get(key):
            raise LeftOutError(f"a request with a choice and {key}, which runs at full depth")
    longest = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in choices)
    if tokens is not None and tokens <= longest:
        raise LeftOutError("a request with a choice that max_tokens may cut off")
    return choices


def _at_least_two(labels: Sequence[int]) -> tuple[int, ...]:
    found = tuple(dict.fromkeys(labels))
    if len(found) < 2:
        raise LeftOutError("a request about fewer than two labels")
    return found


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their text parts joined as vLLM joins them."""
    return [{**message, "content": _text_of(message["content"])} for message in messages]


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" for part in content):
        raise LeftOutError("a message that is not text alone")
    return "\n".join(part["text"] for part in content)


def _example(
    row: Row,
    text: str,
    token_ids: list[int],
    labels: tuple[int, ...] | None = None,
    choices: tuple[str, ...] | None = None,
    question: str | None = None,
    schema: str | None = None,
) -> Example:
    """An example; the row's own name for its question goes before the request's."""
    named, right = row.fields.get("question") or question, row.fields.get("label")
    return Example(
        row.place,
        text,
        token_ids,
        str(right) if right in (choices or labels or ()) else None,
        labels,
        choices,
        str(named)[:LONGEST_NAME] if named else None,
        group=str(row.fields.get("group") or row.place),
        schema=schema,
    )
