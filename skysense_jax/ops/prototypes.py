"""The prototype bank of SkySense's geo-context: N_p prototypes per region, learnt without gradient.

A bank is a tree, all of it exported and checkpointed:
  prototypes [R, P, D] float32   moving averages of unit features; only their directions are used
  usage [R, P] float32           moving average of the share of cells that are nearest to a prototype; 1/P at the start
  visits [R] int32               updates a region has had; a region without one gives no context
  cells [R] int32                the grid cell of every region (ops.regions)
  lon_edges, lat_edges float32   the grid

The update (SkySense paper; scales and constants open): for one view in region r with features F [N, D], M = cosine(F,
P_r), S = Sinkhorn(M / epsilon), P' = S^T F with unit rows of F, each row of it divided by its mass (a plain S^T F would
shrink the prototypes); P' averaged over all views of r in the global batch; P_r <- m P_r + (1 - m) P'. Everything in
float32 at full matmul precision, and every sum over places one product with a matrix of weights: the order of the
places, the devices they lie on and their number change rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.core.shapes import Features, Key, Mask
from skysense_jax.ops import clusters, regions
from skysense_jax.ops.contrast import safe_mean
from skysense_jax.ops.ema import ema
from skysense_jax.ops.sinkhorn import sinkhorn
from skysense_jax.ops.unit import unit

NO_PROTOTYPE = 65535
"""In an assignment of cells to prototypes (uint16, maps and GeoTIFFs): a cell without valid input."""

Bank = Mapping[str, jax.Array]
"""The leaves above by name."""

Place = Mapping[str, jax.Array]
"""{"lon", "lat"} [B] degrees: where the places of a batch are."""

DEAD = 0.1
"""A prototype is dead where fewer cells are nearest to it than this share of an equal part."""


class Observed(NamedTuple):
    """What a batch says about the bank, by place.

    Attributes:
        region: [B] int32, the place's region, NOWHERE without a region.
        cells: [R] int32, the bank's table with the batch's new cells.
        means: [B, P, D] new prototypes, summed over the place's views.
        usage: [B, P] share of cells nearest to each prototype, summed over the place's views.
        views: [B] number of the place's views that count.
    """

    region: jax.Array
    cells: jax.Array
    means: jax.Array
    usage: jax.Array
    views: jax.Array


def empty_bank(
    rng: Key, count: int, prototypes: int, width: int, cell: float, side: int = regions.ALONE
) -> dict[str, jax.Array]:
    """A bank whose regions have never been visited: prototypes drawn from the sphere, no cell taken.

    Args:
        rng: random key of the prototypes.
        count: number of regions R.
        prototypes: of each region, P.
        width: of a prototype, D.
        cell: side of the grid's cells in metres.
        side: of regions.cell_ids, where cells share regions; their table is full from the start.

    Returns:
        The bank.

    Raises:
        ValueError: the grid has fewer rows or columns than `side`.
    """
    lon_edges, lat_edges = regions.grid_edges(cell)
    if side != regions.ALONE and side > len(lat_edges) + 1:
        raise ValueError(
            f"model.geo_context: {side} rows of shared regions, a grid of {cell:g} m has "
            f"{len(lat_edges) + 1}; lower regions, or cell"
        )
    cells = np.full(count, regions.NOWHERE) if side == regions.ALONE else regions.shared(side, len(lon_edges) + 1)
    return {
        "prototypes": unit(jax.random.normal(rng, (count, prototypes, width), jnp.float32), "clamp"),
        "usage": jnp.full((count, prototypes), 1 / prototypes, jnp.float32),
        "visits": jnp.zeros(count, jnp.int32),
        "cells": jnp.asarray(cells, jnp.int32),
        "lon_edges": jnp.asarray(lon_edges),
        "lat_edges": jnp.asarray(lat_edges),
    }


def place_cells(bank: Bank, place: Place, side: int) -> jax.Array:
    """The cell of the bank's grid in which every place lies.

    Args:
        bank: with the grid.
        place: locations of the places.
        side: of regions.cell_ids.

    Returns:
        [B] int32.
    """
    return regions.cell_ids(place["lon"], place["lat"], bank["lon_edges"], bank["lat_edges"], side)


def at_places(bank: Bank, place: Place, side: int = regions.ALONE) -> tuple[jax.Array, Mask]:
    """The prototypes of the places' regions, and whether they may be used.

    They may not where the location is missing, the bank has no region for its cell, or the region has never been
    visited.

    Args:
        bank: to look in.
        place: locations of the places.
        side: as in :func:`empty_bank`.

    Returns:
        (prototypes [B, P, D], usable [B] bool).
    """
    region = regions.lookup(bank["cells"], place_cells(bank, place, side))
    row = jnp.maximum(region, 0)
    return bank["prototypes"][row], (region != regions.NOWHERE) & (bank["visits"][row] > 0)


@jax.default_matmul_precision("highest")
def directions(vectors: Features) -> jax.Array:
    """Over how many directions unit vectors spread: P^2 / the sum of their P x P squared cosines.

    P = all are orthogonal, 1 = all lie on one line. Unlike the mean cosine it sees groups of vectors that are the same.

    Args:
        vectors: [..., P, D] of length 1.

    Returns:
        [...] float32.
    """
    return vectors.shape[-2] ** 2 / jnp.square(jnp.einsum("...pd,...qd->...pq", vectors, vectors)).sum((-2, -1))


@jax.default_matmul_precision("highest")
def observe(
    bank: Bank, place: Place, queries: Features, mask: Mask, epsilon: float, iterations: int, side: int = regions.ALONE
) -> tuple[Observed, dict[str, jax.Array]]:
    """Assign the cells of every view to the prototypes of its place's region; new cells of the grid take free regions.

    Views without a valid cell and places without a region do not count.

    Args:
        bank: before the batch.
        place: locations of the places.
        queries: [B, V, N, D] features of V views in the bank's space.
        mask: [B, V, N], 0 = no valid input.
        epsilon: temperature of Sinkhorn-Knopp.
        iterations: of Sinkhorn-Knopp.
        side: as in :func:`empty_bank`.

    Returns:
        (what the batch says about the bank; monitors: scalars "located", "regions", "fit", "entropy", "similarity",
        "directions", "dead", see objectives.skysense).
    """
    ids = place_cells(bank, place, side)
    table = regions.claim(bank["cells"], ids)
    region = regions.lookup(table, ids)
    row = jnp.maximum(region, 0)
    cells, local_prototypes = unit(queries, "clamp"), unit(bank["prototypes"][row], "clamp")
    cosine = jnp.einsum("bvnd,bpd->bvnp", cells, local_prototypes)
    mask = (mask != 0) & (region != regions.NOWHERE)[:, None, None]
    means, _ = clusters.centres(cells, sinkhorn(cosine / epsilon, iterations, mask))

    view_counts = mask.any(-1).astype(jnp.float32)
    nearest = jax.nn.one_hot(cosine.argmax(-1), cosine.shape[-1]) * mask[..., None]
    usage = nearest.sum(2) / jnp.maximum(mask.sum(-1), 1)[..., None]
    observed = Observed(region, table, (means * view_counts[..., None, None]).sum(1), usage.sum(1), view_counts.sum(1))

    count, weight = cosine.shape[-1], (region != regions.NOWHERE).astype(jnp.float32)
    attention = jax.nn.softmax(cosine * queries.shape[-1] ** 0.5, axis=-1)
    entropy = jax.scipy.special.entr(attention).sum(-1) / jnp.log(count)
    pairs = (jnp.square(local_prototypes.sum(1)).sum(-1) - count) / max(count * (count - 1), 1)
    dead = (bank["usage"][row] < DEAD / count).mean(-1)
    monitors = {
        "located": weight.mean(),
        "regions": (bank["visits"] > 0).mean(),
        "fit": safe_mean((cosine.max(-1) * mask).sum(), mask.sum()),
        "entropy": safe_mean((entropy * mask).sum(), mask.sum()),
        "similarity": safe_mean((pairs * weight).sum(), weight.sum()),
        "directions": safe_mean((directions(local_prototypes) / count * weight).sum(), weight.sum()),
        "dead": safe_mean((dead * weight).sum(), weight.sum()),
    }
    return observed, monitors


@jax.default_matmul_precision("highest")
def update(bank: Bank, observed: Observed, momentum: float) -> dict[str, jax.Array]:
    """The bank after a batch. Regions that are not in the batch keep every bit.

    Args:
        bank: before the batch.
        observed: what the batch says about it.
        momentum: m of the moving averages, of the prototypes and of their usage.

    Returns:
        The bank.
    """
    region, places = observed.region, len(observed.region)
    same = (region[:, None] == region[None, :]) & (region != regions.NOWHERE)[:, None]
    weight = same / jnp.maximum(jnp.where(same, observed.views, 0).sum(-1), 1)[:, None]
    means = jnp.einsum("ij,jpd->ipd", weight, observed.means)
    usage = weight @ observed.usage

    first = (jnp.argmax(same, axis=-1) == jnp.arange(places)) & (jnp.where(same, observed.views, 0).sum(-1) > 0)
    target = jnp.where(first, region, len(bank["visits"]))  # each region once; the others fall outside and are dropped

    def moved(name: str, new: jax.Array) -> jax.Array:
        old = bank[name].at[target].get(mode="fill", fill_value=0)
        return bank[name].at[target].set(ema(old, new, momentum), mode="drop")

    return {
        **bank,
        "prototypes": moved("prototypes", means),
        "usage": moved("usage", usage),
        "visits": bank["visits"].at[target].add(1, mode="drop"),
        "cells": observed.cells,
    }
