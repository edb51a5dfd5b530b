"""Intervals by resampling places: patches of one place are not independent, so whole places are drawn, never rows."""

from __future__ import annotations

from typing import Any

import numpy as np


def place_weights(places: int, resamples: int, seed: int) -> np.ndarray:
    """Draws how often every place occurs in every resample. The same seed gives the same draws.

    Args:
        places: P.
        resamples: B.
        seed: of the draws.

    Returns:
        int64 [B, P]; rows sum to P.

    Raises:
        ValueError: fewer than one place or resample.
    """
    if places < 1 or resamples < 1:
        raise ValueError(f"bootstrap: needs at least one place and one resample, got {places} and {resamples}")
    return np.random.default_rng(seed).multinomial(places, np.full(places, 1.0 / places), size=resamples)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples.

    Args:
        samples: [B]; resamples where the score is undefined (NaN) are left out.
        level: share of the samples within.

    Returns:
        (low, high); NaN where no sample is defined.
    """
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(
    first: np.ndarray, second: np.ndarray, first_value: float, second_value: float, level: float = 0.95
) -> dict[str, Any]:
    """The difference of two methods over the *same* resamples.

    Args:
        first: bootstrap samples [B] of a method.
        second: those of another.
        first_value: the score of the method.
        second_value: that of the other.
        level: of the interval.

    Returns:
        {"difference", "interval", "apart"}: first - second; apart is True where the interval does not hold 0.
    """
    low, high = interval(first - second, level)
    return {
        "difference": float(first_value - second_value),
        "interval": [low, high],
        "apart": bool(low > 0 or high < 0),
    }
