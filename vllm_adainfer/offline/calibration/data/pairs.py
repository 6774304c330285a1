"""Pairs of a query and a document, as ``/score`` and ``/rerank`` send them to a reranker.

They are rendered as vLLM 0.32 renders them (`get_score_prompt` in
`entrypoints/pooling/scoring/io_processor.py`): by the chat template of the server, or as two texts
one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example, Row
from vllm_adainfer.offline.calibration.data.score_labels import NO, YES, separates_texts

QUERY, DOCUMENTS, LABELS = "query", "documents", "labels"
NAMES = {"0": NO, "1": YES, "False": NO, "True": YES}  # of labels, as data sets write them


def are_pairs(rows: Sequence[Row]) -> bool:
    """Whether rows hold a query and its documents; an AdaInferError if only some do."""
    hold = [QUERY in row.fields and DOCUMENTS in row.fields for row in rows]
    if any(hold) and not all(hold):
        odd = rows[hold.index(False)]
        raise AdaInferError(
            f'{odd.place} has no "{QUERY}" with "{DOCUMENTS}", which other rows have: give all '
            "rows one form"
        )
    return all(hold)


@dataclass(frozen=True)
class Pairs:
    """How a server puts a query and a document together.

    Attributes:
        tokenizer: that of the model.
        template: the server's chat template; None joins the two texts.
        with_separator: whether the tokenizer's separator goes between them.

    """

    tokenizer: Any
    template: str | None
    with_separator: bool

    @classmethod
    def of(cls, tokenizer: Any, hf_config: Any, chat_template: str | None) -> Pairs:
        """The way of a server with this ``--chat-template``, a file or the template itself.

        An AdaInferError if the file cannot be read.
        """
        if chat_template is not None and "{" not in chat_template:
            try:
                chat_template = Path(chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise AdaInferError(
                    f"cannot read --chat-template {chat_template}: {error}"
                ) from None
        return cls(tokenizer, chat_template, separates_texts(hf_config))

    def rendered(
        self, row: Row, query: str, document: str, more: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[str, list[int]]:
        """Text and token ids of a pair; the template gets `more`, such as an instruction.

        An AdaInferError if the template rejects the pair of `row`.
        """
        tokenizer = self.tokenizer
        if self.template is not None:
            messages = [
                {"role": "query", "content": query},
                {"role": "document", "content": document},
            ]
            try:
                text = tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, **more
                )
            except Exception as error:  # a template can raise anything
                said = " ".join(str(error).split())
                raise AdaInferError(
                    f"{row.place}: --chat-template rejects the pair: {said}"
                ) from None
            return text, list(tokenizer(text)["input_ids"])
        if self.with_separator:
            token_ids = list(tokenizer(text=query, text_pair=document)["input_ids"])
            return tokenizer.decode(token_ids), token_ids
        return query + document, list(tokenizer(query + document)["input_ids"])


def read_pairs(rows: Sequence[Row], pairs: Pairs, longest: int) -> list[Example]:
    """The prompts of all pairs, those of a query in one group.

    An AdaInferError if a row is malformed, the template rejects it, or a prompt is too long.
    """
    examples = []
    for number, row in enumerate(rows):
        for query, document, label in _pairs_of(row):
            text, token_ids = pairs.rendered(row, query, document)
            if len(token_ids) > longest:
                raise AdaInferError(
                    f"{row.place}: a pair has {len(token_ids)} tokens, and the model takes "
                    f"{longest}: shorten its document"
                )
            examples.append(Example(row.place, text, token_ids, label, group=str(number)))
    return examples


def _pairs_of(row: Row) -> Iterator[tuple[str, str, str | None]]:
    query, documents, labels = (row.fields.get(name) for name in (QUERY, DOCUMENTS, LABELS))
    if not isinstance(query, str) or not query:
        raise AdaInferError(f'{row.place}: "{QUERY}" must be a text')
    if (
        not isinstance(documents, list)
        or not documents
        or not all(one and isinstance(one, str) for one in documents)
    ):
        raise AdaInferError(f'{row.place}: "{DOCUMENTS}" must be a list of texts')
    if labels is None:
        labels = [None] * len(documents)
    if not isinstance(labels, list) or len(labels) != len(documents):
        raise AdaInferError(
            f'{row.place}: "{LABELS}" must be a list with one entry for each of '
            f"{len(documents)} documents"
        )
    for document, label in zip(documents, labels, strict=True):
        yield query, document, None if label is None else NAMES.get(str(label), str(label))
