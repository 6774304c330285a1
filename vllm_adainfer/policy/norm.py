"""Norms as numbers: what a norm multiplies, adds and divides by.

The kernels define the class; the engine, which does not import them, takes it from here.
"""

from __future__ import annotations

from adainfer_kernels import Norm, NormKind

__all__ = ["Norm", "NormKind"]
