"""What the experiments have in common: means over seeds with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def mean_and_interval(values: Sequence[float], sign: str = "") -> str:
    """Mean over seeds and its 95 % interval (Student's t); the mean alone of one value. sign: "+" for differences."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:{sign}.3f}"
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{mean:{sign}.3f} [{mean - half:{sign}.3f}, {mean + half:{sign}.3f}]"
