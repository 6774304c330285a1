"""Heads for the last token: the part of a pooled policy for prompts that it cannot see whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_adainfer.offline.calibration.certify.certify import combine_questions
from vllm_adainfer.offline.calibration.certify.parts import certify_pairs, pairs_of_thresholds
from vllm_adainfer.offline.calibration.certify.path import threshold_grid
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.exits import FittedExit
from vllm_adainfer.offline.calibration.fitted_policy import FittedPolicy, make_policy
from vllm_adainfer.offline.progress import say


def of_last_token(policy: FittedPolicy) -> Calibration:
    """The data of a pooled policy for heads that read the last token alone."""
    calibration = policy.calibration
    target = replace(calibration.target, kind="label-head")
    students = tuple(one for one in calibration.trained if one.layer == 0)
    return replace(calibration, target=target, trained=students)


def with_last_token(
    policy: FittedPolicy, last: Calibration, candidates: Sequence[FittedExit]
) -> FittedPolicy:
    """A pooled policy with the part for the last token, from `candidates` fitted on `last`.

    Both parts are certified anew, by one bound that holds whichever decides a request, see
    `certify.parts`.
    """
    # No cuts of their own: such requests are few.
    layers = {exit.layer for exit in policy.exits}
    own = make_policy(last, [exit for exit in candidates if exit.layer in layers])
    if not policy.exits:
        return policy
    policy, own = _certified_together(policy, own)
    if any(point.layers_saved > 0 for point in own.points.values()):
        return replace(policy, last_token=own)
    say(
        "heads for the last token alone cannot be certified within the bound of those for whole "
        "prompts: requests with tokens of their own in the prefix cache run all layers"
    )
    return policy


def _certified_together(
    policy: FittedPolicy, own: FittedPolicy
) -> tuple[FittedPolicy, FittedPolicy]:
    """Both parts at the loosest pairs of thresholds that one bound certifies.

    Without heads for the last token, the other part is full depth.
    """
    depth, terms = policy.calibration.rows.model.depth, policy.terms
    bound, epsilons = terms.bound, terms.epsilons
    if own.exits:
        whole, last = policy.exits, own.exits
        thresholds = pairs_of_thresholds(whole, last, depth, terms.fitted_queries)
    else:
        whole, last = policy.exits, policy.exits
        thresholds = [(threshold, float("inf")) for threshold in threshold_grid(whole)]
    if not policy.calibration.options.by_question:
        tests, queries = terms.tests, terms.queries
        points, own_points = certify_pairs(
            whole, last, depth, thresholds, epsilons, bound, tests=tests, queries=queries
        )
        return replace(policy, points=points), replace(own, points=own_points)
    by_question = terms.certifiable_questions()
    parts = {
        name: certify_pairs(whole, last, depth, thresholds, epsilons, bound, rows)
        for name, rows in by_question.items()
    }

    def combined(part: FittedPolicy, exits: Sequence[FittedExit], place: int) -> FittedPolicy:
        questions = {name: both[place] for name, both in parts.items() if both[place]}
        points = combine_questions(by_question, questions, exits, depth)
        return replace(part, questions=questions, points=points)

    return combined(policy, whole, 0), combined(own, last, 1)
