"""Requests for structured answers from a batch file, and the same ones with a new grammar."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.utils import get_json_schema_from_tools

from benchmarks.offline.structured_engine import Request
from vllm_adainfer.offline.calibration.data.examples import render_chat

Body = Mapping[str, Any]


def bodies_by_kind(file: Path) -> dict[str, list[Body]]:
    """The bodies of a batch file's chats, by `custom_id` up to its last ``-``."""
    found: dict[str, list[Body]] = defaultdict(list)
    for text in file.read_text().splitlines():
        line = json.loads(text)
        found[line["custom_id"].rpartition("-")[0]].append(line["body"])
    return dict(found)


def lines_of(file: Path, kind: str) -> list[str]:
    """The lines of a batch file whose requests are of one kind."""
    lines = file.read_text().splitlines(keepends=True)
    return [one for one in lines if json.loads(one)["custom_id"].rpartition("-")[0] == kind]


def read(bodies: Sequence[Body], tokenizer: Any) -> list[Request]:
    """The requests that vLLM's server makes of chats."""
    return [_read(body, tokenizer) for body in bodies]


def _read(body: Body, tokenizer: Any) -> Request:
    chat = ChatCompletionRequest.model_validate(body)
    text = render_chat(
        tokenizer, body["messages"], add_generation_prompt=True, tools=body.get("tools")
    )
    params = chat.to_sampling_params(body["max_tokens"], {})
    # As a tool parser adds it (`ToolParser.adjust_request`).
    schema = get_json_schema_from_tools(chat.tool_choice, chat.tools)
    if schema is not None:
        params.structured_outputs = StructuredOutputsParams(json=schema)
    return Request(tokenizer.encode(text, add_special_tokens=False), params)


def with_new_grammar(bodies: Sequence[Body], number: int) -> list[Body]:
    """The same requests, whose grammar allows the same answers but has another text.

    `number` tells new grammars apart; with 0 they are as they were.
    """
    return [_renewed(body, number) for body in bodies] if number else list(bodies)


def _renewed(body: Body, number: int) -> Body:
    new = deepcopy(dict(body))
    if "response_format" in new:
        new["response_format"]["json_schema"]["schema"]["title"] = f"Answer {number}"
    elif "tools" in new:
        for tool in new["tools"]:
            tool["function"]["parameters"]["title"] = f"Call {number}"
    else:
        outputs = new["structured_outputs"]
        outputs["regex"] = "(" * number + outputs["regex"] + ")" * number
    return new
