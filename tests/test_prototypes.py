"""The prototype bank's update against a float64 numpy twin: on one device and eight, its monitors, shared regions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skysense_jax.core import mesh as meshes
from skysense_jax.ops import prototypes, regions
from tests.helpers.geo_places import np_unit
from tests.helpers.numpy_twins import np_sinkhorn


def test_a_bank_of_shared_regions_knows_every_cell_and_learns_from_all_that_share():
    _, place, features, mask = world(3)
    bank = prototypes.empty_bank(jax.random.key(0), 9, 5, 12, 500_000, 3)
    observed, _ = jax.jit(prototypes.observe, static_argnums=(4, 5, 6))(bank, place, features, mask, 0.05, 3, 3)
    new = prototypes.update(bank, observed, 0.9)
    ids = regions.cell_ids(place["lon"], place["lat"], bank["lon_edges"], bank["lat_edges"], 3)
    rows = np.asarray(regions.lookup(bank["cells"], jnp.asarray(ids)))
    assert ((rows < 0) == np.isnan(place["lon"])).all()
    apart = regions.cell_ids(place["lon"], place["lat"], bank["lon_edges"], bank["lat_edges"])
    assert len(np.unique(apart)) > len(np.unique(ids))  # some do share
    # As if every region were one far place of its own on a grid without sharing.
    where = np.array([regions.cell_centre(cell, bank["lon_edges"], bank["lat_edges"]) for cell in bank["cells"]])
    lon, lat = np.where(rows[:, None] < 0, np.nan, where[rows]).T
    wanted, usage, _ = np_update(jax.device_get(bank), np.float32(lon), np.float32(lat), features, mask, 0.05, 3, 0.9)
    assert relative(new["prototypes"], wanted) < 1e-6 and relative(new["usage"], usage) < 1e-6
    np.testing.assert_array_equal(new["cells"], bank["cells"])
    own, usable = prototypes.at_places(new, place, 3)
    np.testing.assert_array_equal(usable, (rows >= 0) & (np.asarray(new["visits"])[rows] > 0))
    np.testing.assert_array_equal(own[usable], np.asarray(new["prototypes"])[rows[usable]])
    with pytest.raises(ValueError, match="64 rows of shared regions, a grid of 1e.06 m has 14"):
        prototypes.empty_bank(jax.random.key(0), 4096, 2, 4, 1e6, 64)


def np_update(bank, lon, lat, features, mask, epsilon, iterations, momentum):
    """Float64, one view at a time, the table a dictionary: nothing shared with the implementation."""
    ids = regions.cell_ids(lon, lat, bank["lon_edges"], bank["lat_edges"]).tolist()
    rows = {cell: row for row, cell in enumerate(bank["cells"].tolist()) if cell != regions.NOWHERE}
    for cell in sorted(set(ids) - set(rows) - {regions.NOWHERE})[: len(bank["cells"]) - len(rows)]:
        rows[cell] = len(rows)
    new, usage = np.array(bank["prototypes"], np.float64), np.array(bank["usage"], np.float64)
    for cell, row in rows.items():
        means, shares = [], []
        for place in (i for i, one in enumerate(ids) if one == cell):
            for f, valid in zip(np_unit(features[place]), mask[place] > 0, strict=True):
                if valid.any():
                    cosine = f @ np_unit(bank["prototypes"][row]).T
                    s = np_sinkhorn(cosine / epsilon, iterations, valid)
                    means.append((s / s.sum(0)).T @ f)
                    nearest = np.bincount(cosine[valid].argmax(1), minlength=new.shape[1])
                    shares.append(nearest / valid.sum())
        if means:
            new[row] = momentum * new[row] + (1 - momentum) * np.mean(means, axis=0)
            usage[row] = momentum * usage[row] + (1 - momentum) * np.mean(shares, axis=0)
    return new, usage, rows


def world(seed, places=16, views=2, n=9, width=12, count=6, own=5):
    """A bank of `count` regions, two of them known, and a batch with places in about six cells, some nowhere."""
    rng = np.random.default_rng(seed)
    bank = prototypes.empty_bank(jax.random.key(seed), count, own, width, 500_000)
    lon = np.float32(rng.choice([3.0, 20.0, 100.0, -60.0, 179.9, np.nan, 50.0, -100.0], places))
    lat = np.float32(rng.choice([10.0, -30.0], places))
    table = regions.occupied(regions.cell_ids(lon[:2], lat[:2], *regions.grid_edges(500_000)), count)
    mask = (rng.random((places, views, n)) < 0.7) & (rng.random((places, views, 1)) < 0.9)
    features = rng.standard_normal((places, views, n, width)).astype(np.float32)
    return {**bank, "cells": jnp.asarray(table)}, {"lon": lon, "lat": lat}, features, mask.astype(np.float32)


def step(bank, place, features, mask, momentum=0.9):
    observed, monitors = prototypes.observe(bank, place, features, mask, 0.05, 3)
    return prototypes.update(bank, observed, momentum), monitors


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31))
def test_update_is_the_twin_in_any_order_and_leaves_the_others_alone(seed):
    bank, place, features, mask = world(seed)
    new, monitors = jax.jit(step)(bank, place, features, mask)
    wanted, usage, rows = np_update(jax.device_get(bank), place["lon"], place["lat"], features, mask, 0.05, 3, 0.9)
    assert relative(new["prototypes"], wanted) < 1e-6 and relative(new["usage"], usage) < 1e-6
    assert new["cells"].tolist() == [*rows, *[regions.NOWHERE] * (6 - len(rows))]
    same = (wanted == np.asarray(bank["prototypes"], np.float64)).all((1, 2))
    np.testing.assert_array_equal(new["prototypes"][same], bank["prototypes"][same])  # not in the batch: every bit
    np.testing.assert_array_equal(new["visits"], ~same)

    order = np.random.default_rng(seed).permutation(len(features))
    turned, others = jax.jit(step)(bank, {k: v[order] for k, v in place.items()}, features[order], mask[order])
    assert relative(turned["prototypes"], np.asarray(new["prototypes"])) < 1e-6
    assert turned["cells"].tolist() == new["cells"].tolist()
    assert all(np.isfinite(value) and abs(value - others[name]) < 1e-5 for name, value in monitors.items())


def test_one_device_and_eight_give_the_same_bank():
    """The batch split over eight devices, the bank's regions over eight: what training does."""
    bank, place, features, mask = world(3, count=8)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8})
    batch = meshes.batch_sharding(mesh)
    split = {
        **jax.device_put(bank, meshes.replicated(mesh)),
        "prototypes": jax.device_put(bank["prototypes"], jax.NamedSharding(mesh, jax.P("fsdp"))),
    }
    one, _ = jax.jit(step)(bank, place, features, mask)
    eight, _ = jax.jit(step)(split, *jax.device_put((place, features, mask), batch))
    for name in one:
        assert relative(eight[name], np.asarray(one[name])) < 1e-6, name
    assert len(place["lon"]) > jnp.sum(one["visits"]) > 3


def test_nothing_valid_changes_nothing():
    bank, place, features, mask = world(0)
    for lost, seen in (({"lon": place["lon"] * np.nan, "lat": place["lat"]}, mask), (place, mask * 0)):
        new, monitors = jax.jit(step)(bank, lost, features, seen)
        for name in set(bank) - {"cells"}:
            np.testing.assert_array_equal(new[name], bank[name])
        assert monitors["fit"] == 0 and all(np.isfinite(value) for value in monitors.values())


def test_monitors_tell_collapse_and_death():
    bank, place, features, mask = world(1)
    place = {"lon": np.full(16, 3, np.float32), "lat": np.full(16, 10, np.float32)}
    near = np.zeros_like(features) + np.asarray(bank["prototypes"])[0, 0]
    bank["cells"] = jnp.asarray(regions.occupied(np.array([], np.int32), 6))
    for _ in range(40):
        bank, monitors = jax.jit(step)(bank, place, near, mask * 0 + 1)
    assert monitors["similarity"] > 0.9 and monitors["dead"] >= 0.6 and monitors["located"] == 1
    bank, place, features, mask = world(1)
    _, healthy = step(bank, place, features, mask)
    assert abs(healthy["similarity"]) < 0.3 and healthy["dead"] == 0 and healthy["located"] < 1
    assert monitors["directions"] < 1.2 / bank["prototypes"].shape[1] < 0.5 < healthy["directions"]


def test_directions_see_groups_that_the_mean_cosine_does_not():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    grouped = basis[[0, 0, 1, 1]] * np.array([1, -1, 1, -1])[:, None]
    assert abs((grouped @ grouped.T).sum()) < 1e-12
    found = prototypes.directions(jnp.stack([basis[[0, 1, 2, 3]], basis[[0, 0, 0, 0]], grouped]))
    np.testing.assert_allclose(found, [4, 1, 2], rtol=1e-6)


def test_the_monitor_of_directions_is_their_share_of_the_prototypes():
    bank, place, features, mask = world(1)
    count, width = bank["prototypes"].shape[1:]
    pairs = np.repeat(np.eye(2, width, dtype=np.float32), -(-count // 2), 0)[:count]
    bank["prototypes"] = jnp.asarray(np.broadcast_to(pairs, bank["prototypes"].shape))
    _, monitors = step(bank, place, features, mask)
    np.testing.assert_allclose(monitors["directions"], prototypes.directions(pairs) / count, rtol=1e-6)
    assert monitors["directions"] * count < 2.01


def test_a_region_without_a_visit_gives_no_context():
    bank, place, features, mask = world(2)
    _, usable = prototypes.at_places(bank, place)
    assert not usable.any()
    new, _ = step(bank, place, features, mask)
    own, usable = prototypes.at_places(new, place)
    ids = regions.cell_ids(place["lon"], place["lat"], *regions.grid_edges(500_000))
    known = np.isin(ids, new["cells"][np.asarray(new["visits"]) > 0]) & (ids != regions.NOWHERE)
    np.testing.assert_array_equal(usable, known)
    assert 0 < known.sum() < len(known) and own.shape == (16, 5, 12)
