"""Where and when: the bicubic resize of a learned position table, and the calendar table's rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

CALENDAR_DAYS = 365


def bicubic_matrix(size_in: int, size_out: int, a: float = -0.75) -> np.ndarray:
    """[size_out, size_in] float64 weights of torch's bicubic interpolation along one axis.

    Half-pixel centres, no antialiasing, border samples clamped, Keys kernel with a = -0.75 (jax.image's "cubic" uses
    a = -0.5 and antialiases; it is 2 % off).
    """
    source = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(source).astype(int)
    matrix = np.zeros((size_out, size_in))
    for offset in range(-1, 3):
        distance = np.abs(source - (first + offset))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        column = np.clip(first + offset, 0, size_in - 1)
        np.add.at(matrix, (np.arange(size_out), column), np.where(distance <= 1, near, far))
    return matrix


def resize_positions(table: jax.Array, grid: tuple[int, int], wanted: tuple[int, int]) -> jax.Array:
    """[1, 1+gh*gw, C] -> [1, 1+h*w, C]: row 0 (class token) kept, the grid rows resized bicubically."""
    height, width = grid
    rows = table[:, 1:].reshape(1, height, width, -1)
    vertical = jnp.asarray(bicubic_matrix(height, wanted[0]), table.dtype)
    horizontal = jnp.asarray(bicubic_matrix(width, wanted[1]), table.dtype)
    rows = jnp.einsum("yh,xw,bhwc->byxc", vertical, horizontal, rows, precision="highest")
    return jnp.concatenate([table[:, :1], rows.reshape(1, wanted[0] * wanted[1], -1)], axis=1)


def positions_for(table: jax.Array, grid: tuple[int, int], wanted: tuple[int, int]) -> jax.Array:
    """The table for a token grid. It is resized only where the token *count* differs (SkySense release,
    vision_transformer.py):
    an 8x32 grid uses a 16x16 table as it is, row-major."""
    if wanted[0] * wanted[1] == grid[0] * grid[1]:
        return table
    return resize_positions(table, grid, wanted)


def calendar_rows(table: jax.Array, days: jax.Array) -> jax.Array:
    """Rows of the calendar table for day-of-year indices: table [1,365,D], days int [...], -1 = unknown -> [...,D]
    float32.

    An unknown date gets zeros; 31 December of a leap year (365) uses row 364.
    """
    rows = jnp.take(table[0], jnp.clip(days, 0, CALENDAR_DAYS - 1), axis=0)
    return jnp.where((days >= 0)[..., None], rows, 0.0)
