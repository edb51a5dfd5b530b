"""The alignment term: the regions of a place that two sensors see are nearer to each other than to other places.

for a, b in pairs of sensors:
    for every region of a grid x grid division of each global view that both see:
        x, y = the mean cell of the region, over all dates, of a and b, through a linear map of each sensor
        loss += InfoNCE(cosine(x, y) / align_temp), negatives = regions of other places     mean of both directions
    term[a-b] = mean over those regions of the global batch
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from skysense_jax.core.sharding import gathered
from skysense_jax.core.trees import Tree
from skysense_jax.objectives.granularity import Cells
from skysense_jax.ops import contrast


def alignment_losses(
    params: Mapping[str, Tree],
    cells: Mapping[str, Cells],
    size: int,
    dtype: jnp.dtype,
    objective: config_dict.ConfigDict,
) -> dict[str, jax.Array]:
    """The symmetric InfoNCE of every pair of sensors.

    Args:
        params: {sensor: {"kernel" [D, align_dim]}}.
        cells: {sensor: maps of the student's global views}, the sensors in the order of the pairs' names.
        size: cells along one side of a view.
        dtype: of the projection's product.
        objective: config.objective, of which align_grid and align_temp count.

    Returns:
        {"<a>-<b>": scalar float32}.
    """
    pooled = {name: pool_regions(maps, size, objective.align_grid) for name, maps in cells.items()}
    vectors = {
        name: contrast.normalise(
            jnp.dot(
                regions.astype(dtype),
                gathered(params[name]["kernel"].astype(dtype)),
                preferred_element_type=jnp.float32,
            )
        )
        for name, (regions, _) in pooled.items()
    }
    return {
        f"{a}-{b}": contrast.info_nce(vectors[a], vectors[b], pooled[a][1] * pooled[b][1], objective.align_temp)
        for a, b in itertools.combinations(cells, 2)
    }


def pool_regions(cells: Cells, size: int, grid: int) -> tuple[jax.Array, jax.Array]:
    """Means over the dates and the valid cells of each region of a grid x grid division of every view.

    Args:
        cells: maps [B, S, T, size * size, D].
        size: cells along one side of a view.
        grid: regions along one side; divides size.

    Returns:
        vectors [B, S * grid^2, D] float32, and valid [B, S * grid^2] float32: 1 where any cell of any date is valid.
    """
    b, s, _, _, d = cells.features.shape
    side = size // grid
    total = jnp.sum(cells.features * cells.mask[..., None].astype(cells.features.dtype), axis=2, dtype=jnp.float32)
    total = total.reshape(b, s, grid, side, grid, side, d).sum((3, 5))
    mass = cells.mask.sum(2).reshape(b, s, grid, side, grid, side).sum((3, 5))
    mean = total / jnp.maximum(mass, 1.0)[..., None]
    return mean.reshape(b, -1, d), (mass > 0).astype(jnp.float32).reshape(b, -1)
