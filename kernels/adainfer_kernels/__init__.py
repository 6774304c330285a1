"""Probe kernels: a hidden state's next-token scores, reduced to what an exit decision reads.

Imports torch only, never vLLM, so that it can be tested and timed alone.
"""

from adainfer_kernels.probe import ProbeResult, probe, summarise

__all__ = ["ProbeResult", "probe", "summarise"]
