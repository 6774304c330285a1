"""Probe kernels: reduce a hidden state's next-token scores to the features of an exit decision.

Imports only torch and Triton, never vLLM, so it can be tested and timed alone.
"""

from adainfer_kernels.parameters import Head, Lens, Norm, NormKind
from adainfer_kernels.probe import probe, readout, settle
from adainfer_kernels.result import ProbeResult, linear_score, merge
from adainfer_kernels.tuning import rows_to_compile_for

__all__ = [
    "Head",
    "Lens",
    "Norm",
    "NormKind",
    "ProbeResult",
    "linear_score",
    "merge",
    "probe",
    "readout",
    "rows_to_compile_for",
    "settle",
]
