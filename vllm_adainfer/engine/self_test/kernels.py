"""Check the probes' kernels against torch, at the shapes that will be served."""

from __future__ import annotations

import adainfer_kernels
import torch
from adainfer_kernels import rows_to_compile_for
from torch import Tensor

from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.policy.probe import Probe

CLOSE = 0.02  # relative: sums of products in bf16, in another order
TIES = 0.02  # the share of rows whose score may tie with the threshold


@torch.inference_mode()
def wrong_kernels(policies: PolicySet, states: Tensor) -> str | None:
    """How a kernel's result differs from torch's, for the probes of `policies`; None if all agree.

    `states` [max requests, hidden size] have the dtype that will be served, and are overwritten.
    """
    states.copy_(torch.randn(states.shape, generator=torch.Generator().manual_seed(0)))
    probes = [probe for policy in policies.policies for probe in policy.probes if probe.fused]
    for probe in dict.fromkeys(probes):
        for rows in rows_to_compile_for(len(states)):
            if found := _wrong_probe(probe, states[:rows]):
                return f"{found} of {rows} rows differ, by a head of {probe.head.size} rows"
    if policies.reads(ProbeInput.PROMPT) and (found := _wrong_pool(states)):
        return found
    return None


def _wrong_probe(probe: Probe, states: Tensor) -> str | None:
    dtype, norm, lens = probe.head.weight.dtype, probe.norm, probe.lens
    if probe.projection is None and probe.head.hidden_size == 2 * states.shape[1]:
        states = torch.cat([states, states], 1).float()  # a head for whole prompts
    read, expected = (
        adainfer_kernels.readout(states, norm, lens, dtype=dtype, backend=backend)
        for backend in ("auto", "torch")
    )
    if not _close(read, expected):
        return "the norm"
    if probe.projection is not None:
        expected = expected @ probe.projection
    classifier = torch.ones(3, dtype=torch.float32, device=states.device)
    full = adainfer_kernels.probe(
        expected, probe.head, candidates=probe.token_ids, return_scores=True, backend="torch"
    )
    # Half of the rows are to be settled.
    odds = adainfer_kernels.linear_score(full.features, classifier)
    threshold = odds.median().expand(len(states)).contiguous()
    score = adainfer_kernels.probe(
        expected,
        probe.head,
        candidates=probe.token_ids,
        classifier=classifier,
        threshold=threshold,
        return_scores=True,
    )
    settled, scores = adainfer_kernels.settle(expected, probe.head, classifier, threshold)
    assert full.scores is not None
    assert score.scores is not None
    assert score.settled is not None
    scale = full.scores.abs().max()
    for name, found, right in (
        ("the scores", score.scores, full.scores),
        ("the scores", scores, full.scores),
        ("the best score", score.top1, full.top1),
        ("the second score", score.top2, full.top2),
        ("the log-sum-exp", score.lse, full.lse),
    ):
        if not _close(found / scale, right / scale):
            return name
    best = full.scores.gather(1, _columns(probe, score.top1_id).unsqueeze(1)).squeeze(1)
    if not _close(best / scale, full.top1 / scale):
        return "the best token"
    near = (odds - threshold).abs() < 2 * CLOSE
    for decided in (score.settled, settled):
        if ((decided != (odds >= threshold)) & ~near).float().mean() > TIES:
            return "which are settled"
    return None


def _columns(probe: Probe, token_ids: Tensor) -> Tensor:
    """The rows of the head that score `token_ids`; the first for a token it does not score."""
    if probe.token_ids is None:
        return token_ids.clamp(min=0)
    return (token_ids.unsqueeze(1) == probe.token_ids).int().argmax(dim=1)


def _wrong_pool(states: Tensor) -> str | None:
    rows = len(states)
    starts = torch.arange(0, rows, 3, device=states.device)
    ends = (starts + 3).clamp(max=rows)
    for residual in None, states.flip(0).contiguous():
        for carried in None, torch.ones(len(starts), states.shape[1], device=states.device):
            found, right = (
                adainfer_kernels.pool(
                    states,
                    residual,
                    starts,
                    ends,
                    None if carried is None else carried.float(),
                    backend=backend,
                )
                for backend in ("auto", "torch")
            )
            if not (_close(found.last, right.last) and _close(found.sums, right.sums)):
                return "the sums of prompts differ"
    return None


def _close(found: Tensor, right: Tensor) -> bool:
    """Whether all numbers are the same up to rounding; infinities are equal to themselves."""
    found, right = found.float(), right.float()
    return bool(torch.isclose(found, right, rtol=CLOSE, atol=CLOSE).all())
