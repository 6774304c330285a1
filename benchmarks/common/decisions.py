"""Eight questions about the texts of five tasks, as requests that read label probabilities.

They are lines of a vLLM batch file, as its decision endpoint (``/v1/systemone``) renders them: what
is asked about, an empty line, the question, its options, and how to reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_TEXT = 500  # characters of a row that are shown
LETTERS = "ABCDEF"
KINDS = ("abbreviation", "description", "entity", "human", "location", "number")
SECTIONS = ("business", "sports", "technology", "world")
YES_OR_NO = ("no", "yes")


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        name: what its requests are called.
        text: the question.
        options: the options, each with a letter; empty if it is answered with yes or no.
        right: the right reply for a label of the data.

    """

    name: str
    text: str
    options: Sequence[str]
    right: Callable[[str], str]

    @property
    def replies(self) -> Sequence[str]:
        """The possible replies."""
        return LETTERS[: len(self.options)] if self.options else YES_OR_NO

    def prompt(self, text: str) -> str:
        """The question about a text, whole."""
        if self.options:
            lettered = zip(LETTERS, self.options, strict=False)
            shown = [f"{letter}: {option}" for letter, option in lettered]
            shown.append("Answer with the letter of one option only.")
        else:
            shown = ["yes", "no", "Answer with yes or no only."]
        return "\n".join([text, "", f"Question: {self.text}", *shown])


def choice(name: str, text: str, options: Sequence[str]) -> Question:
    """A question whose options are the labels of the data."""
    return Question(name, text, options, lambda label: LETTERS[options.index(label)])


def yes_if(name: str, text: str, positive: str) -> Question:
    """A question that is answered with yes for one label of the data."""
    return Question(name, text, (), lambda label: YES_OR_NO[label == positive])


QUESTIONS: Mapping[str, Sequence[Question]] = {
    "sst2": (
        choice("sentiment", "What is the sentiment of this review?", ("negative", "positive")),
        yes_if("positive", "Is this review positive?", "positive"),
    ),
    "cr": (
        choice("opinion", "What does the customer think of it?", ("negative", "positive")),
        yes_if("satisfied", "Is the customer satisfied?", "positive"),
    ),
    "subj": (
        choice("side", "Is the sentence an opinion or a fact?", ("objective", "subjective")),
        yes_if("opinion", "Does the sentence express an opinion?", "subjective"),
    ),
    "trec": (choice("kind", "What kind of answer does this question ask for?", KINDS),),
    "ag_news": (choice("section", "Which section does this article belong to?", SECTIONS),),
}


def line_of(
    task: str, number: int, question: Question, row: Mapping[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """The request for a row of a task, with the right reply's token, which vLLM ignores."""
    ids = [tokenizer.encode(reply, add_special_tokens=False)[0] for reply in question.replies]
    right = question.replies.index(question.right(row["label"]))
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": question.prompt(row["text"][:LONGEST_TEXT])}],
        "max_completion_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "logprob_token_ids": ids,
    }
    return {
        "custom_id": f"{task}/{question.name}/{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
        "label": ids[right],
    }
