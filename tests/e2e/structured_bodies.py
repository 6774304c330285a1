"""Bodies that ask for structured answers, as clients send them. Each has a grammar of its own,
except `ANY_JSON`.

Those of libraries were recorded from openai 3.3, instructor 1.17, langchain-openai 1.7 and
pydantic-ai 2.68, for one pydantic model, whose docstring here tells their schemas apart.
"""

from __future__ import annotations

import json
from typing import Any

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FIELDS: dict[str, dict[str, Any]] = {
    "sentiment": {"enum": ["negative", "neutral", "positive"], "type": "string"},
    "negated": {"type": "boolean"},
    "stars": {"enum": [1, 2, 3, 10], "type": "integer"},
}
TITLED = {name: {"title": name.title(), **one} for name, one in FIELDS.items()}
CLOSED = {"additionalProperties": False}
REGEX = r"(good|bad)-[0-9]{2}"
GRAMMAR = 'root ::= "the film is " ("good" | "bad" | "a plot") "."'


def schema_of(says: str, fields: dict[str, Any] = TITLED, **more: Any) -> dict[str, Any]:
    """The schema of a review; what it says of itself makes it another grammar to the server."""
    described = {"description": says, "properties": fields, "required": list(fields)}
    return {**described, "title": "Review", "type": "object", **more}


def in_format(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A ``response_format``."""
    named = {"name": "Review", "schema": schema, **more}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A function with such arguments."""
    function = {"name": name, "description": "Note a review.", "parameters": parameters, **more}
    return {"type": "function", "function": function}


def forced(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A function that must be called."""
    choice = {"type": "function", "function": {"name": name}}
    return {"tools": [tool(name, parameters, **more)], "tool_choice": choice}


INSTRUCTION = {
    "role": "system",
    "content": "\n            As a genius expert, your task is to understand the content and "
    "provide\n            the parsed objects in json that match the following json_schema:\n\n\n"
    f"            {json.dumps(FIELDS['negated'], indent=2)}\n\n"
    "            Make sure to return an instance of the JSON, not the schema itself\n",
}
STRICT = {"name": "Review", "schema": schema_of("Responses", **CLOSED), "strict": True}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "openai, parse": (CHAT, in_format(schema_of("parse", **CLOSED), strict=True)),
    "openai, a function": (CHAT, forced("review", schema_of("a function"), strict=True)),
    "openai, some function": (
        CHAT,
        {
            "tools": [
                tool("review", schema_of("one"), strict=True),
                tool("other", schema_of("another"), strict=True),
            ],
            "tool_choice": "required",
        },
    ),
    "openai, Responses": (RESPONSES, {"text": {"format": {"type": "json_schema", **STRICT}}}),
    "instructor": (CHAT, forced("Review", {**schema_of("tools"), "required": sorted(FIELDS)})),
    "instructor, JSON_SCHEMA": (CHAT, in_format(schema_of("schema"))),
    "instructor, JSON": (
        CHAT,
        {"response_format": {"type": "json_object"}, "messages": [INSTRUCTION], "max_tokens": 60},
    ),
    "LangChain": (CHAT, in_format(schema_of("LangChain", **CLOSED), strict=True)),
    "LangChain, function_calling": (
        CHAT,
        {**forced("Review", schema_of("function", FIELDS)), "parallel_tool_calls": False},
    ),
    "pydantic-ai": (
        CHAT,
        {
            "tools": [tool("final_result", schema_of("final", FIELDS, **CLOSED), strict=True)],
            "tool_choice": "required",
        },
    ),
    "pydantic-ai, native": (
        CHAT,
        in_format(schema_of("native", FIELDS, **CLOSED), description="A review.", strict=True),
    ),
    "vLLM, json": (CHAT, {"structured_outputs": {"json": schema_of("json")}}),
    "vLLM, regex": (CHAT, {"structured_outputs": {"regex": REGEX}}),
    "vLLM, choice": (CHAT, {"structured_outputs": {"choice": ["the film", "the plot", "other"]}}),
    "vLLM, grammar": (CHAT, {"structured_outputs": {"grammar": GRAMMAR}}),
    "vLLM, json in completions": (
        COMPLETIONS,
        {"structured_outputs": {"json": schema_of("completions")}},
    ),
    "vLLM, regex in completions": (COMPLETIONS, {"structured_outputs": {"regex": f"{REGEX}!"}}),
}
# vLLM 0.32 holds a function to its schema if it is "strict": the answers of others are any JSON.
ANY_JSON = "instructor", "instructor, JSON", "LangChain, function_calling"


def body_of(name: str, text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request about `text`."""
    path, asked = BODIES[name]
    message = {"role": "user", "content": text}
    said: dict[str, Any] = {
        CHAT: {"max_tokens": 240},
        COMPLETIONS: {"prompt": text, "max_tokens": 240},
        RESPONSES: {"input": [message], "max_output_tokens": 240},
    }[path]
    if path == CHAT:
        more = {"messages": [*asked.get("messages", ()), message], **more}
    return path, {"model": "model", "temperature": 0, **said, **asked, **more}
