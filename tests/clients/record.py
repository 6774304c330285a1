"""Records what clients send for a task with one answer, in a file for each function below.

    python tests/clients/record.py openai           # in an environment with `openai`
    python tests/clients/record.py langchain        # with `langchain-openai`
    python tests/clients/record.py llamaindex       # with `llama-index-llms-openai-like`
    python tests/clients/record.py instructor       # with `instructor`
    python tests/clients/record.py dspy litellm     # with `dspy`, which brings `litellm`
    python tests/clients/record.py aurelio          # with `semantic-router`
    python tests/clients/record.py http semantic    # with `pydantic`, as all of these

A server on loopback answers. `semantic_router_label` sends what a client in Go would. What files
say of exits is kept: `tests/unit/test_clients.py` compares it with the plugin.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Literal
from urllib.request import Request, urlopen

from pydantic import BaseModel

PORT = 9100
URL = f"http://127.0.0.1:{PORT}/v1"
PACKAGES = {
    "langchain": "langchain-openai",
    "llamaindex": "llama-index-llms-openai-like",
    "aurelio": "semantic-router",
}
BY_HAND = {"http": "any HTTP client", "semantic": "vllm-project/semantic-router, August 2026"}
TOPICS = ["billing", "bug", "other"]
TICKET = "I was charged twice in March."
MESSAGES: Any = [{"role": "user", "content": f"{TICKET} Topic: billing, bug or other?"}]


class Ticket(BaseModel):
    topic: Literal["billing", "bug", "other"]
    urgent: bool
    priority: Literal[1, 2, 3, 4, 5]


def openai_plain() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    client.chat.completions.create(model="MODEL", messages=MESSAGES)


def openai_choice() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    client.chat.completions.create(
        model="MODEL",
        messages=MESSAGES,
        temperature=0,
        extra_body={"structured_outputs": {"choice": TOPICS}},
    )


def openai_label() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    client.completions.create(
        model="MODEL",
        prompt=f"Ticket: {TICKET}\nUrgent, yes or no?",
        temperature=0,
        max_tokens=1,
        extra_body={"allowed_token_ids": [9642, 912], "vllm_xargs": {"adainfer_policy": "label"}},
    )


def openai_logit_bias() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    client.chat.completions.create(
        model="MODEL",
        messages=MESSAGES,
        temperature=0,
        max_tokens=1,
        logit_bias={"9642": 100, "912": 100},
    )


def openai_logprobs() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    client.chat.completions.create(
        model="MODEL",
        messages=MESSAGES,
        temperature=0,
        max_tokens=1,
        logprobs=True,
        top_logprobs=5,
    )


def openai_label_logprobs() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    client.chat.completions.create(
        model="MODEL",
        messages=MESSAGES,
        max_tokens=1,
        logprobs=True,
        extra_body={"logprob_token_ids": [9642, 912]},
    )


def openai_parse() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    client.chat.completions.parse(
        model="MODEL", messages=MESSAGES, temperature=0, response_format=Ticket
    )


def openai_responses() -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    client.responses.parse(model="MODEL", input=MESSAGES, temperature=0, text_format=Ticket)


def openai_tool() -> None:
    from openai import OpenAI, pydantic_function_tool

    client = OpenAI(base_url=URL, api_key="none")
    client.chat.completions.create(
        model="MODEL",
        messages=MESSAGES,
        temperature=0,
        tools=[pydantic_function_tool(Ticket)],
        tool_choice={"type": "function", "function": {"name": "Ticket"}},
    )


def langchain_plain() -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=URL, api_key="none", model="MODEL")
    model.invoke(MESSAGES)


def langchain_choice() -> None:
    from langchain_openai import ChatOpenAI

    choice = {"structured_outputs": {"choice": TOPICS}}
    model = ChatOpenAI(base_url=URL, api_key="none", model="MODEL", extra_body=choice)
    model.invoke(MESSAGES)


def langchain_structured() -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=URL, api_key="none", model="MODEL", temperature=0)
    model.with_structured_output(Ticket).invoke(MESSAGES)


def langchain_function() -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=URL, api_key="none", model="MODEL", temperature=0)
    model.with_structured_output(Ticket, method="function_calling").invoke(MESSAGES)


def llamaindex_choice() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        api_base=URL,
        api_key="none",
        model="MODEL",
        is_chat_model=True,
        additional_kwargs={"extra_body": {"structured_outputs": {"choice": TOPICS}}},
    )
    model.chat([ChatMessage(**one) for one in MESSAGES])


def llamaindex_structured() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        api_base=URL, api_key="none", model="MODEL", is_chat_model=True, temperature=0
    )
    model.as_structured_llm(Ticket).chat([ChatMessage(**one) for one in MESSAGES])


def llamaindex_schema() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        api_base=URL,
        api_key="none",
        model="MODEL",
        is_chat_model=True,
        temperature=0,
        should_use_structured_outputs=True,
    )
    model.as_structured_llm(Ticket).chat([ChatMessage(**one) for one in MESSAGES])


def instructor_literal() -> None:
    import instructor
    from openai import OpenAI

    client = instructor.from_openai(OpenAI(base_url=URL, api_key="none"))
    client.chat.completions.create(
        model="MODEL",
        messages=MESSAGES,
        temperature=0,
        response_model=Literal["billing", "bug", "other"],
    )


def instructor_schema() -> None:
    import instructor
    from openai import OpenAI

    client = instructor.from_openai(
        OpenAI(base_url=URL, api_key="none"), mode=instructor.Mode.JSON_SCHEMA
    )
    client.chat.completions.create(
        model="MODEL", messages=MESSAGES, temperature=0, response_model=Ticket
    )


def dspy_predict() -> None:
    import dspy

    dspy.configure(lm=dspy.LM("openai/MODEL", api_base=URL, api_key="none", cache=False))
    ask = dspy.Predict("ticket -> topic: Literal['billing', 'bug', 'other'], urgent: bool")
    ask(ticket=TICKET)


def dspy_schema() -> None:
    import dspy

    json_of_ticket = {"structured_outputs": {"json": Ticket.model_json_schema()}}
    model = dspy.LM(
        "openai/MODEL",
        api_base=URL,
        api_key="none",
        cache=False,
        temperature=0,
        extra_body=json_of_ticket,
    )
    dspy.configure(lm=model, adapter=dspy.JSONAdapter())
    numbers = "Literal[1, 2, 3, 4, 5]"
    topics = "Literal['billing', 'bug', 'other']"
    ask = dspy.Predict(f"ticket -> topic: {topics}, urgent: bool, priority: {numbers}")
    ask(ticket=TICKET)


def litellm_score() -> None:
    import litellm

    litellm.completion(
        model="hosted_vllm/MODEL",
        api_base=URL,
        messages=[{"role": "user", "content": f"{TICKET} How urgent is this, from 1 to 5?"}],
        temperature=0,
        structured_outputs={"choice": ["1", "2", "3", "4", "5"]},
    )


def aurelio_decision() -> None:
    import asyncio

    from semantic_router.decision_models import SystemOneDecisionModel, choice, noul, score

    model = SystemOneDecisionModel(name="MODEL", base_url=URL.removesuffix("/v1"))
    questions = {
        "topic": choice("What is it about?", dict.fromkeys(TOPICS)),
        "urgent": noul("Is it urgent?"),
        "priority": score("How urgent is it?", ["not", "a bit", "very"]),
    }
    asyncio.run(model.aask(TICKET, questions))


def semantic_router_label() -> None:
    # In Go: GenerateWithSystemPrompt(..., &GenerationOptions{MaxTokens: 128, Temperature: 0,
    # JSONMode: true}), whose JSON leaves out a temperature of 0 ("omitempty").
    asked = "Choose exactly one label from: billing, bug, other.\nReturn only JSON."
    body = {
        "model": "MODEL",
        "messages": [{"role": "system", "content": asked}, {"role": "user", "content": TICKET}],
        "max_tokens": 128,
        "response_format": {"type": "json_object"},
    }
    post("/v1/chat/completions", body)


def http_classify() -> None:
    post("/classify", {"model": "MODEL", "input": TICKET})


def http_scoring() -> None:
    question = "Is this ticket urgent, yes or no? "
    body = {"query": question, "items": [TICKET], "label_token_ids": [9642, 912]}
    post("/generative_scoring", body)


def post(path: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    server = URL.removesuffix("/v1")
    urlopen(Request(server + path, json.dumps(body).encode(), headers)).close()


class Recorder(BaseHTTPRequestHandler):
    """Keeps what it is sent, and answers with a chat completion."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "body": body})
        message = {"role": "assistant", "content": "billing"}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "text": "billing"}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "MODEL"}
        sent = json.dumps({**answer, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: Any) -> None:
        pass


def record(function: Callable[[], None]) -> None:
    """Write what a function sends first: a client that cannot read the answer may ask again."""
    Recorder.seen.clear()
    failure: Exception | None = None
    try:
        function()
    except Exception as error:  # the answer is no object
        failure = error
    if not Recorder.seen:
        raise SystemExit(f"{function.__name__} sent nothing: {failure}")
    client = function.__name__.partition("_")[0]
    package = PACKAGES.get(client, client)
    _, _, lines = inspect.getsource(function).partition("\n")
    call = re.sub(r"^ +(import|from) .*\n+", "", lines, flags=re.M)
    file = Path(__file__).with_name(function.__name__.replace("_", "-") + ".json")
    recorded = {
        "client": BY_HAND.get(client) or f"{package} {importlib.metadata.version(package)}",
        "call": textwrap.dedent(call).strip(),
        **Recorder.seen[0],
    }
    kept = json.loads(file.read_text()) if file.exists() else {}
    written = {**recorded, **{key: kept[key] for key in kept if key not in recorded}}
    entries = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in written.items())
    file.write_text("{\n " + ",\n ".join(entries) + "\n}\n")


if __name__ == "__main__":
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it fetches none
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Recorder)
    Thread(target=server.serve_forever, daemon=True).start()
    for name, function in list(globals().items()):
        if name.startswith(tuple(f"{one}_" for one in sys.argv[1:])):
            record(function)
