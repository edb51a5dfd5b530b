"""`skysense-jax prototypes`: the report of a region and the maps of its places, against the same worked out by hand."""

import argparse
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio import warp
from rasterio.crs import CRS

from skysense_jax import cli, evaluation, networks, recipes, sensors
from skysense_jax.core.config import read_config
from skysense_jax.data import records
from skysense_jax.data.batches import spec, whole_places
from skysense_jax.draw import prototype_map
from skysense_jax.evals import assignment, region
from skysense_jax.objectives.skysense import make_objective
from skysense_jax.ops import regions
from skysense_jax.ops.prototypes import NO_PROTOTYPE, empty_bank
from skysense_jax.run import checkpoint, state
from tests.helpers import noise_dataset

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "skysense_tiny.py"
CELL, COUNT = 1e6, 4
WKT = CRS.from_proj4("+proj=laea +lat_0=47.3 +lon_0=4.7 +x_0=1000 +y_0=-500 +datum=WGS84 +units=m").to_wkt()
WHERE = {"train": [(3.0, 48.0), (4.0, 47.0), (5.0, 46.0), (-60.5, -20.0)], "test": [(4.5, 47.5), (-61.0, -21.0)]}


def record(number, lon, lat):
    """A place of noise where it says it is, classes in all cells but one; nothing was measured in its lower left."""
    made = noise_dataset.record(number)
    crs = "EPSG:32631" if number % 2 == 0 else WKT
    (x,), (y,) = warp.transform("EPSG:4326", CRS.from_user_input(crs), [lon], [lat])
    x, y = 10 * round(x / 10), 10 * round(y / 10)
    classes = np.random.default_rng(number).integers(0, 3, (noise_dataset.TILE, noise_dataset.TILE)).astype(np.uint8)
    classes[0, 0] = sensors.UNLABELLED
    made.update(
        {
            "lon": lon,
            "lat": lat,
            "crs": crs,
            "label": np.zeros(1, np.uint8),
            "label_map": classes,
            "footprint": np.array([x - 40, y - 40, x + 40, y + 40], float),
        }
    )
    for name in noise_dataset.DATES:
        cells = made[f"{name}_valid"].shape[1] // noise_dataset.TILE
        made[f"{name}_valid"][:, -2 * cells :, : 2 * cells] = 0
    return made


def write_dataset(folder, relabel=None):
    """relabel: place name -> its label map."""
    made = {
        split: [record(100 * (split == "test") + k, *one) for k, one in enumerate(places)]
        for split, places in WHERE.items()
    }
    for one in itertools.chain(*made.values()):
        if relabel:
            one["label_map"] = relabel[one["place"]]
    meta = {
        "format": 1,
        "tile": noise_dataset.TILE,
        "ratio": noise_dataset.RATIO,
        "gsd": 10.0,
        "sensors": list(noise_dataset.DATES),
        "label_classes": [],
        "label_map_classes": {"0": "water", "1": "trees", "2": "crops"},
        "synthetic": True,
        "dataset_id": "regions",
    }
    return noise_dataset.write_records(
        folder,
        records.record_features(tuple(noise_dataset.DATES), noise_dataset.TILE, noise_dataset.RATIO, 1),
        made,
        meta,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint of fresh weights (series) whose bank has visited two of its three regions, its dataset."""
    root = tmp_path_factory.mktemp("prototypes")
    cfg = read_config(str(CONFIG))
    del cfg.data.bands.hr, cfg.data.dates.hr, cfg.data.eval_dates.hr, cfg.model.hr
    cfg.data.dir, cfg.eval.batch = write_dataset(root / "data"), 3
    cfg.model.geo_context.update({"bank": "on", "regions": 5, "prototypes": COUNT, "width": 16, "cell": CELL})
    contract = sensors.input_contract(cfg.data.bands.to_dict(), cfg.model.ratio)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        recipes.recipe_of(cfg).batch_spec(cfg, contract),
        is_leaf=lambda node: isinstance(node, spec.Leaf),
    )
    made = jax.jit(lambda: state.init_state(make_objective(cfg, contract), shapes, 1))()
    ids = regions.cell_ids(np.float32([4, 100, -60]), np.float32([47, 60, -20]), *regions.grid_edges(CELL))
    bank = dict(made.memory["bank"])
    bank["cells"] = bank["cells"].at[np.array([2, 0, 4])].set(ids)
    bank["visits"] = bank["visits"].at[np.array([2, 4])].set(np.array([7, 1]))
    bank["usage"] = bank["usage"].at[2].set(np.array([0.5, 0.25, 0.25, 0]))
    # Mean features of the region tell nothing apart: prototypes are the features of some of its cells.
    made = made._replace(memory={**made.memory, "bank": bank})
    save(root / "first", made, cfg, contract)
    network = networks.open_network(root / "first")
    seen = evaluation.places_in_region(network, bank, evaluation.settings(network.description, None, cfg.data.dir), 2)
    picked = seen.features[[0, 1, 2, 3], [3, 17, 30, 44]]
    bank["prototypes"] = bank["prototypes"].at[2].set(3 * picked)  # their length means nothing
    save(root / "run", made._replace(memory={**made.memory, "bank": bank}), cfg, contract)
    return root


def save(folder, made, cfg, contract):
    saver = checkpoint.Saver(folder, keep=1)
    saver.save(
        made,
        {"step": 0},
        {"config": json.loads(cfg.to_json()), "contract": contract, "dataset_id": "regions", "code": {"jax": "x"}},
    )
    saver.close()


def command(root, *words):
    assert cli.main(["prototypes", str(root / "run"), *map(str, words)]) == 0


@pytest.fixture(scope="module")
def mapped(root):
    """The folder of the maps of two places, one in a CRS that is only a WKT."""
    for place in ("place-0", "place-1"):
        command(root, "--data", root / "data", "--map", place, "--out", root / "maps")
    return root / "maps"


@pytest.fixture(scope="module")
def by_hand(root):
    """{name: (lon, lat, cosine [64, P] float64, valid [64], label [64])} of the region's places."""
    network = networks.open_network(root / "run")
    cfg = evaluation.settings(network.description, None, str(root / "data"))
    geo, found = network.encoder["geo"], {}
    own = np.asarray(geo["bank"]["prototypes"][2], np.float64)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    for split, places in WHERE.items():
        for batch in whole_places.eval_batches(cfg, network.description.contract, split, len(places)):
            fused = np.asarray(network.features(network.encoder, batch["sensors"])["pixel"], np.float64)[..., :32]
            query = fused @ np.asarray(geo["query"]["kernel"], float) + np.asarray(geo["query"]["bias"], float)
            query /= np.linalg.norm(query, axis=-1, keepdims=True)
            measured = sum(one["valid"].max(1) for one in batch["sensors"].values()) > 0
            for k, (lon, lat) in enumerate(places):
                if lon > 0:
                    found[str(batch["place"]["name"][k])] = (
                        lon,
                        lat,
                        (query[k] @ own.T).reshape(-1, COUNT),
                        measured[k].ravel(),
                        batch["label_map"][k].ravel(),
                    )
    return found


# ------------------------------------------------------------------------------------ the report
def test_the_report_is_what_comes_out_by_hand(root, mapped, by_hand):
    report = json.loads((mapped / "place-0.json").read_text())
    valid = np.stack([one[3] for one in by_hand.values()])
    cosine = np.stack([one[2] for one in by_hand.values()])
    assert list(by_hand) == ["place-0", "place-1", "place-2", "place-100"] and (valid.sum(1) == 60).all()
    expected = np.bincount(cosine.argmax(-1)[valid], minlength=COUNT) / valid.sum()
    assert (expected > 0).sum() == COUNT  # enough is assigned to tell a mistake
    data = report["data"]
    np.testing.assert_allclose(data["share"], expected, atol=1e-12)
    assert (data["places"], data["cells"], data["synthetic"]) == (4, 240, True)
    np.testing.assert_allclose(data["share_entropy"], -sum(p * np.log(p) for p in expected) / np.log(COUNT))
    np.testing.assert_allclose(data["fit"], cosine.max(-1)[valid].mean(), rtol=1e-5)
    for k, near in enumerate(data["nearest"]):
        best = sorted(((one[2][one[3], k].max(), name) for name, one in by_hand.items()), reverse=True)[:3]
        assert [one["place"] for one in near] == [name for _, name in best]
        np.testing.assert_allclose([one["cosine"] for one in near], [value for value, _ in best], rtol=1e-5)
        assert [(one["lon"], one["lat"]) for one in near] == [by_hand[name][:2] for _, name in best]
    region = report["region"]
    assert (region["row"], region["visits"], region["visited_regions"], region["side_m"]) == (2, 7, 2, CELL)
    west, south, east, north = region["bounds"]
    assert west < 3 and 5 < east and south < 46 and 48 < north
    assert region["centre"] == pytest.approx([(west + east) / 2, (south + north) / 2])
    assert [one["usage"] for one in report["prototypes"]] == [0.5, 0.25, 0.25, 0]
    np.testing.assert_allclose(report["bank"]["usage_entropy"], 1.5 * np.log(2) / np.log(COUNT))
    similarity = np.array(report["similarity"])
    assert [one["like"] for one in report["prototypes"]] == (similarity - 2 * np.eye(COUNT)).argmax(1).tolist()
    np.testing.assert_allclose(report["bank"]["similarity_mean"], (similarity.sum() - COUNT) / 12, atol=1e-4)
    np.testing.assert_allclose(report["bank"]["directions"], COUNT**2 / np.square(similarity).sum(), rtol=1e-3)
    scores = report["agreement"]
    assert (scores["region"]["cells"], scores["place"]["cells"], scores["place"]["classes"]) == (236, 59, 3)
    assert all(abs(scores["region"][name]) < 0.1 for name in ("prototypes", "kmeans"))  # the labels are noise


def test_the_region_alone_and_with_places(root, capsys):
    # A longitude is no option: by an attribute of argparse that is private, and may go with a version of Python.
    assert hasattr(argparse.ArgumentParser(), "_negative_number_matcher")
    command(root, "--region", "-60.5,-20")
    printed = capsys.readouterr().out
    assert "region   row 4 (visited regions: 2)" in printed and "1 visits" in printed
    assert "nearest places" not in printed
    command(root, "--region", "4.9,47.9", "--data", root / "data", "--out", root / "out")
    printed = capsys.readouterr().out
    assert "4 in the region, 240 cells" in printed and "place-100" in printed and "SYNTHETIC DATA" in printed
    report = json.loads((root / "out" / "region_2.json").read_text())
    assert report["agreement"].keys() == {"region"}
    assert [path.name for path in (root / "out").iterdir()] == ["region_2.json"]


def test_an_unknown_region_names_the_known_ones(root, capsys):
    for where, message in {
        "8.5,64": "in no region that the bank has visited (2 are); the nearest: ",
        "100,60": "in no region that the bank has visited",  # in the table, never visited
        "48,2,1": "give LON,LAT in degrees",
        "x": "give LON,LAT",
        "48,nan": "longitude first",
        "2,148": "longitude first",
    }.items():
        assert cli.main(["prototypes", str(root / "run"), "--region", where]) == 78
        assert message in (error := capsys.readouterr().err), error
    bank = networks.bank_of(networks.open_network(root / "run"))
    with pytest.raises(ValueError) as error:
        region.region_at(bank, 8.5, 64.0)
    centre = regions.cell_centre(bank["cells"][2], bank["lon_edges"], bank["lat_edges"])
    assert f"nearest: {centre[0]:.4f},{centre[1]:.4f} (" in str(error.value)
    assert region.region_at(bank, *centre) == 2  # what the message says can be typed
    shared = jax.device_get(empty_bank(jax.random.key(0), 9, 2, 4, CELL, 3)) | {"visits": np.ones(9, np.int32)}
    shared["visits"][region.region_at(shared, 8.5, 64.0, 3)] = 0
    with pytest.raises(ValueError, match="shares with other squares .* has never been visited; 8 of 9 have"):
        region.region_at(shared, 8.5, 64.0, 3)
    lengths = region._distance(0.0, 0.0, np.array([90.0, 180, 0]), np.array([0.0, 0, 45]))
    np.testing.assert_allclose(lengths, np.pi * regions.RADIUS / 1000 * np.array([0.5, 1, 0.25]))


def test_refuses_what_has_no_bank_or_no_place(root, tmp_path, capsys):
    for words, message in {
        ("--map", "place-0"): "--map PLACE needs --data",
        ("--map", "nowhere", "--data", str(root / "data"), "--out", str(tmp_path)): "has no place 'nowhere'",
        ("--region", "4,47", "--data", str(tmp_path)): "is not a dataset of places",
    }.items():
        assert cli.main(["prototypes", str(root / "run"), *words]) == 78
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no prototype bank"):
        networks.bank_of(networks.open_network(root / "run", networks.NO_BANK))
    network = networks.open_network(root / "run")
    bank = networks.bank_of(network)
    with pytest.raises(ValueError, match="no region of the bank has ever been visited"):
        region.region_at(bank | {"visits": np.zeros(5, np.int32)}, 4.0, 47.0)
    with pytest.raises(ValueError, match="has no place in this region"):
        evaluation.places_in_region(
            network, bank, evaluation.settings(network.description, None, str(root / "data")), 0
        )


# ------------------------------------------------------------------------------------ the maps
@pytest.mark.parametrize("name", ["place-0", "place-1"])
def test_the_geotiff_lands_where_the_place_is(root, mapped, by_hand, name):
    number = int(name[-1])
    made = record(number, *WHERE["train"][number])
    _, _, cosine, valid, _ = by_hand[name]
    with rasterio.open(mapped / f"{name}.tif") as file:
        written, nodata = file.read(1), file.nodata
        assert (file.count, file.dtypes, file.descriptions) == (1, ("uint16",), ("prototype",))
        assert file.crs == CRS.from_user_input(made["crs"]) and file.res == (10, 10) and file.transform.e < 0
        assert file.tags()["SKYSENSE_SYNTHETIC"] == "1" and file.tags()["SKYSENSE_REGION"] == "2"
        left, bottom, right, top = made["footprint"]
        for column, row, x, y in ((0, 0, left, top), (8, 0, right, top), (0, 8, left, bottom), (8, 8, right, bottom)):
            corner = file.xy(row, column, offset="ul")
            assert corner == (x, y)
            there = warp.transform(file.crs, "EPSG:4326", *([v] for v in corner))
            expected = warp.transform(CRS.from_user_input(made["crs"]), "EPSG:4326", [x], [y])
            np.testing.assert_allclose(there, expected, atol=1e-9)
        assert next(file.sample([(left + 35, top - 5)]))[0] == written[0, 3]
        centre = warp.transform(file.crs, "EPSG:4326", [(left + right) / 2], [(bottom + top) / 2])
        np.testing.assert_allclose(np.ravel(centre), WHERE["train"][number], atol=2e-4)
    assert nodata == NO_PROTOTYPE and (written[-2:, :2] == nodata).all()
    np.testing.assert_array_equal(written.ravel()[valid], cosine.argmax(-1)[valid])
    assert (written == nodata).sum() == 4


def test_the_picture_shows_the_assignment_and_the_label_map(root, mapped):
    image = np.asarray(Image.open(mapped / "place-0.png"))
    with rasterio.open(mapped / "place-0.tif") as file:
        own = file.read(1)
    side, gap, top, step = 224, 10, 34 + 18, 224 // noise_dataset.TILE
    shown = {}
    for panel in range(4):
        left = gap + panel * (side + gap)
        shown[panel] = image[top + step // 2 : top + side : step, left + step // 2 : left + side : step]
    palette = prototype_map.colours(COUNT)
    valid = own != NO_PROTOTYPE
    np.testing.assert_array_equal(shown[1][valid], palette[own[valid]])
    assert (shown[1][~valid] == 235).all() and (shown[2][~valid] == 235).all()
    assert {tuple(x) for x in shown[2][valid]} <= {tuple(x) for x in palette}
    label = record(0, *WHERE["train"][0])["label_map"]
    colour = {0: (40, 100, 200), 1: (20, 100, 40), 2: (230, 180, 80), 255: (235, 235, 235)}
    np.testing.assert_array_equal(shown[3], [[colour[int(value)] for value in row] for row in label])
    assert (shown[0].std((0, 1)) > 5).all() and (image == np.array((200, 30, 30))).all(-1).sum() > 1000


def test_a_label_map_that_is_the_assignment_agrees_wholly(root, tmp_path):
    network = networks.open_network(root / "run")
    cfg = evaluation.settings(network.description, None, str(root / "data"))
    bank = networks.bank_of(network)
    seen = evaluation.places_in_region(network, bank, cfg, 2)
    own, clusters = region.assigned(seen, bank["prototypes"][2], 0)
    relabel = {f"place-{k}": np.full((8, 8), 255, np.uint8) for k in (3, 101)}
    for name, one in zip(
        seen.names, own, strict=True
    ):  # other numbers than the prototypes', unlabelled where nothing is valid
        relabel[name] = np.where(one == NO_PROTOTYPE, 255, 9 - one).reshape(8, 8).astype(np.uint8)
    folder = write_dataset(tmp_path / "data", relabel)
    command(root, "--data", folder, "--map", "place-100", "--out", tmp_path)
    scores = json.loads((tmp_path / "place-100.json").read_text())["agreement"]
    assert scores["region"]["prototypes"] == pytest.approx(1) and scores["region"]["cells"] == 240
    assert scores["place"]["prototypes"] == pytest.approx(1) and 0 < scores["region"]["kmeans"] < 0.99
    again = region.assigned(seen, bank["prototypes"][2], 0)
    np.testing.assert_array_equal(again[1], clusters)


def test_a_place_whose_record_does_not_say_where_it_is(tmp_path):
    made = record(0, 3.0, 48.0) | {"footprint": np.zeros(4)}
    with pytest.raises(ValueError, match="place 'place-0': its footprint .* has no area"):
        prototype_map.write_geotiff(tmp_path / "x.tif", np.zeros((8, 8), np.uint16), made, {})
    assert not (tmp_path / "x.tif").exists()


def test_chosen_places_come_in_their_order(root):
    network = networks.open_network(root / "run")
    cfg = evaluation.settings(network.description, None, str(root / "data"))
    batches = list(whole_places.eval_batches(cfg, network.description.contract, "train", 2, np.array([3, 0, 1])))
    names = [str(name) for batch in batches for name in batch["place"]["name"]]
    assert names == ["place-3", "place-0", "place-1", "place-1"]
    assert np.concatenate([batch["weight"] for batch in batches]).tolist() == [1, 1, 1, 0]
    assert list(whole_places.eval_batches(cfg, network.description.contract, "train", 2, [])) == []


# ------------------------------------------------------------------------------------ the figures
def test_kmeans_finds_known_clusters_and_is_seeded():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 400)
    features = 10 * rng.normal(size=(5, 6))[truth] + rng.normal(size=(400, 6)) / 10
    found = assignment.kmeans(features, 5, 3)
    assert assignment.agreement(found, truth) == pytest.approx(1)
    np.testing.assert_array_equal(found, assignment.kmeans(features, 5, 3))
    with pytest.raises(ValueError, match="k-means of 5 clusters needs as many valid cells, here are 3"):
        assignment.kmeans(features[:3], 5, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(5)))
def test_numbers_of_prototypes_mean_nothing_to_the_agreement(seed, numbers):
    rng = np.random.default_rng(seed)
    label, own = rng.integers(0, 3, 60), rng.integers(0, 5, 60)
    label[rng.uniform(size=60) < 0.2] = sensors.UNLABELLED
    score = assignment.agreement(own, label)
    assert assignment.agreement(np.array(numbers)[own], label) == pytest.approx(score, abs=1e-12)
    changed = np.where(label == sensors.UNLABELLED, rng.integers(0, 5, 60), own)
    assert assignment.agreement(changed, label) == score  # cells without a label do not count
    assert assignment.agreement(np.array(numbers)[label % 5], label) == pytest.approx(1)
    assert assignment.agreement(own, np.where(label == sensors.UNLABELLED, label, 1)) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_matched_is_the_best_renumbering(seed):
    rng = np.random.default_rng(seed)
    clusters, own = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    found = assignment.matched(clusters, own, 4)
    best = max(np.sum(np.array(order)[clusters] == own) for order in itertools.permutations(range(4)))
    assert np.sum(found == own) == best
    assert len(np.unique(np.stack([clusters, found]), axis=1).T) == len(np.unique(clusters))  # one to one


def test_entropy_and_shares():
    assert assignment.entropy(np.full(7, 3.0)) == pytest.approx(1)
    assert assignment.entropy(np.array([0, 2, 0])) == 0
    assert assignment.shares(np.array([[0, 2], [2, 2]]), 4).tolist() == [0.25, 0, 0.75, 0]


def test_a_place_without_a_valid_cell_is_near_to_nothing():
    cosine = np.random.default_rng(0).uniform(-1, 1, (3, 5, 2))
    valid = np.ones((3, 5), bool)
    valid[1], valid[0, 2] = False, False
    order, best = assignment.best_of_places(cosine, valid, 9)
    assert order.shape == (2, 3) and (order[:, 2] == 1).all() and (best[:, 2] == -np.inf).all()
    for k in range(2):
        alone = [np.delete(cosine[0, :, k], 2).max(), cosine[2, :, k].max()]
        np.testing.assert_array_equal(best[k, :2], sorted(alone, reverse=True))
