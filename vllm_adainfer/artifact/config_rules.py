"""The rules that the fields of an artifact's config must satisfy together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod

from vllm_adainfer.artifact.config_fields import ConfigFields
from vllm_adainfer.artifact.fields import MOST_ANSWERS, MOST_CHOICE_CHARACTERS, MOST_OBJECTS
from vllm_adainfer.artifact.outputs import Choices
from vllm_adainfer.promise.promise import Unit


def are_exit_points(points: Sequence[int], layers: int) -> bool:
    """Whether `points` is not empty, ascends, and lies inside a model with this many layers.

    Exit point 0 comes before the first layer.
    """
    inside = all(0 <= point < layers for point in points)
    return bool(points) and inside and sorted(set(points)) == list(points)


def broken_rules(config: ConfigFields) -> list[str]:
    """The rules that the fields of `config` break together, in words."""
    labels, choices, promise = config.labels, bool(config.choices), config.promise
    head, pooled = config.has_label_heads, config.is_pooled
    special = promise.reads_probabilities or config.label_pool or choices
    tokens: Sequence[int] = config.label_ids
    if isinstance(config.output, Choices):
        tokens = [token for _, own in config.output.columns for token in own]
    sizes: Sequence[int] = ()  # of the fields of objects
    if config.objects is not None:
        sizes = config.objects.link.sizes
        written = (one.written for field in config.objects.fields for one in field.values)
        tokens = sorted({*config.objects.start, *chain(*written)})
    epsilons = {level.epsilon for level in config.levels}
    certified = [question.certified for question in config.questions]
    names = {label.name for label in labels}
    promised = [(one.kind, one.label) for one in config.label_bounds]
    last = config.last_token
    levels = [*config.levels, *(last.levels if last else ())]
    rules = {
        f"exit_points must ascend between 0 and {config.layers - 1}": are_exit_points(
            config.exit_points, config.layers
        ),
        "exit point 0 needs a student or a pooled-label-head: the last token alone says too "
        "little there": 0 not in config.exit_points or pooled or config.student is not None,
        "a student decides at exit point 0, so there must be one": (
            config.student is None or 0 in config.exit_points
        ),
        "a crf needs every exit point to be asked, and a student is not about every prompt": (
            config.student is None or config.classifier != "crf"
        ),
        "a student needs the label-heads' scores and max_tokens = 1": (
            config.student is None or (head and config.max_tokens == 1)
        ),
        "a student does not read the tokens that all prompts share, and answers no prompt without "
        "them, so the artifact must have them: calibrate again": (
            config.student is None
            or (config.student.shared_start, config.student.shared_end)
            == (len(config.shared.start), len(config.shared.end))
        ),
        "there is nothing to decide among fewer than two labels": len(labels) != 1,
        "pooled_from goes with a pooled-label-head, and that needs it": pooled
        == (config.pooled_from is not None),
        "a pooled-label-head needs max_tokens = 1: it reads prompts": (
            config.max_tokens == 1 or not pooled
        ),
        "branches must ascend and be among the exit points after the first layer": (
            sorted(set(config.branches)) == list(config.branches)
            and set(config.branches) <= set(config.exit_points) - {0}
        ),
        "branches go with a pooled-label-head": pooled or not config.branches,
        "last_token goes with a pooled-label-head": pooled or config.last_token is None,
        "parts with one bound must have the same epsilons": (
            last is None or not last.one_bound or {one.epsilon for one in last.levels} == epsilons
        ),
        "a label-head needs labels": bool(labels) or not head,
        "token ids must be below vocab_size": max(tokens, default=0) < config.vocab_size,
        "each label needs a token id of its own": len(set(tokens)) == len(tokens),
        f"features must be {promise.feature_names} with this promise": (
            config.features == promise.feature_names
        ),
        "first documents need the score_head of a reranker, a sigmoid": (
            promise.unit is not Unit.QUERY or config.score_head == "sigmoid"
        ),
        "first documents rule out label_bounds: they count queries, and those documents": (
            promise.unit is not Unit.QUERY or not config.label_bounds
        ),
        "a promise must name labels of the policy": names.issuperset(promise.named),
        "promises about probabilities, a label pool and choices need a label-head": (
            head or not special
        ),
        "promises about probabilities, a label pool and choices need max_tokens = 1": (
            config.max_tokens == 1 or not special
        ),
        "a score_head needs a label-head, and rules out adapters": (
            config.score_head is None or (head and config.adapter is None)
        ),
        "where any number of labels may hold, none is the answer: sigmoids need a tolerance or "
        "gates on labels, and rule out label_bounds, never_early and trained probes": (
            config.score_head != "sigmoids"
            or (
                promise.about_each
                and not (config.label_bounds or config.never_early)
                and config.student is None
                and not config.branches
            )
        ),
        "a sigmoid has two labels": len(labels) == 2 or config.score_head != "sigmoid",
        "a score_head rules out label_mass: there is no rest of a vocabulary": (
            config.score_head is None or not promise.covers_mass
        ),
        "objects need a label-head, max_tokens = 1 and a promise about changed answers or each "
        "value's probability, and rule out label_mass, branches and by_question": (
            config.objects is None
            or (
                head
                and config.max_tokens == 1
                and (promise.kind == "changed" or promise.about_each)
                and not promise.covers_mass
                and not config.branches
                and not config.by_question
            )
        ),
        "the guess of each field must be one of its values": config.objects is None
        or all(field.guess < len(field.values) for field in config.objects.fields),
        "one field of an object must have two values: there is nothing to decide otherwise": (
            config.objects is None or max(sizes) > 1
        ),
        f"objects have at most {MOST_ANSWERS} values, and there are at most {MOST_OBJECTS}": (
            sum(sizes) <= MOST_ANSWERS and prod(sizes) <= MOST_OBJECTS
        ),
        "each value of an object needs a path and a text of its own": (
            config.objects is None or len(names) == len(labels)
        ),
        "choices rule out promises about probabilities": (
            not choices or not promise.reads_probabilities
        ),
        f"choices have at most {MOST_CHOICE_CHARACTERS} characters in all": (
            sum(len(choice.text) for choice in config.choices) <= MOST_CHOICE_CHARACTERS
        ),
        "label_bounds and never_early must name labels of the policy": (
            names.issuperset(label for _, label in promised)
            and names.issuperset(config.never_early)
        ),
        "label_bounds must each be about another label or of another kind": (
            len(set(promised)) == len(promised)
        ),
        "label_bounds rule out by_question": not (promised and config.by_question),
        "label_bounds and never_early need max_tokens = 1": (
            config.max_tokens == 1 or not (promised or config.never_early)
        ),
        "some label must be allowed to leave early": not names
        or bool(names.difference(config.never_early)),
        "each level must have a risk for each of label_bounds": all(
            len(level.label_risks) == len(promised) for level in levels
        ),
        "by_question needs questions": bool(certified) or not config.by_question,
        "questions must have epsilons if and only if by_question is set": all(
            bool(own) == config.by_question for own in certified
        ),
        "epsilons of questions must be among those of the levels": all(
            epsilons.issuperset(own) for own in certified
        ),
    }
    return [rule for rule, holds in rules.items() if not holds]
