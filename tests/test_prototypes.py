"""Regions and the prototype bank: the grid, the table, the update against a float64 numpy twin, one device and
eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skysense_jax import networks, recipes, sensors
from skysense_jax.configs import skysense_tiny
from skysense_jax.convert import tensor_files, torch_export, verify
from skysense_jax.core import flops, rngs
from skysense_jax.core import mesh as meshes
from skysense_jax.data import records
from skysense_jax.models.skysense import empty_bank, make_model, module_names, region_side, with_bank, without_bank
from skysense_jax.objectives import flops as objective_flops
from skysense_jax.objectives.skysense import make_objective
from skysense_jax.ops import prototypes, regions
from skysense_jax.run import checkpoint, imported, init_from, optim, state
from skysense_jax.run import plan as plans
from skysense_jax.run import start as starts
from skysense_jax.run import step as run_step
from tests.helpers import noise_dataset as tiny_data
from tests.helpers import objective_case, toy_objective
from tests.helpers import tiny_model as tiny
from tests.test_ops import np_sinkhorn

BANK = ("prototypes", "usage", "visits", "cells", "lon_edges", "lat_edges")
EDGES = regions.grid_edges(65_536)


def cells(lon, lat):
    return regions.cell_ids(np.float32(np.atleast_1d(lon)), np.float32(np.atleast_1d(lat)), *EDGES)


# -------------------------------------------------------------------------------- regions
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
    lon, lat = (np.array(x, np.float32) for x in zip(*places))
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


# -------------------------------------------------------------------------------- update
def np_unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


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
            for f, valid in zip(np_unit(features[place]), mask[place] > 0):
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


# -------------------------------------------------------------------------------- the model with a bank
BANDS = {"s2": ("B02", "B03", "B08"), "s1": ("VV", "VH")}
CONTRACT = tiny.contract(BANDS)
LON, LAT = np.float32([3.0, np.nan]), np.float32([48.0, 48.0])


def geo_model(width=12, regions_=3, seed=0, table="stream"):
    """A tiny model of two time series, its parameters, and a bank that knows the cell of the first place."""
    cfg = tiny.config(
        geo_context={
            "bank": "on",
            "regions": regions_,
            "prototypes": 4,
            "width": width,
            "cell": 65_536.0,
            "table": table,
        }
    )
    bank = jax.device_get(empty_bank(cfg, jax.random.key(seed)))
    if table == "stream":
        bank["cells"] = regions.occupied(cells(LON[:1], LAT[:1]), regions_)
    here = regions.cell_ids(LON[:1], LAT[:1], *EDGES, region_side(cfg.geo_context))
    bank["visits"] = 5 * (bank["cells"] == here).astype(np.int32)
    return cfg, with_bank(tiny.params(cfg, CONTRACT, seed), bank)


def np_context(query, own):
    logits = np.sqrt(query.shape[-1]) * np_unit(query) @ np_unit(own).T
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ np_unit(own) * np.sqrt(query.shape[-1])


@pytest.mark.parametrize("width", [12, 8])  # 8 is the fusion's: no projection
def test_fused_features_ask_their_region(width):
    cfg, params = geo_model(width)
    inputs = tiny.inputs(CONTRACT)
    plain = make_model(without_bank(cfg, CONTRACT), CONTRACT).apply(with_bank(params, None), inputs)["fused"]
    model = make_model(cfg, CONTRACT)
    fused = model.apply(params, {**inputs, "place": {"lon": LON, "lat": LAT}})["fused"]
    np.testing.assert_array_equal(fused[..., :8], plain)
    query = plain[0] @ params["geo"]["query"]["kernel"] + params["geo"]["query"]["bias"] if width != 8 else plain[0]
    wanted = np_context(np.asarray(query, np.float64), params["geo"]["bank"]["prototypes"][0])
    np.testing.assert_allclose(fused[0, ..., 8:], wanted, rtol=1e-4, atol=1e-4)
    assert (fused[1, ..., 8:] == 0).all() and fused.shape[-1] == 8 + width  # nobody knows where it is
    for without in (model.apply(params, inputs), model.apply(with_bank(params, None), {**inputs, "place": {}})):
        assert (without["fused"][..., 8:] == 0).all() and without["fused"].shape == fused.shape
    with pytest.raises(ValueError, match="one location per place"):
        model.apply(params, {**inputs, "place": {"lon": LON[:1], "lat": LAT[:1]}})
    with pytest.raises(ValueError, match="prototypes of width 12.*geo_context.width is 9"):
        wrong = tiny.config(geo_context=cfg.geo_context.to_dict() | {"width": 9})
        make_model(wrong, CONTRACT).apply(geo_model(12)[1], {**inputs, "place": {"lon": LON, "lat": LAT}})


def test_modules_with_and_without_geo():
    cfg, _ = geo_model()
    assert module_names(cfg, CONTRACT)[-2:] == ("fusion", "geo")
    assert module_names(without_bank(cfg, CONTRACT), CONTRACT)[-1] == "fusion"
    geo = cfg.geo_context.to_dict()
    for change, words in (
        ({"modules": ("s2", "s1", "geo")}, "lacks.*head_s2.*geo needs the fusion"),
        ({"geo_context": geo | {"bank": "off"}}, "bank must be one of"),
        ({"geo_context": geo | {"table": "hash"}}, "table must be one of"),
        ({"geo_context": geo | {"table": "hashed"}}, "regions=3: table='hashed' needs a square"),
        ({"geo_context": geo | {"prototypes": 1}}, "regions of 1 prototypes"),
        ({"geo_context": geo | {"width": 0}}, "prototypes of width 0; at least"),
    ):
        with pytest.raises(ValueError, match=words):
            module_names(tiny.config(**{"geo_context": geo, **change}), CONTRACT)


@pytest.mark.parametrize("width, per_module, table", [(12, True, "stream"), (8, False, "hashed")])
def test_the_bank_goes_to_pytorch_and_back(width, per_module, table, tmp_path):
    cfg, params = geo_model(width, 9 if table == "hashed" else 3, table=table)
    out = torch_export.export(params, CONTRACT, cfg, tmp_path / "out", {}, per_module)
    network = networks.open_network(out)
    assert jax.tree.structure(network.encoder) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, network.encoder, params)
    assert network.encoder["geo"]["bank"]["cells"].dtype == np.int32
    frozen = safetensors.numpy.load_file(out / "parity.safetensors")
    assert np.abs(frozen["output.fused"][0, 8:]).min() > 0 and (frozen["output.fused"][1, 8:] == 0).all()
    assert max(verify.in_jax(out).values()) == 0

    bare = networks.open_network(out, "none")
    assert [one.description.model.geo_context.bank for one in (network, bare)] == ["frozen", "none"]
    mild = {name: 0.7 * np.float32(rule["mean"]) for name, rule in CONTRACT["sensors"].items()}
    given = {
        name: {"image": mild[name] + 0.3 * one["image"][0], "dates": one["dates"][0]}
        for name, one in tiny.inputs(CONTRACT).items()
    }
    assert networks.load(out, "none").features(given)["pixel"].shape[-1] == 8 and "geo" not in bare.encoder
    with pytest.raises(ValueError, match="uses geo-context: give"):
        networks.load(out).features(given)
    for wrong, words in (
        ({"lon": 3.0}, "give .*lat"),
        ({"lon": [3.0, 4.0], "lat": [48.0, 48.0]}, "lon has shape"),
        ({"lon": 48.0, "lat": 103.0}, "lat must lie within -90..90"),
        ({"lon": np.inf, "lat": 3.0}, "lon must lie within -360..360"),
    ):
        with pytest.raises(ValueError, match=f"place: {words}"):
            networks.load(out).features({**given, "place": wrong})
    here = networks.load(out).features({**given, "place": {"lon": 3.0, "lat": 48.0}})["pixel"]
    assert here.shape[-1] == 8 + width and np.abs(here[..., 8:]).max() > 0

    other = geo_model(width, regions_=7, seed=5)
    torch_export.export(other[1], CONTRACT, other[0], tmp_path / "other", {})
    swapped = networks.open_network(out, tmp_path / "other")
    np.testing.assert_array_equal(swapped.encoder["geo"]["bank"]["prototypes"], other[1]["geo"]["bank"]["prototypes"])
    again = torch_export.export(swapped.encoder, CONTRACT, swapped.description.model, tmp_path / "again", {})
    if not tensor_files.torch_is_there():
        pytest.skip("needs torch (the extra `torch`): the exported folders are run by plain PyTorch")
    for folder in (out, tmp_path / "other", again):
        assert max(verify.in_torch(folder).values()) <= 3e-5


@pytest.mark.parametrize("side, table", [(65_536.0, "stream"), (1e6, "places"), (12_345.6, "stream"), (1e6, "hashed")])
def test_plain_torch_finds_the_same_region_in_every_precision(side, table):
    torch = pytest.importorskip("torch", reason="needs torch (the extra `torch`): the modelling file is plain PyTorch")
    from skysense_jax.convert import modeling_skysense

    rng, count = np.random.default_rng(0), 100 if table == "hashed" else 200
    lon, lat = np.float32(rng.uniform(-200, 200, 200)), np.float32(rng.uniform(-90, 90, 200))
    lon[:8], lat[:8] = [0, 90, -180, 180, 179.99999, np.nan, 3, 10], [90, 90, -90, 0, 0, 3, 90.5, -1e-39]
    shared = 10 if table == "hashed" else regions.ALONE
    bank = jax.device_get(prototypes.empty_bank(jax.random.key(0), count, 3, 8, side, shared))
    lon[8:60] = np.resize(bank["lon_edges"], 52)  # on an edge
    ids = regions.cell_ids(lon, lat, bank["lon_edges"], bank["lat_edges"], shared)
    bank |= {
        "cells": bank["cells"] if table == "hashed" else regions.occupied(ids, count),
        "visits": np.ones(count, np.int32),
    }
    module = modeling_skysense.GeoContext(
        8, {"regions": count, "prototypes": 3, "width": 8, "cell": side, "table": table}
    )
    module.load_state_dict({name: torch.tensor(leaf) for name, leaf in bank.items()})
    for name, edges in zip(("lon_edges", "lat_edges"), module.edges):
        np.testing.assert_array_equal(np.float32(edges), bank[name])
    features, place = rng.standard_normal((200, 1, 1, 8)), {"lon": torch.tensor(lon), "lat": torch.tensor(lat)}
    rows = np.asarray(regions.lookup(bank["cells"], jnp.asarray(ids)))
    wanted = np.stack([np_context(f, bank["prototypes"][row]) for f, row in zip(features, rows)])
    wanted[rows < 0] = 0
    assert (rows < 0).sum() == 2
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        found = module.to(dtype)(torch.tensor(features, dtype=dtype), place).detach().float().numpy()
        assert np.abs(found - wanted).max() < most, dtype
    with pytest.raises(ValueError, match=r"lon and lat \[200\] in degrees"):
        module(torch.tensor(features, dtype=torch.float16), {"lon": place["lon"][:1], "lat": place["lat"][:1]})


def test_partial_weights_with_and_without_the_bank(tmp_path):
    cfg, params = geo_model(12)
    out = torch_export.export(params, CONTRACT, cfg, tmp_path / "out", {}, per_module=True)
    files = {path.stem.removeprefix("skysense_model_"): str(path) for path in out.glob("skysense_model_*")}
    plain = tiny.config(geo_context=cfg.geo_context.to_dict() | {"bank": "none", "regions": 1})
    imported.import_files(list(files.values()), plain, BANDS, tmp_path / "all")
    jax.tree.map(np.testing.assert_array_equal, networks.open_network(tmp_path / "all").encoder, params)
    some = [path for name, path in files.items() if name != "glbank"]
    imported.import_files(some, cfg, BANDS, tmp_path / "plain")
    without = networks.open_network(tmp_path / "plain")
    assert "geo" not in without.encoder and without.description.model.geo_context.bank == "none"
    out = torch_export.export(without.encoder, CONTRACT, without.description.model, tmp_path / "out2", {})
    assert max(verify.in_jax(out).values()) == 0
    narrow = geo_model(8)
    torch_export.export(narrow[1], CONTRACT, narrow[0], tmp_path / "narrow", {})
    with pytest.raises(ValueError, match="narrow has prototypes of width 8, this network needs 12"):
        networks.open_network(tmp_path / "all", tmp_path / "narrow")
    with pytest.raises(ValueError, match="plain has no prototype bank: its model has no geo-context"):
        networks.open_network(tmp_path / "all", tmp_path / "plain")
    near = tiny.config(geo_context=cfg.geo_context.to_dict() | {"cell": 65_537.0})  # as many edges
    with pytest.raises(ValueError, match=r"lon_edges.*model.geo_context.cell=65537 metres"):
        imported.import_files(list(files.values()), near, BANDS, tmp_path / "near")
    with pytest.raises(ValueError, match="geo needs the fusion"):
        imported.import_files([files["glbank"], files["backbone_s2"]], cfg, BANDS, tmp_path / "bad")


# -------------------------------------------------------------------------------- pretraining
def test_flops_with_a_bank_are_the_products_of_the_traced_step():
    c = objective_case.tiny()
    c.model.geo_context.update({"bank": "on", "regions": 4, "prototypes": 200, "width": 64})
    contract = objective_case.contract_of(c)
    objective = make_objective(c, contract)

    def made():
        batch = objective_case.make_batch(c, contract, places=2)
        return batch | {"place": {"lon": np.zeros(2, np.float32), "lat": np.zeros(2, np.float32)}}

    batch = jax.eval_shape(made)
    values = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
    schedule = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in objective.schedule_keys}
    keys = jax.eval_shape(lambda: rngs.keys(0, objective.streams, 0))
    traced = jax.make_jaxpr(jax.value_and_grad(objective.loss, has_aux=True))(*values, batch, keys, schedule)
    parts = objective_flops.skysense_parts(c, contract, batch)
    assert abs(objective.flops(batch) / flops.of_jaxpr(traced.jaxpr) - 1) < 0.02, parts
    assert parts["geo"] > 0.05 * objective.flops(batch)  # enough of it to be missed


@pytest.mark.parametrize("field, value", [("sinkhorn_eps", 0.0), ("prototype_momentum", 1.0)])
def test_an_update_that_means_nothing_is_refused(field, value):
    c = objective_case.tiny()
    c.model.geo_context.bank, c.objective[field] = "on", value
    with pytest.raises(ValueError, match=f"objective.{field}={value}"):
        make_objective(c, objective_case.contract_of(c))


def test_a_step_moves_the_bank_and_one_that_is_not_finite_does_not():
    """The real objective and step, batch and bank split over eight devices."""
    c = skysense_tiny.get_config("series")
    c.data.batch, c.data.n_local, c.schedule.warmup_steps = 8, 0, 0
    c.model.geo_context.update({"bank": "on", "regions": 32, "prototypes": 4, "width": 16})
    recipes.check_config(c)
    contract = sensors.input_contract(c.data.bands.to_dict(), c.model.ratio)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8})
    objective = make_objective(c, contract)
    shapes = state.batch_shapes(recipes.recipe_of(c).batch_spec(c, contract), mesh)
    placed = state.state_shapes(objective, shapes, 0, mesh, small=256)
    assert placed.memory["bank"]["prototypes"].sharding.spec == jax.P("fsdp")
    assert placed.params["encoder"]["geo"].keys() == placed.teacher["encoder"]["geo"].keys() == {"query"}
    now = state.create(objective, shapes, 0, placed)
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    for sensor in batch["global"]["sensors"].values():
        sensor.update({key: np.ones_like(sensor[key]) for key in ("valid", "bands")})
    batch["place"] |= {"lon": np.float32([3, 3, 3, 40, 40, np.nan, 90, 90]), "lat": np.full(8, 48, np.float32)}
    advance = jax.jit(
        run_step.make_step(objective, c, optim.decay_mask(placed.params)),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, placed), meshes.replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        first, seen = advance(now, batch)
        second, later = advance(first, batch)
        batch["global"]["sensors"]["s2"]["image"][0, 0, 0, 0, 0, 0] = np.nan
        third, lost = advance(second, batch)
    bank = {name: [np.asarray(one.memory["bank"][name]) for one in (now, first, second, third)] for name in BANK}
    assert [seen["geo/located"], seen["geo/regions"], later["geo/regions"]] == [7 / 8, 0, 3 / 32]
    assert [visits.tolist() for visits in bank["visits"][:3]] == [[n] * 3 + [0] * 29 for n in (0, 1, 2)]
    assert all((bank["prototypes"][1] != bank["prototypes"][0]).any((1, 2)) == (bank["visits"][1] > 0))
    assert later["geo/fit"] > seen["geo/fit"] and lost["finite"] == 0
    for name in BANK:
        assert bank[name][3].tobytes() == bank[name][2].tobytes(), name
    kernels = [np.asarray(one.params["encoder"]["geo"]["query"]["kernel"]) for one in (first, second)]
    assert np.abs(kernels[1] - kernels[0]).max() > 1e-4  # asked from the second step on: no region was visited before


def test_the_table_of_a_fresh_bank_holds_the_training_places(tmp_path):
    dataset = tiny_data.write_dataset(tmp_path / "data", places=4)
    lon, lat = records.locations(dataset, "train")
    assert lon.tolist() == [3, 4, 5, 6] and lat.dtype == np.float32 and (lat == 48).all()
    c = skysense_tiny.get_config("series")
    c.data.dir, c.model.geo_context.cell = dataset, 65_536.0
    bank = prototypes.empty_bank(jax.random.key(0), c.model.geo_context.regions, 4, 8, 65_536.0)
    filled = init_from.with_regions(c, state.TrainState(0, {}, {}, {}, {"bank": bank}, 0)).memory["bank"]["cells"]
    assert filled[:4].tolist() == np.unique(cells(lon, lat)).tolist() and (filled[4:] == regions.NOWHERE).all()
    c.model.geo_context.regions = 3
    with pytest.raises(ValueError, match="4 cells of the grid, model.geo_context.regions=3"):
        init_from.with_regions(c, state.TrainState(0, {}, {}, {}, {"bank": bank}, 0))


def test_a_second_stage_starts_from_a_run_without_a_bank(tmp_path):
    def made(seed, width, **memory):
        rng = np.random.default_rng(seed)
        leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        params = {"encoder": {"s2": {"kernel": leaf(3, 3)}}, "heads": {"fused": {"mlp0": {"kernel": leaf(width, 5)}}}}
        return state.TrainState(
            jnp.int32(seed),
            params,
            optim.init(params),
            jax.tree.map(lambda x: x + 1, params),
            {"centre": {"s2": leaf(4)}, **memory},
            jnp.int32(0),
        )

    old = made(7, 4, unused=jnp.zeros(2))
    saver = checkpoint.Saver(tmp_path, keep=1)
    saver.save(old, {}, {"config": {}, "contract": {"ratio": 4, "sensors": {}}})
    saver.wait()
    fresh = made(0, 6, bank={"visits": jnp.zeros(3, jnp.int32)})
    fresh.params["encoder"]["geo"] = {"query": {"kernel": jnp.ones((2, 2))}}
    begun, report = init_from.init_from(tmp_path, fresh, {"ratio": 4, "sensors": {}})
    assert report["new"] == ["params/encoder/geo/query/kernel", "memory/bank/visits"]
    assert report["left"] == ["memory/unused"] and begun.step == 0
    assert report["widened"] == [f"{part}/heads/fused/mlp0/kernel" for part in ("params", "teacher")]
    widened = begun.params["heads"]["fused"]["mlp0"]["kernel"]
    np.testing.assert_array_equal(widened[:4], old.params["heads"]["fused"]["mlp0"]["kernel"])
    assert widened.shape == (6, 5) and (widened[4:] == 0).all()  # the head begins where it stood
    np.testing.assert_array_equal(begun.teacher["encoder"]["s2"]["kernel"], old.teacher["encoder"]["s2"]["kernel"])
    np.testing.assert_array_equal(begun.memory["centre"]["s2"], old.memory["centre"]["s2"])
    assert (begun.params["encoder"]["geo"]["query"]["kernel"] == 1).all()
    with pytest.raises(ValueError, match="input contract"):
        init_from.init_from(tmp_path, fresh, {"ratio": 8, "sensors": {}})
    for number, side in enumerate((65_536.0, 65_537.0)):  # as many edges, and others
        bank = prototypes.empty_bank(jax.random.key(0), 2, 2, 4, side)
        other = made(0, 6, bank=bank)
        if number == 0:
            saver = checkpoint.Saver(tmp_path / "bank", keep=1)
            saver.save(other, {}, {"config": {}, "contract": {"ratio": 4, "sensors": {}}})
            saver.wait()
            init_from.init_from(tmp_path / "bank", other, {"ratio": 4, "sensors": {}})
            continue
        with pytest.raises(ValueError, match="another grid than this run's .*_edges.*geo_context.cell"):
            init_from.init_from(tmp_path / "bank", other, {"ratio": 4, "sensors": {}})
    hashed = made(0, 6, bank=prototypes.empty_bank(jax.random.key(0), 4, 2, 4, 65_536.0, 2))
    saver = checkpoint.Saver(tmp_path / "hashed", keep=1)
    saver.save(hashed, {}, {"config": {}, "contract": {"ratio": 4, "sensors": {}}})
    saver.wait()
    with pytest.raises(ValueError, match="one has config.model.geo_context.table='hashed'"):
        init_from.init_from(
            tmp_path / "hashed",
            made(0, 6, bank=prototypes.empty_bank(jax.random.key(0), 4, 2, 4, 65_536.0)),
            {"ratio": 4, "sensors": {}},
        )
    fresh.params["encoder"]["s2"]["kernel"] = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match=r"params/encoder/s2/kernel is float32\[3, 3\] there, float32\[3, 4\] here"):
        init_from.init_from(tmp_path, fresh, {"ratio": 4, "sensors": {}})


def test_a_frozen_bank_has_learnt_something(tmp_path):
    """Where a run begins, with the objective of the tests beside a bank."""
    c = toy_objective.config("unread")
    c.model.geo_context.bank = "frozen"
    contract = sensors.input_contract(c.data.bands.to_dict(), c.model.ratio)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8})
    plain = toy_objective.make_objective(c, contract)

    def init(rng, spec):
        params, teacher, memory = plain.init(rng, spec)
        return params, teacher, {**memory, "bank": prototypes.empty_bank(rng, 2, 2, 4, 65_536.0)}

    geo = plain._replace(init=init, rules=(*plain.rules, ("memory/bank/.+", "replicate")))
    batch = state.batch_shapes(recipes.recipe_of(c).batch_spec(c, contract), mesh)
    plan = plans.Plan(contract, {}, geo, state.state_shapes(geo, batch, 0, mesh), batch, lambda: None, 0.0)
    now = state.create(geo, batch, 1, plan.state)
    bank = now.memory["bank"]
    learnt = {**bank, "visits": bank["visits"].at[1].set(3)}
    for name, memory in (
        ("plain", {"centre": now.memory["centre"]}),
        ("fresh", now.memory),
        ("learnt", {**now.memory, "bank": learnt}),
    ):
        saver = checkpoint.Saver(tmp_path / name, keep=1)
        saver.save(now._replace(memory=memory), {}, {"config": {}, "contract": contract})
        saver.close()

    def start(given):
        return starts.where_to_start(c, tmp_path / "new", plan, {"dataset_id": "", "code": {}}, given)

    for begin, words in (
        (None, "nothing has learnt; start from"),
        (tmp_path / "plain", "plain holds no bank"),
        (tmp_path / "fresh", "fresh holds no bank"),
    ):
        with pytest.raises(ValueError, match=f"bank='frozen'.*{words}"):
            start(begin)
    for name, leaf in start(tmp_path / "learnt").state.memory["bank"].items():
        np.testing.assert_array_equal(leaf, learnt[name])
