"""Probe kernels: a hidden state's next-token scores, reduced to what an exit decision reads.

Imports torch and Triton only, never vLLM, so that it can be tested and timed alone.
"""

from adainfer_kernels.probe import probe, readout, settle
from adainfer_kernels.result import ProbeResult, linear_score, merge
from adainfer_kernels.torch_probe import summarise

__all__ = ["ProbeResult", "linear_score", "merge", "probe", "readout", "settle", "summarise"]
