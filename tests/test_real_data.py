"""Real data to rasters and catalogs: every folder decided, units and offsets declared, splits that share no ground."""

import csv
import json

import numpy as np
import pytest
import rasterio

pytest.importorskip("h5py", reason="needs h5py (test extra): HDF5 and NetCDF-4 sources")

from experiments.real_samples import convert
from experiments.real_samples import folders as real_folders  # noqa: E402
from skysense_jax.data.ingest.catalog import read_catalog  # noqa: E402
from skysense_jax.sensors import SENSORS  # noqa: E402


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory):
    source = shared / "data"
    if not source.is_dir():
        pytest.skip(f"needs the small real satellite data, looked in {source}")
    out = tmp_path_factory.mktemp("real")
    return convert.convert(
        source, out, every=40
    ), out  # of the dense series (8000 small rasters) every 40th date says as much here


def _rows(out, name="catalog.csv"):
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_unknown_folder_is_an_error(tmp_path):
    (tmp_path / "mystery").mkdir()
    with pytest.raises(ValueError, match="nobody decided"):
        convert.convert(tmp_path, tmp_path / "out")


def test_cf_times_and_ground_cuts():
    assert [f"{t:%Y-%m-%d}" for t in real_folders._image_times("days since 1990-01-01", np.array([11170]))] == [
        "2020-08-01"
    ]
    assert (
        real_folders._image_times("seconds since 2017-08-04 10:53:28", np.array([864109]))[0].isoformat()
        == "2017-08-14T10:55:17"
    )
    for origin in (790236.04, 664500.0, 0.0):
        cut = convert.ground_cut(origin, 10.0, 224)
        assert 90 < cut < 134 and abs((origin + cut * 10 + 80) % 160 - 80) <= 5.0


def test_every_folder_is_used_or_refused_with_a_reason(converted, shared):
    folders, out = converted
    present = {path.name for path in (shared / "data").iterdir() if path.is_dir()}
    assert set(folders) == present and json.loads((out / "folders.json").read_text()) == folders
    assert all(entry["note"] and (entry["rows"] > 0) == (entry["status"] == "used") for entry in folders.values())


def test_catalogs_are_valid_and_declare_everything(converted):
    _, out = converted
    catalog = read_catalog(out / "catalog.csv")
    assert not catalog.refused and catalog.sensors == ("hr", "s2", "s1", "dsm")
    assert catalog.label_map_classes == convert.LAND_COVER
    assert read_catalog(out / "catalog_crops.csv").label_map_classes == convert.CROPS
    rows = _rows(out)
    assert all(row["split"] in ("train", "test") for row in rows)
    assert all(row["units"] for row in rows if row["sensor"] in SENSORS)
    assert all(row["offset"] and row["datetime"] for row in rows if row["sensor"] == "s2")
    shifted = {row["place"] for row in rows if row["sensor"] == "s2" and row["offset"] == "-1000"}
    assert shifted == {"terramesh_433D_west", "terramesh_433D_east"}
    assert {row["units"] for row in rows if row["sensor"] == "s1"} == {"db", "linear_power", "amplitude"}


def _footprint(out, row):
    with rasterio.open(out / row["path"]) as file:
        return file.crs.to_string(), file.bounds


def test_train_and_test_share_no_ground(converted):
    _, out = converted
    # One raster of each kind: those of one series share their grid.
    kinds = {(row["place"], row["sensor"], row["bands"]): row for row in _rows(out) if row["sensor"] in SENSORS}
    boxes = [(row["split"], row["place"], *_footprint(out, row)) for row in kinds.values()]
    seen = {}
    for split, place, crs, box in boxes:
        left, bottom, right, top = seen.setdefault((split, place, crs), box)
        seen[split, place, crs] = (
            min(left, box.left),
            min(bottom, box.bottom),
            max(right, box.right),
            max(top, box.top),
        )
    train = [(crs, place, box) for (split, place, crs), box in seen.items() if split == "train"]
    test = [(crs, place, box) for (split, place, crs), box in seen.items() if split == "test"]
    for crs, place, a in train:
        for other_crs, other, b in test:
            # 1 mm or its like in degrees: blocks may touch.
            apart = a[2] <= b[0] + 1e-8 or b[2] <= a[0] + 1e-8 or a[3] <= b[1] + 1e-8 or b[3] <= a[1] + 1e-8
            assert crs != other_crs or apart, f"{place} and {other} overlap"


def test_sentinel1_encodings_become_decibels(converted):
    """The declared units and scale of one raster of each encoding give backscatter of land."""
    _, out = converted
    rows = [row for row in _rows(out) if row["sensor"] == "s1" and "VV" in row["bands"]]
    for start in ("treesatai", "worldcereal_dense", "worldcereal_cube", "terramesh", "bigearthnet", "pyrosar"):
        row = next(row for row in rows if row["place"].startswith(start))
        with rasterio.open(out / row["path"]) as file:
            value = file.read(1, masked=True).astype(np.float64).compressed() * float(row["scale"] or 1)
        power = 10 * np.log10(np.maximum(value, 1e-12))
        decibel = {"db": value, "linear_power": power, "amplitude": 2 * power}[row["units"]]
        assert -22 < np.median(decibel) < -4, (start, np.median(decibel))
