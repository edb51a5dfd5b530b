"""The model with a prototype bank: what it asks its region, in JAX, in PyTorch and from partial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from skysense_jax import networks
from skysense_jax.convert import tensor_files, torch_export, verify
from skysense_jax.models.skysense import empty_bank, make_model, module_names, region_side, with_bank, without_bank
from skysense_jax.ops import prototypes, regions
from skysense_jax.run import imported
from tests.helpers import tiny_model as tiny
from tests.helpers.geo_places import EDGES, cells, np_unit

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
    for name, edges in zip(("lon_edges", "lat_edges"), module.edges, strict=True):
        np.testing.assert_array_equal(np.float32(edges), bank[name])
    features, place = rng.standard_normal((200, 1, 1, 8)), {"lon": torch.tensor(lon), "lat": torch.tensor(lat)}
    rows = np.asarray(regions.lookup(bank["cells"], jnp.asarray(ids)))
    wanted = np.stack([np_context(f, bank["prototypes"][row]) for f, row in zip(features, rows, strict=True)])
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
