"""What a request wants returned: a token, a choice, or probabilities, and over which tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.fields import MOST_ANSWERS
from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.drafts.schemas import LONGEST_SCHEMA, digest_of, is_longer, paths_of
from vllm_adainfer.engine.compat.structured_outputs import choices_of

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams


def requested_output(
    params: SamplingParams, logprobs_mode: str, any_temperature: bool = False
) -> Output | None:
    """What a request wants returned; None if no policy can promise it. Called once, on arrival.

    `any_temperature`: whether sampled tokens may come from early scores, too. Probabilities in the
    whole vocabulary are the same at any temperature; ``/generative_scoring`` leaves it at 1.
    """
    if changes_scores(params):
        return None
    output = _restricted_output(params, logprobs_mode)
    if output is None or params.temperature == 0:
        return output
    if any_temperature or output.form is Form.IN_VOCABULARY:
        return replace(output, is_greedy=False)
    return None


def requested_scores(params: PoolingParams) -> Output | None:
    """What a request to a classifier wants returned; None if no policy can promise it.

    Raw scores are not promised, only the probabilities made of them.
    """
    if params.task != "classify" or params.use_activation is False:
        return None
    return Output(Form.SCORES, None)


def _restricted_output(params: SamplingParams, logprobs_mode: str) -> Output | None:
    """What is returned, by a request's restrictions and log-probabilities alone.

    No policy has more than `MOST_ANSWERS` labels, so longer lists are not examined.

    vLLM's log-probabilities are over the whole vocabulary, except under ``--logprobs-mode
    processed_logprobs`` with ``allowed_token_ids`` (``vllm/v1/sample/sampler.py``): there the best
    tokens are labels. Otherwise other tokens may be among the best, and an early answer has no
    scores for those. A grammar masks the others in either mode, and all of them cannot be asked
    for, so requests for an object may read its log-probabilities.
    """
    normalised = logprobs_mode in ("raw_logprobs", "processed_logprobs")
    if params.structured_outputs is not None:
        if params.logprobs is not None:
            reads = normalised and params.logprobs >= 0 and _only_grammar_ends(params)
            schema = requested_schema(params) if reads else None
            return None if schema is None else Output(Form.OBJECT_PROBABILITIES, schema=schema)
        if not can_end_with_grammar(params):
            return None
        if choices := requested_choices(params):
            return Output(Form.CHOICE, None, choices)
        schema = requested_schema(params)
        return None if schema is None else Output(Form.OBJECT, schema=schema)
    allowed, ids = params.allowed_token_ids, params.logprob_token_ids
    if max(len(allowed or ()), len(ids or ())) > MOST_ANSWERS:
        return None
    labels = None if allowed is None else frozenset(allowed)
    if params.logprobs is None and ids is None:
        return Output(Form.TOKEN, labels)
    processed = logprobs_mode == "processed_logprobs"
    if processed and params.temperature != 0:
        return None  # the temperature changes these probabilities
    if processed and labels is not None and (ids is None or labels == frozenset(ids)):
        return Output(Form.AMONG_LABELS, labels)
    if normalised and ids is not None and labels in (None, frozenset(ids)):
        return Output(Form.IN_VOCABULARY, frozenset(ids))
    return None


def requested_choices(params: SamplingParams) -> frozenset[str] | None:
    """The distinct texts that a request chooses from.

    None if it has no such restriction, or one beyond the limits of `choices_of`.
    """
    structured = params.structured_outputs
    if structured is None:
        return None
    choices = choices_of(structured.choice, structured.grammar)
    return None if choices is None else frozenset(choices)


def requested_schema(params: SamplingParams) -> str | None:
    """The digest of the JSON schema that a request asks for; None if it has none, or a large one.

    A function that must be called has one, too, that of its arguments, but only where vLLM asks for
    these alone: with a parser for tools that has no structural tag, or with
    ``VLLM_ENFORCE_STRICT_TOOL_CALLING=0``. Else vLLM 0.32 asks for them within the parser's tags
    (`get_model_structural_tag`), in one of several ways to write these; and if the function is not
    ``strict``, for any JSON.
    """
    text = _schema_text(params)
    return None if text is None else digest_of(text)


def requested_fields(params: SamplingParams) -> tuple[str, ...]:
    """The fields with few values of the object that a request with a `requested_schema` asks for.

    For people: long names are cut.
    """
    text = _schema_text(params)
    return () if text is None else paths_of(text)


def _schema_text(params: SamplingParams) -> str | None:
    structured = params.structured_outputs
    if structured is None or not structured.json or is_longer(structured.json, LONGEST_SCHEMA):
        return None  # before it is written, hashed and kept
    schema = structured.json
    return schema if isinstance(schema, str) else json.dumps(schema)


def can_end_with_grammar(params: SamplingParams) -> bool:
    """Whether only the grammar decides what follows, and no log-probabilities are returned."""
    return params.logprobs is None and _only_grammar_ends(params)


def _only_grammar_ends(params: SamplingParams) -> bool:
    return (
        params.eos_token_id is not None
        and params.logprob_token_ids is None
        and params.allowed_token_ids is None
        and params.repetition_detection is None
        and not params.stop
        and not _edits_logits(params)
    )


def only_grammar_decides(params: SamplingParams) -> bool:
    """Whether each token depends on the logits at its place, the grammar and the sampling alone.

    So that several tokens can be sampled at once. Log-probabilities may be returned.
    """
    return (
        not changes_scores(params)
        and not (params.presence_penalty or params.frequency_penalty)
        and not params.min_p
        and params.allowed_token_ids is None
        and params.logprob_token_ids is None
        and params.logprobs != -1
    )


def changes_scores(params: SamplingParams) -> bool:
    """Whether a request changes the model's scores, or reads those of its prompt.

    No policy promises anything about such a request. Presence and frequency penalties change
    nothing for the first token.
    """
    penalties = params.presence_penalty or params.frequency_penalty
    return (
        _edits_logits(params)
        or wants_prompt_logprobs(params)
        or params.thinking_token_budget is not None
        or params.trace_decode_token_ids is not None
        or params.repetition_penalty != 1
        or (params.max_tokens != 1 and bool(penalties))
    )


def wants_prompt_logprobs(params: SamplingParams) -> bool:
    """Whether a request reads log-probabilities of its prompt's tokens, in either of two ways."""
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None


def _edits_logits(params: SamplingParams) -> bool:
    return bool(params.min_tokens or params.logit_bias or params.bad_words)
