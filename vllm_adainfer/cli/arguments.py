"""Arguments of several commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_adainfer.errors import AdaInferError

Model = Annotated[str, typer.Option(help="Directory or hub id of the model.")]
Data = Annotated[
    Path, typer.Option(help="JSON lines, one object per row; or a directory of *.jsonl.")
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Python format string over a row's fields, or @FILE. Without it, each row needs "
        "'prompt' or 'messages'."
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        help="For a reranker, and rows with 'query' and 'documents': the template of the server's "
        "--chat-template, a file or the template itself."
    ),
]
HfOverrides = Annotated[
    str,
    typer.Option(
        help="JSON, as for vLLM's option: what to change in the model's config.json, for example "
        "to serve a reranker as a classifier."
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="The method that quantises the weights while they are loaded, if the server will have "
        "vLLM's option of that name."
    ),
]
ServerOption = Annotated[
    str | None, typer.Option(help="The server's option of that name, if it will have one.")
]
LabelField = Annotated[str, typer.Option(help="The field of a row that holds its label.")]
Lora = Annotated[
    str,
    typer.Option(help="NAME=DIR: the LoRA adapter that requests use, and the name they give it."),
]
Repeat = Annotated[
    int,
    typer.Option(
        min=1,
        help="Rounds to time: in each, stock vLLM, ours at each bound and ours without exits "
        "run the same third of the prompts, in an order that goes round. An interval of the "
        "speed-up needs 6. The answers are of one pass over all prompts.",
    ),
]
Labels = Annotated[str, typer.Option(help="Comma-separated labels: the possible answers.")]


def overrides_of(text: str) -> dict[str, Any] | None:
    """The value of ``--hf-overrides``, if any; an AdaInferError if it is not a JSON object."""
    if not text:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdaInferError(f"--hf-overrides is not JSON ({error.msg})") from None
    if not isinstance(found, dict):
        raise AdaInferError(
            '--hf-overrides must be a JSON object, such as {"num_labels": 1}, not a '
            f"{type(found).__name__}"
        )
    return found


def names_of(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",")) if text else ()
