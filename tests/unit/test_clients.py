"""What clients send, as `tests/clients/record.py` recorded it, exits as files and page say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest
from vllm.entrypoints.generate.structured_decisions.protocol import StructuredDecisionRequest
from vllm.entrypoints.generate.structured_decisions.strategies import NextTokenStrategy
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.parser import DelegatingParser
from vllm.tool_parsers import ToolParserManager
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from tests.admitted import admitted
from tests.in_docs import DOCS
from tests.objects import two_fields
from tests.tiny import tiny_config, word_tokenizer
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Choice, Label
from vllm_adainfer.artifact.outputs import Choices, LabelPool, Labels
from vllm_adainfer.drafts.schemas import digest_of
from vllm_adainfer.engine.admission.admission import Admission, check_request
from vllm_adainfer.engine.compat.server import decision_question
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.promise.tolerance import Tolerance
from vllm_adainfer.settings.engine import Settings

RECORDED = {
    file.stem: json.loads(file.read_text())
    for file in sorted((Path(__file__).parents[1] / "clients").glob("*.json"))
}
CONTEXT = 4096  # tokens that a model of the server may write
YES, NO = 9642, 912
PLACES = {str(label): place for place, label in enumerate([*"ABC", "yes", "no", *range(10)], 32)}


def labels_of(names: dict[str, int]) -> tuple[Label, ...]:
    return tuple(Label(name=name, token_id=token) for name, token in names.items())


def choices_of(*texts: str) -> Choices:
    numbered = enumerate(texts, 64)
    return Choices(
        choices=tuple(
            Choice(text=text, token_ids=(token,), first_tokens=(token,)) for token, text in numbered
        )
    )


def object_of(properties: dict[str, Any], **more: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties), **more}
    return two_fields().model_copy(update={"schema_digest": digest_of(json.dumps(schema))})


TOPIC = {"type": "string", "enum": ["billing", "bug", "other"]}
TICKET = {
    "topic": TOPIC,
    "urgent": {"type": "boolean"},
    "priority": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
}
WITHIN = Tolerance(tolerance=0.05, label_mass=True)
PROBABILITIES = {"promise": WITHIN, "features": WITHIN.feature_names}
OUTPUTS: dict[str, dict[str, Any]] = {
    "label": {"output": Labels(labels=labels_of({"yes": YES, "no": NO}))},
    "probabilities": {"output": Labels(labels=labels_of({"yes": YES, "no": NO})), **PROBABILITIES},
    "decisions": {"output": LabelPool(labels=labels_of(PLACES)), **PROBABILITIES},
    "topic": {"output": choices_of("billing", "bug", "other")},
    "score": {"output": choices_of(*"12345")},
    "ticket": {"output": object_of(TICKET, additionalProperties=False)},
    "open ticket": {"output": object_of(TICKET)},
    "response": {"output": object_of({"content": TOPIC})},
}


@pytest.fixture(scope="module")
def server(tiny_model) -> Admission:
    """A policy for each thing that is asked here; the classifier's is another server's."""
    plain = dict(tiny_config(tiny_model, vocab_size=32_000))
    configs = {
        name: ArtifactConfig.model_validate({**plain, **output}) for name, output in OUTPUTS.items()
    }
    text = {"probe": "logit-lens", "candidates": "shortlist", "labels": (), "max_tokens": 64}
    classes = {"score_head": "softmax", "labels": labels_of({"billing": 0, "bug": 1, "other": 2})}
    for name, changes in {"text": text, "classes": classes}.items():
        configs[name] = tiny_config(tiny_model, **changes)
    return Admission(Settings(artifact="anywhere"), configs)


def params_of(path: str, body: dict[str, Any], **how: Any) -> list[Any]:
    """What vLLM's server makes of a request, one for each prompt of it."""
    if path == "/classify":
        return [ClassificationCompletionRequest.model_validate(body).to_pooling_params()]
    if path == "/v1/systemone":
        asked = StructuredDecisionRequest.model_validate(body).questions
        return [params_of_question(*one) for one in asked.items()]
    if path == "/generative_scoring":  # as in `ServingGenerativeScoring`
        ids = GenerativeScoringRequest.model_validate(body).label_token_ids
        return [SamplingParams(max_tokens=1, logprobs=len(ids), logprob_token_ids=ids)]
    return [with_grammar(sampling_params(path, body, **how))]


def params_of_question(name: str, asked: Any) -> SamplingParams:
    _, labels = decision_question(name, asked.model_dump())
    strategy: Any = None
    return NextTokenStrategy._sampling_params(strategy, [PLACES[one] for one in labels], [])


def sampling_params(
    path: str, body: dict[str, Any], tool_parser: str = "hermes", defaults: Any = None
) -> SamplingParams:
    """`defaults` are those of the model's own ``generation_config.json``."""
    defaults = defaults or {}
    if path == "/v1/completions":
        completion = CompletionRequest.model_validate(body)
        return completion.to_sampling_params(completion.max_tokens or CONTEXT, defaults)
    if path == "/v1/responses":
        return ResponsesRequest.model_validate(body).to_sampling_params(CONTEXT, defaults)
    chat = ChatCompletionRequest.model_validate(body)
    if chat.tools:

        class Parser(DelegatingParser):
            tool_parser_cls = ToolParserManager.get_tool_parser(tool_parser)

        Parser(word_tokenizer(), chat.tools).adjust_request(chat)
    most = chat.max_completion_tokens or chat.max_tokens or CONTEXT
    return chat.to_sampling_params(most, defaults)


def with_grammar(params: SamplingParams) -> SamplingParams:
    """As vLLM's frontend leaves it, which makes a grammar of choices and checks the others."""
    params._eos_token_id = 2
    if params.structured_outputs is not None:
        validate_xgrammar_grammar(params)
    return params


def deciding(server: Admission, name: str, changes: Any = None, **how: Any) -> set[str]:
    """The policies under which the prompts of a request may exit, with `changes` to its body."""
    path, body = RECORDED[name]["path"], {**RECORDED[name]["body"], **(changes or {})}
    sent = {key: value for key, value in body.items() if value is not None}
    found = set()
    for params in params_of(path, json.loads(json.dumps(sent)), **how):
        if not isinstance(params, PoolingParams):
            check_request(params, server)
        request = admitted(server, params)
        assert request.may_exit == (request.threshold_row != FULL_DEPTH)
        found.add(request.policy if request.may_exit else "")
    return found


def of_those_with(key: str) -> Any:
    return pytest.mark.parametrize("name", [name for name in RECORDED if key in RECORDED[name]])


@of_those_with("exits")
def test_a_body_exits_under_the_policy_that_its_file_names(server, name):
    recorded = RECORDED[name]
    assert recorded["exits"] == bool(recorded["policy"])
    if recorded["why"].startswith("refused"):
        with pytest.raises(VLLMValidationError, match="tool_choice"):
            deciding(server, name)
        return
    assert deciding(server, name) == {recorded["policy"] or ""}


@of_those_with("instead")
def test_a_body_exits_with_the_fields_that_its_file_says_instead(server, name):
    assert "" not in deciding(server, name, RECORDED[name]["instead"])


@of_those_with("policy_of_plain_function")
def test_functions_exit_where_vllm_asks_for_their_arguments_alone(server, name):
    found = deciding(server, name, tool_parser="phi4_mini_json")
    assert found == {RECORDED[name]["policy_of_plain_function"]}


@pytest.mark.parametrize(
    ("name", "policy"), [("langchain-choice", "topic"), ("llamaindex-choice", "")]
)
def test_a_servers_own_temperature_is_for_requests_without_one(server, name, policy):
    assert deciding(server, name, defaults={"temperature": 0.0}) == {policy}


def test_a_models_own_repetition_penalty_keeps_all_its_requests_at_full_depth(server):
    names = [name for name in RECORDED if name.startswith("openai")]
    found = [deciding(server, name, defaults={"repetition_penalty": 1.05}) for name in names]
    assert found == [{""}] * len(names)


def test_the_page_has_a_row_for_each_file_and_says_whether_it_exits():
    lines = (DOCS / "clients.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and ".json)" in line]
    said = {row[0].rpartition("/")[2].removesuffix(".json)"): row[3] for row in rows}
    assert said == {name: "yes" if one["exits"] else "no" for name, one in RECORDED.items()}
