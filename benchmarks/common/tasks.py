"""The tasks that the demo model was fine-tuned on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A classification task, with the template of its prompts and the possible answers."""

    title: str
    template: str
    labels: tuple[str, ...]


REVIEW, OPINION = "Review: {text}\nSentiment:", ("negative", "positive")
KINDS = ("abbreviation", "description", "entity", "human", "location", "number")
TASKS = {
    "sst2": Task("SST-2", REVIEW, OPINION),
    "cr": Task("CR", REVIEW, OPINION),
    "subj": Task("Subj", "Text: {text}\nType:", ("objective", "subjective")),
    "trec": Task("TREC", "Question: {text}\nAnswer type:", KINDS),
}
