"""Vectors of length 1 in numpy, for evaluations: the twin of `skysense_jax.ops.unit`."""

from __future__ import annotations

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, [..., D] -> the same in float64; a row of zeros stays zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
