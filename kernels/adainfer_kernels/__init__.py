"""Kernels of an exit decision: reduce a hidden state's next-token scores to features, pool states.

Imports only torch and Triton, never vLLM, so it can be tested and timed alone.
"""

from adainfer_kernels.backend import use_torch
from adainfer_kernels.parameters import Head, Lens, Norm, NormKind
from adainfer_kernels.pooling import Pooled, normed, pool
from adainfer_kernels.probe import probe, readout, settle
from adainfer_kernels.result import ProbeResult, linear_score, merge
from adainfer_kernels.tuning import rows_to_compile_for

__all__ = [
    "Head",
    "Lens",
    "Norm",
    "NormKind",
    "Pooled",
    "ProbeResult",
    "linear_score",
    "merge",
    "normed",
    "pool",
    "probe",
    "readout",
    "rows_to_compile_for",
    "settle",
    "use_torch",
]
