"""Object granularity: balanced soft clusters of the cells of one map, and the centres they give.

The SkySense paper clusters the N_S pixel features of an image into N_C centres with Sinkhorn-Knopp and leaves the seeds
open; here the seeds are the features of a regular subset of the cells, so that there is nothing to initialise, to store
or to synchronise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.ops.sinkhorn import sinkhorn


def seed_cells(height: int, width: int, clusters: int) -> np.ndarray:
    """Row-major indices (int32 [clusters], sorted) of a regular rows x columns subset of the cells of a height x width
    map.

    rows * columns = clusters, with the spacing as square as the divisors of `clusters` allow.
    Raises ValueError where no such grid fits into the map.
    """
    grids = [
        (r, clusters // r)
        for r in range(1, clusters + 1)
        if clusters % r == 0 and r <= height and clusters // r <= width
    ]
    if not grids:
        raise ValueError(
            f"{clusters} clusters do not fit a {height} x {width} map as a regular grid; change objective.clusters"
        )
    rows, columns = min(grids, key=lambda grid: abs(np.log((height / grid[0]) / (width / grid[1]))))
    y = ((np.arange(rows) + 0.5) * height / rows).astype(np.int32)
    x = ((np.arange(columns) + 0.5) * width / columns).astype(np.int32)
    return (y[:, None] * width + x[None, :]).reshape(-1)


def assign(features: jax.Array, mask: jax.Array, seeds: np.ndarray, epsilon: float, iterations: int) -> jax.Array:
    """Balanced assignment of cells to the clusters seeded by some of them.

    features: [..., N, D]; mask: [..., N], nonzero = the cell is valid; seeds: [C] cell indices; epsilon: temperature on
    the cosine. Returns [..., N, C] float32 (float64 for float64): rows of valid cells sum to 1, of others are 0; a
    cluster whose seed is invalid stays empty, and the others share the cells. With no valid seed at all everything is
    0.
    """
    wide = jnp.promote_types(features.dtype, jnp.float32)
    dots = jnp.einsum("...nd,...cd->...nc", features, features[..., seeds, :], preferred_element_type=wide)
    scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(features.astype(wide)), axis=-1), 1e-24))
    cosine = dots * scale[..., :, None] * scale[..., seeds][..., None, :]
    return sinkhorn(cosine / epsilon, iterations, mask, mask[..., seeds])


def centres(features: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted means of the cells' features.

    features: [..., N, D]; weight: [..., N, C] >= 0. Returns (centres [..., C, D] float32 or wider, accumulated there
    over products in the features' dtype; mass [..., C] = sum of the weights); a cluster without mass has centre 0.
    """
    mass = weight.sum(-2)
    share = (weight / jnp.maximum(mass, 1e-6)[..., None, :]).astype(features.dtype)
    return jnp.einsum("...nc,...nd->...cd", share, features, preferred_element_type=mass.dtype), mass
