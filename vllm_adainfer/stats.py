"""The counters of an engine since it started, for code that holds an ``LLM``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict

from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm import LLM


class ShadowChecks(TypedDict):
    """The comparisons of shadow requests at one epsilon.

    Attributes:
        checked: number of early answers compared with full depth.
        disagreed: number of those that differed, or whose probabilities moved too far.
        rate: `disagreed` / `checked`; 0 before the first check.
        low: lower end of the confidence interval of the rate.
        high: upper end of that interval; it is [0, 1] before the first check.
        latest_checked: those of the answers that were compared last: the latest 100, or those of
            the latest 100 groups where answers are counted by group (or text, or query).
        latest_disagreed: number of these that differed.
        tightened: whether answers were found to differ more often than epsilon allows, so that
            requests at this epsilon now run at full depth.
        labels: the same for each promise about one label, such as "recall of unsafe"; only where
            there are some.

    """

    checked: int
    disagreed: int
    rate: float
    low: float
    high: float
    latest_checked: int
    latest_disagreed: int
    tightened: bool
    labels: NotRequired[dict[str, ShadowChecks]]


class PolicyWork(TypedDict):
    """The work done for the requests of one policy.

    A token-layer is one token (of a prompt or of an output) in one layer.

    Attributes:
        layers_run: token-layers executed.
        layers_skipped: token-layers that will never be executed.
        layers_deferred: token-layers postponed until their request needs them, counted each time;
            in the end each of them is run or skipped.
        layers_possible: token-layers that full depth would have executed.
        exit_histogram: number of sampled tokens by the number of layers they ran.
        not_covered: requests for the policy's output that it did not serve because of their
            prompts, by the reason (``other_prompt`` or ``unknown_question``).
        shadow: shadow checks by epsilon; only where shadow requests are on.

    """

    layers_run: int
    layers_skipped: int
    layers_deferred: int
    layers_possible: int
    exit_histogram: dict[int, int]
    not_covered: dict[str, int]
    shadow: NotRequired[dict[float, ShadowChecks]]


class Stats(TypedDict):
    """The counters of one engine since it started; none of them ever falls.

    Attributes:
        tokens_decided: number of tokens sampled, at any depth.
        layers_run: token-layers executed, see `PolicyWork`.
        layers_possible: token-layers that full depth would have executed.
        passes_run: layers entered, each with any number of tokens: a layer's weights are read once
            per pass.
        passes_possible: layers that full depth would have entered.
        weights_differ: whether all requests run at full depth because the engine now serves other
            weights than the policies were calibrated for.
        failed_parts: the parts that the self-test on this device has disabled: ``kernels``
            (probes run in torch), ``segment_graphs``, ``vllm_graphs``, ``compiled_code``,
            ``exits`` (all requests run all layers).
        not_tested: why the self-test could not test the layers on this device, so that it is not
            known whether they are right; empty otherwise.
        exit_histogram: number of sampled tokens by the number of layers they ran.
        policies: the same work by policy name; ``full_depth`` stands for requests that may not
            exit, and ``NAME:last-token`` for those of policy NAME that were decided by their last
            token, as part of their prompt was in the prefix cache.
        shadow: shadow checks by epsilon; with several artifacts, by policy name and then by
            epsilon. Only where shadow requests are on.

    """

    tokens_decided: int
    layers_run: int
    layers_possible: int
    passes_run: int
    passes_possible: int
    weights_differ: bool
    failed_parts: list[str]
    not_tested: str
    exit_histogram: dict[int, int]
    policies: dict[str, PolicyWork]
    shadow: NotRequired[dict[float, ShadowChecks] | dict[str, dict[float, ShadowChecks]]]


def stats(llm: LLM) -> Stats:
    """The counters of a running engine; an AdaInferError if it runs without vllm-adainfer."""
    counters: Stats
    try:
        counters, *_ = llm.collective_rpc("adainfer_stats")  # every rank counts the same
    except Exception as error:
        if "adainfer_stats" not in str(error):
            raise
        raise AdaInferError(
            "this engine runs without vllm-adainfer: pass "
            'additional_config={"adainfer": {"artifact": "DIR"}} to it'
        ) from error
    return counters
