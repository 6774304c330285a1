"""The prompts of requests to a classifier: batch lines of ``/rerank``, ``/score``, ``/classify``.

They are rendered as vLLM 0.32 renders them (`entrypoints/pooling/scoring/io_processor.py`). All
prompts of a line are one group: they came together, as the documents of a query do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vllm_adainfer.offline.calibration.data.batch_files import (
    LeftOutError,
    plain_messages,
    read_lines,
)
from vllm_adainfer.offline.calibration.data.examples import Example, Row, render_chat
from vllm_adainfer.offline.calibration.data.pairs import Pairs

CUT_KEYS = (
    "max_tokens_per_query", "max_tokens_per_doc", "truncate_prompt_tokens", "chat_template",
    "mm_processor_kwargs",
)  # fmt: skip
PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


def read_score_requests(
    rows: Sequence[Row], pairs: Pairs, vocabulary: int, longest: int
) -> list[Example]:
    """The prompts of requests that can exit; a warning counts the lines that cannot.

    Token ids must be below `vocabulary`. Prompts of more than `longest` tokens are left out.

    An AdaInferError if a line is not a request, none can exit, or a template rejects a pair.
    """

    def read(row: Row, url: str, body: Mapping[str, Any]) -> Iterator[Example]:
        if url not in READERS:
            raise LeftOutError(f"{url}: not an endpoint that returns scores")
        for key in CUT_KEYS:
            if body.get(key):
                raise LeftOutError(f"a request with {key}, which changes its prompts")
        if body.get("use_activation") is False:
            raise LeftOutError("a request for raw scores, which runs at full depth")
        group = str(row.fields.get("group") or row.place)
        for text, token_ids in READERS[url](row, body, pairs):
            yield Example(row.place, text, token_ids, None, group=group)

    return read_lines(rows, read, vocabulary, longest)


Prompts = Iterator[tuple[str, list[int]]]


def _rerank(row: Row, body: Mapping[str, Any], pairs: Pairs) -> Prompts:
    return _joined(row, body, pairs, [body["query"]], _listed(body["documents"]))


def _score(row: Row, body: Mapping[str, Any], pairs: Pairs) -> Prompts:
    named = [names for names in PAIRS if all(name in body for name in names)]
    if not named:
        raise ValueError("it names no two texts")
    first, second = named[0]
    return _joined(row, body, pairs, _listed(body[first]), _listed(body[second]))


def _joined(
    row: Row,
    body: Mapping[str, Any],
    pairs: Pairs,
    queries: Sequence[Any],
    documents: Sequence[Any],
) -> Prompts:
    """Each document with its query, or all with the only one."""
    if len(queries) not in (1, len(documents)):
        raise ValueError("as many queries as documents, or one")
    more = dict(body.get("chat_template_kwargs") or {})
    if body.get("instruction") is not None:
        more.setdefault("instruction", body["instruction"])
    for place, document in enumerate(documents):
        query = queries[place if len(queries) > 1 else 0]
        if not isinstance(query, str) or not isinstance(document, str):
            raise LeftOutError("a query or document that is not text alone")
        yield pairs.rendered(row, query, document, more)


def _classify(row: Row, body: Mapping[str, Any], pairs: Pairs) -> Prompts:
    tokenizer = pairs.tokenizer
    if "messages" in body:
        text = render_chat(
            tokenizer,
            plain_messages(body["messages"]),
            add_generation_prompt=body.get("add_generation_prompt", False),
            continue_final_message=body.get("continue_final_message", False),
            **(body.get("chat_template_kwargs") or {}),
        )
        special = bool(body.get("add_special_tokens", False))
        yield text, tokenizer.encode(text, add_special_tokens=special)
        return
    prompts = body["input"]
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    special = bool(body.get("add_special_tokens", True))
    for prompt in prompts:
        if isinstance(prompt, str):
            yield prompt, tokenizer.encode(prompt, add_special_tokens=special)
        else:
            yield tokenizer.decode(prompt), list(prompt)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


READERS: Mapping[str, Callable[[Row, Mapping[str, Any], Pairs], Prompts]] = {
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), _rerank),
    **dict.fromkeys(("/score", "/v1/score"), _score),
    "/classify": _classify,
}
