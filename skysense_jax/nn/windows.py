"""Windows of a map, for Swin attention: cutting, shifting, relative positions, regions that do not see each other."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.core.shapes import FeatureMap, Windows

OTHER_REGION = -100.0  # added to logits between regions of a shifted map; not -inf: at the clamp it leaks, as it must


def relative_coords(window: int, pretrained_window: int = 0) -> np.ndarray:
    """Log-spaced relative coordinates, the input of the log-CPB network.

    Args:
        window: side w of a window in cells.
        pretrained_window: side of the window that the coordinates are scaled by; 0: this one.

    Returns:
        [(2w - 1)^2, 2] float32, (dy, dx) with dy outer and dx inner.
    """
    steps = np.arange(-(window - 1), window, dtype=np.float32)
    table = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    table = table / np.float32((pretrained_window or window) - 1) * np.float32(8)
    return (np.sign(table) * np.log2(np.abs(table) + np.float32(1)) / np.float32(np.log2(8))).astype(np.float32)


def relative_index(window: int, table_window: int | None = None) -> np.ndarray:
    """The row of :func:`relative_coords` for every pair of cells.

    Args:
        window: side w of a window in cells.
        table_window: side of the window that the table is made for, where it is larger: its central rows are used.

    Returns:
        [w*w, w*w] int32 for (query i, key j), cells row-major in the window.
    """
    reach = (table_window or window) - 1
    y, x = np.divmod(np.arange(window * window), window)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return ((dy + reach) * (2 * reach + 1) + dx + reach).astype(np.int32)


def to_windows(x: FeatureMap, window: int) -> Windows:
    """A map cut into windows.

    Args:
        x: [B, H, W, C]; H and W must be multiples of the window.
        window: side w of a window in cells.

    Returns:
        [B, windows, w*w, C], windows and cells row-major.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, -1, window * window, c)


def from_windows(x: Windows, window: int, height: int, width: int) -> FeatureMap:
    """The inverse of :func:`to_windows`.

    Args:
        x: [B, windows, w*w, C].
        window: side w of a window in cells.
        height: of the map.
        width: of the map.

    Returns:
        [B, height, width, C].
    """
    b, c = x.shape[0], x.shape[-1]
    x = x.reshape(b, height // window, width // window, window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, width, c)


def shift_regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Regions of the rolled, padded map; attention between two of them is discouraged.

    Args:
        height: of the map.
        width: of the map.
        window: side w of a window in cells.
        shift: cells by which the map was rolled.

    Returns:
        [windows, w*w] int8, the region of every cell.
    """

    def axis(length: int) -> np.ndarray:
        position = np.arange(length)
        return (position >= length - window).astype(np.int8) + (position >= length - shift)

    regions = 3 * axis(height)[:, None] + axis(width)[None, :]
    regions = regions.reshape(height // window, window, width // window, window).transpose(0, 2, 1, 3)
    return regions.reshape(-1, window * window).astype(np.int8)


def region_bias(regions: np.ndarray) -> jax.Array:
    """[windows, 1, w*w, w*w], added to the logits: OTHER_REGION between positions of different regions, else 0."""
    # The barrier keeps XLA from folding the mask into a constant of windows x w^4 numbers.
    ids = jax.lax.optimization_barrier(jnp.asarray(regions))
    return jnp.where(ids[:, :, None] != ids[:, None, :], OTHER_REGION, 0.0)[:, None]


def in_windows(
    x: FeatureMap, window: int, shift: int, attention: Callable[[Windows, np.ndarray | None], Windows]
) -> FeatureMap:
    """Attention inside the windows of a map.

    The map is padded with zeros to multiples of the window and rolled by the shift; both are undone afterwards. Padding
    is *not* masked.

    Args:
        x: [B, H, W, C].
        window: side w of a window in cells.
        shift: cells to roll by, 0: none.
        attention: ([B, windows, w*w, C], regions of :func:`shift_regions` or None) -> the same shape.

    Returns:
        [B, H, W, C].
    """
    _, height, width, _ = x.shape
    h = jnp.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
    _, padded_height, padded_width, _ = h.shape
    regions = None
    if shift:
        h = jnp.roll(h, (-shift, -shift), axis=(1, 2))
        regions = shift_regions(padded_height, padded_width, window, shift)
    h = from_windows(attention(to_windows(h, window), regions), window, padded_height, padded_width)
    if shift:
        h = jnp.roll(h, (shift, shift), axis=(1, 2))
    return h[:, :height, :width]
