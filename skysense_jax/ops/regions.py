"""Regions of the Earth: the occupied cells of an equal-area grid, and the table that gives each of them an index.

The grid is Lambert's cylindrical equal-area one on the authalic sphere, X = R * longitude, Y = R * sin(latitude), cut
into squares of `cell` metres from the meridian 0 and the equator (SkySense: 4096 regions of about 4294 km2, that is
squares of 65,536 m; which ones is open, so: those with a place in them). A grid is its inner edges in degrees, float32,
and a location is compared with them: no rounding of a product or a sine decides on which side of an edge a place lies,
so that numpy, every device and torch agree bit for bit. The first and the last column end at the antimeridian, the
first and the last row at the poles; these cells are smaller than the others. A pole is one place and lies in one cell.

Or every cell of the Earth has a region from the start, which it shares with those `side` cells to its east and north:
region = (column mod side) * side + (row mod side). Then a cell is stood for by that of its region with the lowest
column and row, and the table holds these.
"""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Numbers = TypeVar("Numbers", jax.Array, np.ndarray)
"""Either kind of array: what goes in comes out."""

RADIUS = 6371007.1809
"""Metres: the sphere with the area of the WGS 84 ellipsoid."""

NOWHERE = -1
"""Cell of a place without a location, region of a place whose cell has none, and a free row of a table."""

ALONE = 2**31 - 1
"""`side` of a grid whose cells do not share regions: more than any grid has columns."""


def grid_edges(cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Inner edges of the grid's columns and rows.

    Args:
        cell: side of a cell in metres at the equator.

    Returns:
        (longitudes [C - 1], latitudes [R - 1]) in degrees, ascending, float32.

    Raises:
        ValueError: there would be no more than one cell.
    """
    if not 0 < cell < RADIUS:
        raise ValueError(f"model.geo_context.cell={cell} metres: give a side between 0 and {RADIUS:.0f}")

    def steps(half: float) -> np.ndarray:
        n = int(np.ceil(half / cell)) - 1  # an edge on the boundary itself is none
        return np.arange(-n, n + 1) * cell / RADIUS

    return (
        np.degrees(steps(np.pi * RADIUS)).astype(np.float32),
        np.degrees(np.arcsin(steps(RADIUS))).astype(np.float32),
    )


def cell_ids(lon: Numbers, lat: Numbers, lon_edges: Numbers, lat_edges: Numbers, side: int = ALONE) -> Numbers:
    """The cell of every location: row * columns + column, row and column modulo `side`.

    A location that is not finite or outside of the Earth gives NOWHERE. A place on an edge belongs to the cell to the
    east or to the north.

    Args:
        lon: [B] degrees from -360 to 360; -180 and 180 are the same, and at a pole all are.
        lat: [B] degrees.
        lon_edges: inner edges of the columns, see :func:`grid_edges`.
        lat_edges: inner edges of the rows.
        side: rows and columns after which cells share regions, see the module.

    Returns:
        [B] int32, in numpy for numpy input.
    """
    xp = np if isinstance(lon, np.ndarray) else jnp
    lon, lat = lon.astype(np.float32), lat.astype(np.float32)  # the dtype of a batch's locations
    tiny = np.finfo(np.float32).tiny  # below it devices read 0, numpy does not
    lon, lat = (xp.where(xp.abs(x) < tiny, np.float32(0), x) for x in (lon, lat))
    on_earth = (xp.abs(lon) <= 360) & (xp.abs(lat) <= 90)  # False for NaN
    lon = xp.where(xp.abs(lat) == 90, np.float32(0), lon)
    lon = xp.where(lon >= 180, lon - 360, xp.where(lon < -180, lon + 360, lon))  # exact in float32
    column = xp.sum(lon[:, None] >= lon_edges, axis=-1, dtype=np.int32) % side
    row = xp.sum(lat[:, None] >= lat_edges, axis=-1, dtype=np.int32) % side
    return xp.where(on_earth, row * (len(lon_edges) + 1) + column, NOWHERE).astype(np.int32)


def occupied(ids: np.ndarray, capacity: int) -> np.ndarray:
    """The table of the cells in which places lie.

    Args:
        ids: cells of the places, NOWHERE without a location.
        capacity: rows of the table.

    Returns:
        int32 [capacity]: the cells ascending, then NOWHERE for the free rows.

    Raises:
        ValueError: there are more cells than rows.
    """
    cells = np.unique(ids[ids != NOWHERE])
    if len(cells) > capacity:
        raise ValueError(
            f"the places lie in {len(cells)} cells of the grid, model.geo_context.regions={capacity} is "
            "the room for them; raise it, or model.geo_context.cell"
        )
    return np.concatenate([cells, np.full(capacity - len(cells), NOWHERE)]).astype(np.int32)


def shared(side: int, columns: int) -> np.ndarray:
    """The table of a grid whose cells share regions.

    Args:
        side: rows and columns after which cells share regions.
        columns: of the grid.

    Returns:
        int32 [side^2]: for each region the cell that stands for it.
    """
    column, row = np.divmod(np.arange(side * side), side)
    return (row * columns + column).astype(np.int32)


def is_shared(cells: np.ndarray) -> bool:
    """Whether a table is one of :func:`shared`; tables of occupied cells are not."""
    side = math.isqrt(len(cells))
    return side * side == len(cells) > 1 and bool(np.array_equal(cells, shared(side, int(cells[1]))))


def lookup(cells: jax.Array, ids: jax.Array) -> jax.Array:
    """The region of each cell: the row of the table that has it.

    Args:
        cells: [R] int32, the table.
        ids: [B] int32, the cells to look up.

    Returns:
        [B] int32, NOWHERE where no row has the cell.
    """
    hit = (cells[None, :] == ids[:, None]) & (ids != NOWHERE)[:, None]
    return jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), NOWHERE).astype(jnp.int32)


def claim(cells: jax.Array, ids: jax.Array) -> jax.Array:
    """The table after new cells took its free rows, in ascending order.

    Rows that are taken never change; cells for which no row is free stay out. The order of `ids` does not matter. This
    is how a stream of unknown places fills a bank.

    Args:
        cells: [R] int32, the table.
        ids: [B] int32, the cells of a batch's places.

    Returns:
        [R] int32.
    """
    new = jnp.sort(jnp.where(lookup(cells, ids) == NOWHERE, ids, NOWHERE))
    first = (new != NOWHERE) & (new != jnp.roll(new, 1).at[0].set(NOWHERE))
    free = jnp.argsort(cells != NOWHERE, stable=True)  # free rows in front, ascending
    rank = jnp.cumsum(first) - 1
    room = first & (rank < jnp.sum(cells == NOWHERE))
    row = jnp.where(room, free[jnp.minimum(rank, len(cells) - 1)], len(cells))
    return cells.at[row].set(new, mode="drop")


def cell_bounds(cell: int, lon_edges: np.ndarray, lat_edges: np.ndarray) -> tuple[float, float, float, float]:
    """The edges of a cell.

    Args:
        cell: number of the cell.
        lon_edges: inner edges of the grid's columns, degrees.
        lat_edges: inner edges of the grid's rows, degrees.

    Returns:
        (west, south, east, north) in degrees.
    """
    lon, lat = np.array([-180, *lon_edges, 180]), np.array([-90, *lat_edges, 90])
    row, column = divmod(int(cell), len(lon) - 1)
    return float(lon[column]), float(lat[row]), float(lon[column + 1]), float(lat[row + 1])


def cell_centre(cell: int, lon_edges: np.ndarray, lat_edges: np.ndarray) -> tuple[float, float]:
    """The middle between a cell's edges.

    Args:
        cell: number of the cell.
        lon_edges: inner edges of the grid's columns, degrees.
        lat_edges: inner edges of the grid's rows, degrees.

    Returns:
        (longitude, latitude) in degrees.
    """
    west, south, east, north = cell_bounds(cell, lon_edges, lat_edges)
    return (west + east) / 2, (south + north) / 2
