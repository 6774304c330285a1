"""Statistics that the scheduler sends to the frontends."""

from __future__ import annotations

from typing import Any

REPORT_KEY = "adainfer"


def use_stat_loggers(mixin: type) -> None:
    """Add our metrics and log lines to engines with our switch.

    vLLM 0.32 takes stat loggers from entry points, but then turns statistics on for every engine of
    every process, even where they are off and our switch is not set. So `mixin` becomes the first
    base of the class that builds loggers, in the two modules that look it up, once, when an engine
    is configured.
    """
    from vllm.v1.engine import async_llm, llm_engine
    from vllm.v1.metrics.loggers import StatLoggerManager

    ours = type("AdaInferStatLoggerManager", (mixin, StatLoggerManager), {})
    for module in (async_llm, llm_engine):
        if module.StatLoggerManager is StatLoggerManager:
            module.StatLoggerManager = ours


def attach_report(scheduler_stats: Any, report: dict[str, Any]) -> None:
    """Send `report` from the scheduler to the frontends, in `SchedulerStats`.

    vLLM 0.32 has no field for plugins there. The field for KV connectors takes any plain values,
    and is unused without a connector: with a policy we refuse connectors, and without one we send
    nothing where there is one.
    """
    scheduler_stats.kv_connector_stats = {REPORT_KEY: report}


def take_report(scheduler_stats: Any) -> dict[str, Any] | None:
    """The report that `attach_report` sent; clears the field for vLLM's own loggers."""
    sent = None if scheduler_stats is None else scheduler_stats.kv_connector_stats
    if not sent or REPORT_KEY not in sent:
        return None
    scheduler_stats.kv_connector_stats = None
    report: dict[str, Any] = sent[REPORT_KEY]
    return report
