"""Regions: the equal-area grid, the table of occupied cells, cells that share a region."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skysense_jax.ops import regions
from tests.helpers.geo_places import EDGES, cells


def test_the_grid_is_the_equal_area_one():
    """65,536 m squares of X = R lon, Y = R sin lat, against the formula in float64, away from the edges."""
    rng = np.random.default_rng(0)
    lon, lat = np.float32(rng.uniform(-180, 180, 5000)), np.float32(np.degrees(np.arcsin(rng.uniform(-1, 1, 5000))))
    x, y = (regions.RADIUS * f / 65_536 for f in (np.radians(lon, dtype=float), np.sin(np.radians(lat, dtype=float))))
    inside = (np.abs(x - np.round(x)) > 1e-4) & (np.abs(y - np.round(y)) > 1e-4)
    ids, columns = cells(lon, lat), len(EDGES[0]) + 1
    np.testing.assert_array_equal((ids % columns)[inside], (np.floor(x) + columns // 2)[inside])
    np.testing.assert_array_equal((ids // columns)[inside], (np.floor(y) + (len(EDGES[1]) + 1) // 2)[inside])
    assert inside.mean() > 0.99 and ids.max() < columns * (len(EDGES[1]) + 1)


def test_poles_antimeridian_and_missing_locations():
    assert cells(180, 10) == cells(-180, 10) == cells(180 - 360, 10)
    assert cells(181, 10) == cells(-179, 10) and cells(359.9, 0) == cells(-0.1, 0)
    assert cells(179.99, 10) != cells(-179.99, 10)
    top = (len(EDGES[0]) + 1) * (len(EDGES[1]) + 1)
    assert cells(180 - 1e-3, 89.99) == top - 1 and cells(-180, -89.99) == 0
    for pole in (90, -90):
        same = cells([0, 90, -90, 180, -180, 12.3, 359], [pole] * 7)
        assert (same == same[0]).all() and same[0] != regions.NOWHERE
    lost = cells([np.nan, 3, np.inf, 3, 400, np.nan], [48, np.nan, 0, 90.1, 0, np.nan])
    assert (lost == regions.NOWHERE).all()


@settings(max_examples=60, deadline=None)
@example(places=[(0.0, -1.7159754487720623e-39)], seed=0)  # a subnormal number: 0 on a device
@given(
    st.lists(st.tuples(st.floats(-360, 360, width=32), st.floats(-90, 90, width=32)), min_size=1, max_size=20),
    st.integers(0, 2**31),
)
def test_numpy_and_the_device_agree_on_every_cell(places, seed):
    lon, lat = (np.array(x, np.float32) for x in zip(*places, strict=True))
    edge = np.random.default_rng(seed).choice(EDGES[0], len(lon))  # on an edge, and one step before it
    for east in (lon, edge, np.nextafter(edge, np.float32(-400))):
        host = regions.cell_ids(east, lat, *EDGES)
        device = jax.jit(regions.cell_ids)(jnp.asarray(east), jnp.asarray(lat), *map(jnp.asarray, EDGES))
        np.testing.assert_array_equal(host, device)


def test_table_of_the_occupied_cells_and_its_capacity():
    ids = cells([3, 3, 100, np.nan], [48, 48, -20, 0])
    table = regions.occupied(ids, 3)
    assert table.tolist() == [*np.unique(ids[:3]), regions.NOWHERE] and table.dtype == np.int32
    np.testing.assert_array_equal(regions.lookup(table, jnp.asarray(ids)), [1, 1, 0, regions.NOWHERE])
    for one in (*ids[:3], 0, (len(EDGES[0]) + 1) * (len(EDGES[1]) + 1) - 1):
        assert cells(*regions.cell_centre(one, *EDGES)) == one
    assert regions.lookup(table, jnp.asarray(cells(50, 50))) == regions.NOWHERE
    with pytest.raises(ValueError, match="2 cells.*geo_context.regions=1"):
        regions.occupied(ids, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 9), min_size=1, max_size=6), max_size=5), st.integers(1, 8), st.randoms())
def test_streaming_claims_in_order_and_never_moves_a_region(batches, capacity, random):
    table, known = regions.occupied(np.array([], np.int32), capacity), []
    for ids in batches:
        known += sorted(set(ids) - set(known) - {regions.NOWHERE})[: capacity - len(known)]
        random.shuffle(ids)
        table = np.asarray(regions.claim(jnp.asarray(table), jnp.asarray(ids, jnp.int32)))
        assert table.tolist() == known + [regions.NOWHERE] * (capacity - len(known))


def test_cells_that_share_regions_are_those_of_the_formula():
    """Region = (X // cell mod side) * side + (Y // cell mod side) in float64, X and Y from the grid's corner."""
    rng, side, metres = np.random.default_rng(0), 64, 65_536.0
    lon, lat = np.float32(rng.uniform(-180, 180, 2000)), np.float32(rng.uniform(-90, 90, 2000))
    angles = np.radians(np.float64(lon)), np.sin(np.radians(np.float64(lat)))
    x, y = (np.floor(regions.RADIUS * angle / metres) for angle in angles)
    corner = len(EDGES[0]) // 2 + 1, len(EDGES[1]) // 2 + 1
    wanted = (x + corner[0]) % side * side + (y + corner[1]) % side
    table = regions.shared(side, len(EDGES[0]) + 1)
    found = regions.lookup(table, jnp.asarray(regions.cell_ids(lon, lat, *EDGES, side)))
    np.testing.assert_array_equal(found, wanted)
    assert regions.is_shared(table) and len(np.unique(table)) == side * side == len(table)
    assert not regions.is_shared(np.int32([3, 9, 20, 25])) and not regions.is_shared(np.full(4, regions.NOWHERE))
    assert regions.lookup(table, jnp.asarray(regions.cell_ids(np.float32([np.nan]), lat[:1], *EDGES, side))) == -1
