"""Which cells of two views show the same ground: the geometric correspondence behind the pixel and object terms."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from skysense_jax.core.shapes import Mask


def match_cells(
    coords_a: jax.Array, coords_b: jax.Array, cell_a: jax.Array, cell_b: jax.Array
) -> tuple[jax.Array, Mask]:
    """For every cell of view a the nearest cell of view b, and whether it is near enough to be the same ground.

    Args:
        coords_a: [..., ha, wa, 2] (x, y) of the cell centres in base pixels of the place; leading axes are a batch.
        coords_b: [..., hb, wb, 2] of view b.
        cell_a: [...] side of a cell of view a in base pixels.
        cell_b: [...] of a cell of view b.

    Returns:
        (index int32 [..., ha*wa] into b's cells flattened row by row, the first of equally distant cells; mask float32
        [..., ha*wa], 1 where the centres lie at most half the diagonal of the larger cell apart).
    """
    flat_a = coords_a.reshape(*coords_a.shape[:-3], -1, 1, 2)
    flat_b = coords_b.reshape(*coords_b.shape[:-3], 1, -1, 2)
    distance = jnp.sum(jnp.square(flat_a - flat_b), axis=-1)  # not by a dot product: cancellation would move matches
    index = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    limit = 0.5 * jnp.square(jnp.maximum(cell_a, cell_b))[..., None]  # (side * sqrt(2) / 2) squared
    return index, (jnp.min(distance, axis=-1) <= limit).astype(jnp.float32)
