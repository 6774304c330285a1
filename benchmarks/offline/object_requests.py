r"""Write the requests of `bench_structured.py`: a batch file with objects of decisions about texts.

    .venv/bin/python benchmarks/offline/object_requests.py --data-dir DIR --output FILE.jsonl

DIR holds TASK/test.jsonl of SST-2, CR, AG News and TREC (`{"text": ...}`), and for `--part train`
their training files: ``rows`` of the model that `train_writer.py` makes, which has learnt none of
them. The kind of a request is its `custom_id` up to the last ``-``:
`bench_structured.py` measures each kind by itself.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from vllm_adainfer.offline.calibration.data.examples import read_rows
from vllm_adainfer.offline.evaluation.report import write_whole

Schema = dict[str, Any]
BOOLEAN: Schema = {"type": "boolean"}
REASON: Schema = {"type": "string", "minLength": 30, "maxLength": 60}
LONGEST_TEXT, MOST_TOKENS = 600, 96
TASKS = {"review": ("sst2", "cr"), "news": ("ag_news",), "question": ("trec",)}  # of texts about it
ASK = {
    "review": "Describe this review as JSON.\n\nReview: {}",
    "news": "Describe this news item as JSON.\n\nNews: {}",
    "question": "Describe this question as JSON.\n\nQuestion: {}",
    "moderation": "Moderate this text as JSON.\n\nText: {}",
    "free text": "Write on: {}",
}


def one_of(*values: str) -> Schema:
    """A field with these values."""
    return {"type": "string", "enum": list(values)}


SENTIMENT = one_of("negative", "positive")
ASPECT = one_of("acting", "story", "humor", "price", "usability", "other")
REVIEW = {"sentiment": SENTIMENT, "aspect": ASPECT, "negated": BOOLEAN}
NEWS = {
    "topic": one_of("business", "sci_tech", "sports", "world"),
    "region": one_of("americas", "europe", "asia", "middle_east", "other"),
    "numbers": BOOLEAN,
}
QUESTION = {
    "answer_type": one_of("abbreviation", "description", "entity", "human", "location", "number"),
    "word": one_of("what", "who", "when", "where", "how", "other"),
    "named": BOOLEAN,
}
MODERATION = dict.fromkeys(
    ("harassment", "hate", "violence", "sexual", "self_harm", "spam", "illegal"), BOOLEAN
)
FREE = {"structured_outputs": {"regex": "[a-z ,.']{60,80}"}}


def main(
    data_dir: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()],
    each: Annotated[int, typer.Option(min=1, help="Requests of each kind, at most.")] = 640,
    part: Annotated[str, typer.Option(help="test or train.")] = "test",
) -> None:
    """Write the batch file."""
    texts = {
        about: [
            str(row.fields["text"])[:LONGEST_TEXT]
            for task in tasks
            for row in read_rows(data_dir / task / f"{part}.jsonl")
        ]
        for about, tasks in TASKS.items()
    }
    lines = []
    for kind, (about, ask, answer) in kinds().items():
        chosen = list(texts[about])
        random.Random(kind).shuffle(chosen)
        lines += [
            line(f"{kind}-{number}", ASK[ask].format(text), answer)
            for number, text in enumerate(chosen[:each])
        ]
    write_whole(output, "".join(json.dumps(one) + "\n" for one in lines))


def kinds() -> dict[str, tuple[str, str, Mapping[str, Any]]]:
    """By kind: what its texts are, how they are asked about, and what the answer has to be."""
    return {
        "review": ("review", "review", object_of("review", REVIEW)),
        "news": ("news", "news", object_of("news", NEWS)),
        "question": ("question", "question", object_of("question", QUESTION)),
        "one enum": ("review", "review", object_of("sentiment", {"sentiment": SENTIMENT})),
        "seven booleans": ("review", "moderation", object_of("moderation", MODERATION)),
        "reason last": ("review", "review", object_of("verdict", {**REVIEW, "reason": REASON})),
        "reason first": ("review", "review", object_of("verdict", {"reason": REASON, **REVIEW})),
        "tool call": ("review", "review", call_of("file_review", REVIEW)),
        "free text": ("review", "free text", FREE),
    }


def object_of(name: str, fields: Mapping[str, Schema]) -> Mapping[str, Any]:
    """Asks for an object with all `fields`."""
    schema = {"name": name, "schema": schema_of(fields)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def call_of(name: str, fields: Mapping[str, Schema]) -> Mapping[str, Any]:
    """Forces the call of a tool with all `fields`."""
    tool = {"name": name, "parameters": schema_of(fields)}
    return {
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": {"type": "function", "function": {"name": name}},
    }


def schema_of(fields: Mapping[str, Schema]) -> Schema:
    """The JSON schema of an object with all `fields`."""
    return {
        "type": "object",
        "properties": dict(fields),
        "required": list(fields),
        "additionalProperties": False,
    }


def line(custom_id: str, text: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a batch file."""
    messages: Sequence[Mapping[str, str]] = [{"role": "user", "content": text}]
    body = {"messages": messages, "temperature": 0, "max_tokens": MOST_TOKENS, **answer}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "model", **body},
    }


if __name__ == "__main__":
    typer.run(main)
