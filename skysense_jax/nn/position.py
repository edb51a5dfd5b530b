"""Where and when: the bicubic resize of a learned position table, and the calendar table's rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.core.shapes import Features

CALENDAR_DAYS = 365


def bicubic_matrix(size_in: int, size_out: int, a: float = -0.75) -> np.ndarray:
    """Weights of torch's bicubic interpolation along one axis.

    Half-pixel centres, no antialiasing, border samples clamped, Keys kernel with a = -0.75 (jax.image's "cubic" uses
    a = -0.5 and antialiases; it is 2 % off).

    Args:
        size_in: samples of the input.
        size_out: samples of the output.
        a: of the Keys kernel.

    Returns:
        [size_out, size_in] float64.
    """
    source = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(source).astype(int)
    matrix = np.zeros((size_out, size_in))
    for offset in range(-1, 3):
        distance = np.abs(source - (first + offset))
        within_1 = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        beyond_1 = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        column = np.clip(first + offset, 0, size_in - 1)
        np.add.at(matrix, (np.arange(size_out), column), np.where(distance <= 1, within_1, beyond_1))
    return matrix


def resize_positions(table: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int]) -> jax.Array:
    """A position table for another grid: row 0 (class token) stays, the rows of the grid are resized bicubically.

    Args:
        table: [1, 1 + rows * columns, C].
        grid: (rows, columns) of the table.
        new_grid: (rows, columns) of the result.

    Returns:
        [1, 1 + new rows * new columns, C].
    """
    height, width = grid
    rows = table[:, 1:].reshape(1, height, width, -1)
    vertical = jnp.asarray(bicubic_matrix(height, new_grid[0]), table.dtype)
    horizontal = jnp.asarray(bicubic_matrix(width, new_grid[1]), table.dtype)
    rows = jnp.einsum("yh,xw,bhwc->byxc", vertical, horizontal, rows, precision="highest")
    return jnp.concatenate([table[:, :1], rows.reshape(1, new_grid[0] * new_grid[1], -1)], axis=1)


def positions_for(table: jax.Array, grid: tuple[int, int], token_grid: tuple[int, int]) -> jax.Array:
    """The position table for a grid of tokens.

    It is resized only where the *number* of tokens differs (SkySense release, vision_transformer.py): an 8x32 grid uses
    a 16x16 table as it is, row-major.

    Args:
        table: [1, 1 + rows * columns, C].
        grid: (rows, columns) of the table.
        token_grid: (rows, columns) of the tokens.

    Returns:
        [1, 1 + tokens, C].
    """
    if token_grid[0] * token_grid[1] == grid[0] * grid[1]:
        return table
    return resize_positions(table, grid, token_grid)


def calendar_rows(table: jax.Array, days: jax.Array) -> Features:
    """Rows of the calendar table for days of the year.

    Args:
        table: [1, 365, D].
        days: int [...], 0 = 1 January, -1 = unknown. 31 December of a leap year (365) uses row 364.

    Returns:
        [..., D] float32, zeros for an unknown date.
    """
    rows = jnp.take(table[0], jnp.clip(days, 0, CALENDAR_DAYS - 1), axis=0)
    return jnp.where((days >= 0)[..., None], rows, 0.0)
