"""Object granularity: balanced soft clusters of the cells of one map, and the centres they give.

The SkySense paper clusters the N_S pixel features of an image into N_C centres with Sinkhorn-Knopp and leaves the seeds
open; here the seeds are the features of a regular subset of the cells, so that there is nothing to initialise, to store
or to synchronise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.core.shapes import Features, Mask
from skysense_jax.ops.sinkhorn import sinkhorn


def seed_cells(height: int, width: int, clusters: int) -> np.ndarray:
    """A regular rows x columns subset of the cells of a map, one cell for each cluster.

    rows * columns = clusters, with the spacing as square as the divisors of `clusters` allow.

    Args:
        height: of the map in cells.
        width: of the map in cells.
        clusters: number of clusters.

    Returns:
        Row-major indices of the cells, int32 [clusters], ascending.

    Raises:
        ValueError: no such grid fits into the map.
    """
    grids = [
        (rows, clusters // rows)
        for rows in range(1, clusters + 1)
        if clusters % rows == 0 and rows <= height and clusters // rows <= width
    ]
    if not grids:
        raise ValueError(
            f"{clusters} clusters do not fit a {height} x {width} map as a regular grid; change objective.clusters"
        )
    rows, columns = min(grids, key=lambda grid: abs(np.log((height / grid[0]) / (width / grid[1]))))
    y = ((np.arange(rows) + 0.5) * height / rows).astype(np.int32)
    x = ((np.arange(columns) + 0.5) * width / columns).astype(np.int32)
    return (y[:, None] * width + x[None, :]).reshape(-1)


def assign(features: Features, mask: Mask, seeds: np.ndarray, epsilon: float, iterations: int) -> jax.Array:
    """Balanced assignment of cells to the clusters seeded by some of them.

    Args:
        features: [..., N, D] of the cells.
        mask: [..., N], nonzero = the cell is valid.
        seeds: [C] cell indices.
        epsilon: temperature on the cosine.
        iterations: of Sinkhorn-Knopp.

    Returns:
        [..., N, C] float32 (float64 for float64): rows of valid cells sum to 1, rows of others are 0. A cluster whose
        seed is invalid stays empty, and the other clusters share the cells. Without a valid seed everything is 0.
    """
    wide = jnp.promote_types(features.dtype, jnp.float32)
    dots = jnp.einsum("...nd,...cd->...nc", features, features[..., seeds, :], preferred_element_type=wide)
    scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(features.astype(wide)), axis=-1), 1e-24))
    cosine = dots * scale[..., :, None] * scale[..., seeds][..., None, :]
    return sinkhorn(cosine / epsilon, iterations, mask, mask[..., seeds])


def centres(features: Features, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted means of the cells' features.

    Args:
        features: [..., N, D] of the cells.
        weight: [..., N, C] >= 0 of each cell in each cluster.

    Returns:
        (centres [..., C, D], float32 or wider, in which products in the features' dtype are accumulated; mass [..., C]
        = sum of the weights). A cluster without mass has the centre 0.
    """
    mass = weight.sum(-2)
    share = (weight / jnp.maximum(mass, 1e-6)[..., None, :]).astype(features.dtype)
    return jnp.einsum("...nc,...nd->...cd", share, features, preferred_element_type=mass.dtype), mass
