"""Feeds a server's metrics and log lines with the reports of its engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.compat.stats import take_report
from vllm_adainfer.engine.pinned_artifacts import served_configs
from vllm_adainfer.frontend.log_line import LogLines
from vllm_adainfer.frontend.metrics import EngineMetrics
from vllm_adainfer.frontend.series import register_series
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
        self._lines: dict[int, LogLines] = {}
        settings = read_settings(vllm_config.additional_config)
        if settings is None:
            return
        model = vllm_config.model_config
        configs: dict[str, ArtifactConfig] = {}
        layers, depth = None, 0
        if not settings.runs_stock:
            depth = model.hf_text_config.num_hidden_layers
            configs = served_configs(vllm_config, settings)
            points = {point for config in configs.values() for point in config.all_exit_points}
            layers = (*sorted(points.union(settings.fixed_exit_points(depth))), depth)
        has_channel = vllm_config.kv_transfer_config is None
        series = register_series(
            layers,
            choices=has_channel and settings.finishes_choices,
            kinds=has_channel and settings.auto is not None,
            drafts=has_channel and settings.drafts_structure,
        )
        sees_all = kw.get("client_count", 1) == 1  # otherwise each frontend sees only some counts
        for index in self.engine_indexes:
            self._metrics[index] = EngineMetrics(
                series, model.served_model_name, index, configs, settings.calibrates_itself
            )
            if sees_all:
                self._lines[index] = LogLines(depth)

    @override
    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        report, engine = take_report(scheduler_stats), engine_idx or 0
        if report is not None and engine in self._metrics:
            self._metrics[engine].add(report)
            if engine in self._lines:
                self._lines[engine].add(report)
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    @override
    def log(self) -> None:
        """Add lines for each engine that has worked since the last ones."""
        super().log()
        for index, lines in self._lines.items():
            for line in lines.take():
                logger.info("Engine %03d: %s", index, line)
