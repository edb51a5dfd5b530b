"""Synthetic places: the same bytes from the same seed, a catalog the ingest accepts, physics one can accept."""

import csv
import filecmp
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform

from skysense_jax.data.ingest.catalog import COLUMNS, read_catalog
from skysense_jax.data.records import SYNTHETIC_TAG
from skysense_jax.data.synthetic import ground, rasters, world
from skysense_jax.data.synthetic import instruments as sensors
from skysense_jax.ops import regions

PLACES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "data"
    rasters.synthesise(out, PLACES, rasters.Settings(seed=3, tile=8, ratio=8), workers=1)
    return out


@pytest.fixture(scope="module")
def rows(folder):
    with (folder / "catalog.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_same_seed_same_bytes_whatever_the_workers(folder, tmp_path):
    rasters.synthesise(tmp_path / "two", PLACES, rasters.Settings(seed=3, tile=8, ratio=8), workers=2)
    assert _files(folder) == _files(tmp_path / "two")
    same, different, errors = filecmp.cmpfiles(
        folder, tmp_path / "two", [str(p) for p in _files(folder)], shallow=False
    )
    assert not different and not errors


def test_another_seed_and_place_give_other_images(folder, tmp_path):
    rasters.synthesise(tmp_path / "x", 1, rasters.Settings(seed=4, tile=8, ratio=8), workers=1)
    surface = [
        next((root / "synthetic_00000").glob("land_cover.tif")).read_bytes() for root in (folder, tmp_path / "x")
    ]
    assert surface[0] != surface[1]


def test_never_writes_over_a_catalog(folder):
    with pytest.raises(ValueError, match="never written over"):
        rasters.synthesise(folder, 1)


@pytest.mark.parametrize(("places", "bad"), [(0, {}), (1, {"tile": 2}), (1, {"test_fraction": 1.0}), (1, {"gsd": 0.0})])
def test_refuses_impossible_sizes(tmp_path, places, bad):
    with pytest.raises(ValueError, match="need places"):
        rasters.synthesise(tmp_path / "no", places, rasters.Settings(**bad))


def test_catalog_is_one_the_ingest_accepts(folder, rows):
    assert tuple(rows[0]) == COLUMNS
    catalog = read_catalog(folder / "catalog.csv")
    assert len(catalog.places) == PLACES and not catalog.refused
    assert catalog.sensors == ("hr", "s2", "s1", "dsm")
    assert set(catalog.label_classes) == set(world.SCENES)
    assert catalog.label_map_classes == world.LAND_COVER


def test_catalog_declares_units_bands_offsets_and_varies_them(rows):
    s2 = [row for row in rows if row["sensor"] == "s2"]
    assert {row["offset"] for row in s2} == {"0", "-1000"} and {row["units"] for row in s2} == {"dn"}
    assert {row["bands"] for row in s2} == {",".join(sensors.S2_BANDS), ",".join(rasters.TEN_BANDS)}
    assert {row["units"] for row in rows if row["sensor"] == "s1"} == {"db", "linear_power"}
    assert all(row["classes"] == "4;5;6" for row in rows if row["sensor"] == "mask:s2")


def test_dates_are_real_irregular_and_distinct(rows):
    for place in {row["place"] for row in rows}:
        for sensor in ("s2", "s1"):
            dates = [row["datetime"] for row in rows if row["place"] == place and row["sensor"] == sensor]
            assert dates == sorted(set(dates)) and len(dates) in (0, *range(4, 10))
            assert all("2021-01-01" <= date <= "2022-12-31" for date in dates)


def test_some_places_miss_a_sensor_and_scenes_are_balanced(rows):
    places = {row["place"] for row in rows}
    with_sensor = {name: {row["place"] for row in rows if row["sensor"] == name} for name in ("hr", "s2", "s1", "dsm")}
    assert any(found != places for found in with_sensor.values())
    assert all(place in with_sensor["hr"] | with_sensor["s2"] for place in places)
    scenes = [row["classes"] for row in rows if row["sensor"] == "label"]
    assert {scene: scenes.count(scene) for scene in set(scenes)} == dict.fromkeys(
        world.SCENES, PLACES // len(world.SCENES)
    )
    # Held-out places: the same share of every scene type.
    sites = [world.site("plain", 3, i) for i in range(320)]
    held = [site.label for site in sites if rasters.split_of(site.turn, 0.25) == "test"]
    assert {held.count(scene) for scene in world.SCENES} == {10}
    assert all(site.label == site.scene and site.region is None for site in sites)


@pytest.mark.parametrize("kind", ["regional", "permuted"])
@pytest.mark.parametrize("seed", [0, 1])
def test_in_a_regional_world_only_image_and_region_together_tell_the_label(kind, seed):
    labels, count = world.WORLDS[kind], len(world.REGIONS)
    sites = [world.site(kind, seed, i) for i in range(labels * count * 8)]
    assert sites == [world.site(kind, seed, i) for i in range(len(sites))]
    for split, share in (("train", 6), ("test", 2)):
        chosen = [site for site in sites if rasters.split_of(site.turn, 0.25) == split]
        pairs = [(site.region, site.label) for site in chosen]
        assert {pairs.count(pair) for pair in pairs} == {share} and len(set(pairs)) == labels * count
        # Over all regions every label is as frequent with every type, so that the type alone is worth nothing.
        pairs = [(site.scene, site.label) for site in chosen]
        assert {pairs.count(pair) for pair in pairs} == {share} and len(set(pairs)) == labels * len(world.SCENES)
    looks = {}
    for site in sites:
        looks.setdefault(site.region, {})[site.label] = site.scene
    assert all(len(set(look.values())) == labels for look in looks.values()), "one label per type in a region"
    assert len({tuple(sorted(look.items())) for look in looks.values()}) == count, "no two regions agree"
    if kind == "permuted":
        assert all(set(look.values()) == set(world.SCENES) for look in looks.values())


def test_the_seed_draws_what_labels_look_like_and_unknown_worlds_are_refused(tmp_path):
    drawn = {tuple(world.site("regional", seed, i).scene for i in range(32)) for seed in range(5)}
    assert len(drawn) == 5
    with pytest.raises(ValueError, match="unknown world 'flat'; known: plain, regional, permuted"):
        rasters.synthesise(tmp_path / "flat", 1, rasters.Settings(kind="flat"))
    assert not (tmp_path / "flat").exists()


def test_regions_are_different_squares_of_the_grid_and_their_places_lie_in_them():
    edges, cells = regions.grid_edges(1e6), []
    for region in range(len(world.REGIONS)):
        rng, corners = np.random.default_rng(region), []
        for _ in range(50):
            crs, west, north = rasters._location(rng, False, 160.0, region)
            corners.append((west, north))
        lon, lat = transform(crs, "EPSG:4326", *zip(*corners, strict=True))
        cells.append(set(regions.cell_ids(np.float32(lon), np.float32(lat), *edges).tolist()))
    assert all(len(found) == 1 for found in cells) and len(set.union(*cells)) == len(world.REGIONS)


def test_a_regional_world_as_a_catalog(tmp_path):
    rasters.synthesise(tmp_path / "r", 5, rasters.Settings(seed=2, tile=8, ratio=2, kind="regional"), workers=1)
    catalog = read_catalog(tmp_path / "r" / "catalog.csv")
    assert set(catalog.label_classes) == {f"label {k}" for k in range(4)}
    assert "world regional" in (tmp_path / "r" / "SYNTHETIC.txt").read_text()


def test_every_raster_says_synthetic_and_has_a_real_crs(folder, rows):
    assert "SYNTHETIC" in (folder / "SYNTHETIC.txt").read_text()
    zones = set()
    for row in rows:
        if row["path"]:
            with rasterio.open(folder / row["path"]) as file:
                assert file.tags()[SYNTHETIC_TAG] == "1"
                assert file.crs.is_projected and file.width * file.transform.a == 80.0
                assert file.transform.c % 80 == 0 and file.transform.f % 80 == 0
                zones.add(file.crs.to_epsg())
    assert len(zones) >= 5


def _index(day: float, material: int, climate: sensors.Climate) -> float:
    row = sensors.spectra(day, climate)[material]
    return (row[7] - row[3]) / (row[7] + row[3])


def _plain_climate(south: bool = False) -> sensors.Climate:
    count = len(world.MATERIALS)
    return sensors.Climate(south, 0.0, 0.0, 0.0, 180.0, 0.5, np.ones((count, 1)), np.zeros((count, 2)))


def test_spectra_and_phenology_are_physical():
    climate = _plain_climate()
    july, january, may = 200, 15, 135
    for forest in (world.CONIFER, world.DECIDUOUS):
        assert _index(july, forest, climate) > 0.7 > 0.3 > _index(july, world.SOIL, climate)
    assert _index(january, world.CONIFER, climate) > _index(january, world.DECIDUOUS, climate) + 0.25
    assert _index(may, world.WINTER_CROP, climate) > 0.7 > 0.3 > _index(may, world.SUMMER_CROP, climate)
    assert _index(225, world.SUMMER_CROP, climate) > 0.7 > 0.35 > _index(225, world.WINTER_CROP, climate)
    assert _index(january, world.DECIDUOUS, _plain_climate(south=True)) > 0.7
    spectra = sensors.spectra(july, climate)
    assert spectra[world.WATER, 7] < 0.03 < spectra[world.WATER, 1] < 0.1
    assert (spectra > 0).all() and (spectra < 0.6).all()
    for material in (world.GRASS, world.WINTER_CROP, world.SUMMER_CROP, world.DECIDUOUS, world.CONIFER):
        cover = [sensors.green_cover(material, day, climate) for day in range(366)]
        assert 0 <= min(cover) and max(cover) <= 1
        assert max(np.diff(cover)) < 0.15, "green comes gradually; only mowing takes it in a day"
        assert abs(cover[365] - cover[0]) < 0.05, "the year closes"


def test_speckle_is_multiplicative_gamma_with_the_declared_looks():
    share = np.zeros((len(world.MATERIALS), 128, 128), np.float32)
    rng = np.random.default_rng(0)
    for material in (world.CONIFER, world.WATER):
        share[:] = 0
        share[material] = 1
        power = sensors.render_s1(rng, share, _plain_climate(), 200, 0.0)
        looks = power.mean((1, 2)) ** 2 / power.var((1, 2))
        np.testing.assert_allclose(looks, 4.4, rtol=0.06)
    share[:] = 0
    share[world.CONIFER, :, :64], share[world.WATER, :, 64:] = 1, 1
    power = sensors.render_s1(rng, share, _plain_climate(), 200, 0.0)
    decibel = 10 * np.log10(power.mean(1))
    assert decibel[0, :60].mean() > decibel[0, 68:].mean() + 3 and (decibel[0] > decibel[1]).mean() > 0.95


def test_land_is_deterministic_and_the_scene_dominates():
    share = {scene: np.zeros(256) for scene in world.SCENES}
    for scene in world.SCENES:
        for seed in range(6):
            land = ground.make_land(np.random.default_rng(seed), 16, 4, 10.0, scene)
            share[scene] += np.bincount(land.cover.ravel(), minlength=256) / land.cover.size / 6
            assert land.canopy.min() >= 0 and land.canopy.max() < 35 and np.isfinite(land.terrain).all()
    assert share["conifer forest"][2] > 0.5 and share["deciduous forest"][2] > 0.5 and share["pasture"][3] > 0.5
    assert share["winter crops"][4] > 0.5 and share["summer crops"][4] > 0.5 and share["industrial"][5] > 0.5
    twice = [ground.make_land(np.random.default_rng(1), 16, 4, 10.0, "orchard") for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*twice, strict=True))


def test_fractions_conserve_area_and_the_label_map_is_the_majority():
    land = ground.make_land(np.random.default_rng(5), 8, 8, 10.0, "residential")
    share = sensors.fractions(land, 8)
    np.testing.assert_allclose(share.sum(0), 1, atol=1e-6)
    cover = sensors.label_map(land, 8)
    for y, x in np.ndindex(8, 8):
        block = np.bincount(land.cover[y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].ravel(), minlength=7)
        assert cover[y, x] == (block.argmax() if block.max() >= 32 else 255)


def test_clouds_are_bright_and_the_scl_finds_the_thick_ones():
    rng, climate = np.random.default_rng(2), _plain_climate()
    land = ground.make_land(rng, 16, 4, 10.0, "deciduous forest")
    share = sensors.fractions(land, 4, land.vigour)
    blue = {"thick": [], "clear": []}
    for _ in range(40):
        image, scl, seen = sensors.render_s2(rng, share, climate, 200, 1.0)
        blue["thick"] += list(image[1][seen & (scl == 9)])
        blue["clear"] += list(image[1][seen & (scl == 4)])
        assert ((scl == 0) == ~seen).all() and set(np.unique(scl)) <= {0, 3, 4, 5, 6, 8, 9, 10}
    assert np.median(blue["thick"]) > 0.3 > 0.12 > np.median(blue["clear"])
    assert len(blue["clear"]) > 0.5 * 40 * 256
