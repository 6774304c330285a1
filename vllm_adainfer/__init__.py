"""vLLM plugin that runs only the layers each request needs, within a calibrated bound."""

from vllm_adainfer.stats import stats

__version__ = "0.2.0"

__all__ = ["__version__", "stats"]
