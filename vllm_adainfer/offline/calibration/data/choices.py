"""Choices: the texts of ``structured_outputs.choice``, and the tokens that each may begin with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_adainfer.artifact.fields import Choice
from vllm_adainfer.artifact.outputs import Choices
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example


def find_choices(texts: Sequence[str], tokenizer: Any, vocabulary: int) -> Choices:
    """The tokens of each of `texts`, written as in requests, of a model's `vocabulary`.

    An AdaInferError if there are fewer than two, one is empty, or no first token decides one.
    """
    if len(set(texts)) != len(texts) or len(texts) < 2 or not all(texts):
        raise AdaInferError(f"--choices needs at least two different texts, got {list(texts)}")
    leaves: dict[str, list[int]] = {text: [] for text in texts}
    undecided: list[int] = []
    left, pieces = _left_after(texts), token_bytes(tokenizer, vocabulary)
    for token, start in enumerate(pieces):
        if start in left:
            leaves.get(left[start], undecided).append(token)
    found = []
    for text in texts:
        token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        if tokenizer.decode(token_ids) != text:
            raise AdaInferError(
                f"the tokenizer does not give the choice {text!r} back as it is: write it without "
                "blanks at its ends, or with one before it"
            )
        # The answer is the text's first token as the tokenizer writes it, or else the longest one.
        first = sorted(leaves[text], key=lambda token: (token != token_ids[0], -len(pieces[token])))
        answer = next((token for token in first if _is_finished(text, token, tokenizer)), None)
        if answer is None:
            undecided += first
            first = []
        else:
            first.remove(answer)
            first.insert(0, answer)
        found.append(Choice(text=text, token_ids=token_ids, first_tokens=tuple(first)))
    if not any(choice.first_tokens for choice in found):
        raise AdaInferError(
            f"no first token of the choices {', '.join(map(repr, texts))} decides one: let them "
            "begin with different words, or with a blank"
        )
    return Choices(choices=tuple(found), undecided=tuple(sorted(undecided)))


def _is_finished(text: str, first: int, tokenizer: Any) -> bool:
    """Whether the scheduler, which works on texts, can append the rest of `text` to a first token.

    It cannot after part of a letter, nor where a tokenizer drops a blank before the token or puts
    one before the rest. See `vllm_adainfer.engine.scheduler.rest_of_answer`.
    """
    begun = tokenizer.decode([first])
    if not begun or not text.startswith(begun):
        return False
    if tokenizer.encode(text, add_special_tokens=False)[0] == first:
        return True
    rest = tokenizer.encode(text[len(begun) :], add_special_tokens=False)
    return bool(tokenizer.decode([first, *rest]) == text)


def _left_after(texts: Sequence[str]) -> dict[bytes, str]:
    """The choice that each possible start of a text, in bytes, leaves; "" if it leaves several."""
    left: dict[bytes, str] = {}
    for text in texts:
        written = text.encode()
        for length in range(1, len(written) + 1):
            start = written[:length]
            left[start] = "" if start in left else text
    return left


def token_bytes(tokenizer: Any, vocabulary: int) -> list[bytes]:
    """The bytes of each token, as xgrammar reads them for vLLM's structured outputs."""
    from xgrammar import TokenizerInfo

    info = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary)
    special = set(info.special_token_ids) | set(tokenizer.all_special_ids)
    return [
        b"" if token in special else written for token, written in enumerate(info.decoded_vocab)
    ]


def with_labels(examples: Sequence[Example], texts: Sequence[str]) -> list[Example]:
    """Name the right label of each example as its choice is written, with its blanks.

    An AdaInferError if one is none of the choices.
    """
    exact = {text.strip(): text for text in texts} | {text: text for text in texts}
    for example in examples:
        if example.label is not None and example.label not in exact:
            raise AdaInferError(
                f"{example.place}: the label {example.label!r} is not among {', '.join(exact)}"
            )
    return [
        example if example.label is None else replace(example, label=exact[example.label])
        for example in examples
    ]


def common_choices(
    examples: Sequence[Example], asked: Sequence[str]
) -> tuple[list[Example], tuple[str, ...]]:
    """The requests with the choices `asked` for, or those that all have; none if they name labels.

    An AdaInferError if no request has these choices, or requests differ and none are asked for.
    """
    sets = Counter(frozenset(example.choices or ()) for example in examples)
    wanted = frozenset(asked)
    if wanted:
        if wanted not in sets:
            raise AdaInferError(f"no request has the choices {', '.join(map(repr, asked))}")
        return [one for one in examples if frozenset(one.choices or ()) == wanted], tuple(asked)
    if len(sets) > 1:
        [(commonest, count)] = Counter({one: n for one, n in sets.items() if one}).most_common(1)
        raise AdaInferError(
            f"the requests name {len(sets)} different sets of choices or labels, and a policy is "
            f"for one of them: give --choices, such as {','.join(sorted(commonest))!r} ({count} "
            "requests), or take out those with structured_outputs.choice"
        )
    return list(examples), examples[0].choices or ()
