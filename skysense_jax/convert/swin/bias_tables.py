"""Tables of relative position biases for another window than the one they were trained with.

They are resized, or computed by the network that Swin-MoE has in their place.
"""

from __future__ import annotations

import math

import numpy as np

from skysense_jax.nn.windows import relative_coords


def window_of(rows: int) -> int | None:
    """The window of a table of (2w-1)^2 rows; None where that is no table of a square window."""
    side = math.isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def progression(source: int, target: int) -> float:
    """The ratio q of the geometric progression that spreads a table over another one.

    1 + q + q^2 + ... of source // 2 terms is target // 2. By bisection in [1.01, 1.5] to 1e-6, as the reference
    computes
    it: where no such q lies in that range, its bound (GFM, utils.remap_pretrained_keys_swin).

    Args:
        source: side of the table.
        target: side of the other one.

    Returns:
        q.
    """
    low, high, q = 1.01, 1.5, 0.0
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (source // 2)) / (1 - q) > target // 2 else (q, high)
    return q


def resized(table: np.ndarray, window: int) -> np.ndarray:
    """Resizes a table for another window.

    The reference's rule (GFM, utils.remap_pretrained_keys_swin): the rows of the old table stand at 0, +-1, +-(1 + q),
    +-(1 + q + q^2), ..., and an interpolating bicubic spline of every head is read at whole numbers; what lies outside
    takes the value of the edge. A smaller window therefore crops.

    Args:
        table: [(2v-1)^2, heads].
        window: w.

    Returns:
        float32 [(2w-1)^2, heads].

    Raises:
        ValueError: the table has fewer than 4 rows along a side, which no cubic goes through.
    """
    from scipy.interpolate import RectBivariateSpline  # 0.7 s to import, and every run imports this module

    side, target = math.isqrt(len(table)), 2 * window - 1
    if side < 4:
        raise ValueError(f"a table of {len(table)} rows is too small to be resized; a window of 3 is the smallest")
    q = progression(side, target)
    steps = np.cumsum(q ** np.arange(side // 2))
    source = np.concatenate([-steps[::-1], [0.0], steps])
    positions = np.arange(-(window - 1.0), window)
    heads = table.reshape(side, side, -1).astype(np.float64)
    splines = (RectBivariateSpline(source, source, heads[..., i], kx=3, ky=3, s=0) for i in range(heads.shape[-1]))
    return np.stack([spline(positions, positions) for spline in splines], -1).reshape(target**2, -1).astype(np.float32)


def from_network(kernel1: np.ndarray, bias1: np.ndarray, kernel2: np.ndarray, window: int, trained: int) -> np.ndarray:
    """Computes the table of a window by Swin-MoE's `cpb_mlp`.

    Unlike Swin-V2 it has no sigmoid behind it (swin_transformer_moe.WindowAttention), so that a model with tables
    computes the same.

    Args:
        kernel1: [512, 2], torch's layout.
        bias1: [512].
        kernel2: [heads, 512].
        window: w.
        trained: the window that the network was trained with.

    Returns:
        float32 [(2w-1)^2, heads].
    """
    hidden = relative_coords(window, trained).astype(np.float64) @ kernel1.T.astype(np.float64) + bias1
    return (np.maximum(hidden, 0) @ kernel2.T.astype(np.float64)).astype(np.float32)
