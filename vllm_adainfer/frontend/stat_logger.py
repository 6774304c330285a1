"""Feeds a server's metrics and log lines with the reports of its engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.stats import take_report
from vllm_adainfer.engine.pinned_artifacts import served_configs
from vllm_adainfer.frontend.log_line import KindLine, LogLine
from vllm_adainfer.frontend.metrics import ChoiceMetrics, EngineMetrics, KindMetrics, Series
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import StatLoggerManager as _Manager
else:
    _Manager = object

logger = get_logger(__name__)


class WithExitStats(_Manager):
    """Takes our reports out of the engines' statistics; precedes `StatLoggerManager` in the MRO."""

    def __init__(
        self, vllm_config: VllmConfig, engine_idxs: list[int] | None = None, *args: Any, **kw: Any
    ) -> None:
        """Register our series, unless the engine runs without our switch."""
        super().__init__(vllm_config, engine_idxs, *args, **kw)
        self._metrics: dict[int, EngineMetrics] = {}
        self._choices: ChoiceMetrics | None = None
        self._kinds: KindMetrics | None = None
        self._lines: dict[int, LogLine] = {}
        self._kind_lines: dict[int, KindLine] = {}
        settings = read_settings(vllm_config.additional_config)
        if settings is None:
            return
        model = vllm_config.model_config
        if settings.finishes_choices and vllm_config.kv_transfer_config is None:
            self._choices = ChoiceMetrics(model.served_model_name, self.engine_indexes)
        sees_all = kw.get("client_count", 1) == 1  # otherwise each frontend sees only some counts
        if settings.auto is not None and vllm_config.kv_transfer_config is None:
            self._kinds = KindMetrics(model.served_model_name, self.engine_indexes)
            self._kind_lines = {index: KindLine() for index in self.engine_indexes if sees_all}
        if settings.runs_stock:
            return
        depth = model.hf_text_config.num_hidden_layers
        configs = served_configs(vllm_config, settings)
        points = {point for config in configs.values() for point in config.all_exit_points}
        series = Series((*sorted(points.union(settings.fixed_exit_points(depth))), depth))
        for index in self.engine_indexes:
            self._metrics[index] = EngineMetrics(
                series, model.served_model_name, index, configs, settings.calibrates_itself
            )
            if sees_all:
                self._lines[index] = LogLine(depth)

    @override
    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        report = take_report(scheduler_stats) or {}
        engine = engine_idx or 0
        if self._choices is not None and "choices" in report:
            self._choices.add(engine, *report["choices"])
        if self._kinds is not None and "kinds" in report:
            self._kinds.add(engine, report["kinds"])
            if self._kind_lines:
                self._kind_lines[engine].add(report["kinds"])
        if "added" in report:
            self._metrics[engine].add(report)
            if self._lines:
                self._lines[engine].add(report)
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    @override
    def log(self) -> None:
        """Add lines for each engine that has worked since the last ones."""
        super().log()
        lines: list[tuple[int, LogLine | KindLine]] = [*self._lines.items()]
        for index, line in [*lines, *self._kind_lines.items()]:
            text = line.take()
            if text is not None:
                logger.info("Engine %03d: %s", index, text)
