"""Statistics on their way from the scheduler to the frontends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

REPORT_KEY = "adainfer"


def use_stat_loggers(mixin: type) -> None:
    """Have engines with our switch in their config write our metrics and log lines, too.

    0.32 takes stat loggers from entry points, but then turns statistics on for every engine of
    every process, even where they are off and our switch is not set. So the class that builds
    loggers, which these two modules look up, gets `mixin` as its first base, once, when an engine
    is configured.
    """
    from vllm.v1.engine import async_llm, llm_engine
    from vllm.v1.metrics.loggers import StatLoggerManager

    ours = type("AdaInferStatLoggerManager", (mixin, StatLoggerManager), {})
    for module in (async_llm, llm_engine):
        if module.StatLoggerManager is StatLoggerManager:
            module.StatLoggerManager = ours


def attach_report(scheduler_stats: Any, report: dict[str, Any]) -> None:
    """Send `report` from the scheduler to the frontends, in `SchedulerStats`, beside others.

    0.32 has no field for plugins there. The one for KV connectors may hold any plain values, and is
    unused where there are none: with a policy they are refused, without one nothing is sent.
    """
    others = (scheduler_stats.kv_connector_stats or {}).get(REPORT_KEY, {})
    scheduler_stats.kv_connector_stats = {REPORT_KEY: {**others, **report}}


def take_report(scheduler_stats: Any) -> dict[str, Any] | None:
    """What `attach_report` sent; empties the field for vLLM's own loggers."""
    sent = None if scheduler_stats is None else scheduler_stats.kv_connector_stats
    if not sent or REPORT_KEY not in sent:
        return None
    scheduler_stats.kv_connector_stats = None
    report: dict[str, Any] = sent[REPORT_KEY]
    return report
