"""Every guard of the ingest has a file that trips it; the rest of the place is still there."""

import os

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.transform import from_origin

from skysense_jax.data.ingest import raster
from skysense_jax.sensors import SENSORS
from tests.helpers.rasters import HR, NORTH, SMALL, UTM, WEST, dn, ingest, one, refusals, refused, s2, write


def test_missing_crs_or_georeferencing(tmp_path):
    write(tmp_path / "a.tif", dn(16, 16), crs=None)
    assert "no CRS" in refused(tmp_path, s2("a.tif", bands="B04"))
    write(tmp_path / "a.tif", dn(16, 16), transform=Affine.identity())
    assert "no transform" in refused(tmp_path, s2("a.tif", bands="B04"))
    write(tmp_path / "a.tif", dn(16, 16), crs=rasterio.CRS.from_wkt('LOCAL_CS["here",UNIT["metre",1]]'))
    assert "cannot be located on Earth" in refused(tmp_path, s2("a.tif", bands="B04"))


def test_band_count_and_order(tmp_path):
    write(tmp_path / "a.tif", dn(3, 16, 16))
    assert "has 3 bands, the catalog names 2" in refused(tmp_path, s2("a.tif", bands="B02,B03"))
    assert "whose order nobody states" in refused(tmp_path, s2("a.tif"))
    write(tmp_path / "a.tif", dn(13, 16, 16))  # thirteen bands are not an order: EuroSAT has B8A last
    assert "whose order nobody states" in refused(tmp_path, s2("a.tif"))
    write(tmp_path / "a.tif", dn(3, 16, 16), bands=("B4", "B3", "B2"))
    assert "contradicts the file's band descriptions" in refused(tmp_path, s2("a.tif", bands="B02,B03,B04"))
    write(tmp_path / "a.tif", dn(3, 16, 16), bands=("B4", "red", "B2"))
    assert "name a band twice" in refused(tmp_path, s2("a.tif"))
    write(tmp_path / "a.tif", -dn(2, 16, 16).astype(np.float32) / 200)  # VV,VH or VH,VV: nobody says
    assert "whose order nobody states" in refused(tmp_path, {"sensor": "s1", "datetime": "2021-01-01", "path": "a.tif"})


def test_sentinel2_offset_must_be_known_and_the_hint_is_only_a_hint(tmp_path):
    write(tmp_path / "a.tif", dn(16, 16, low=1031, high=5000))
    reason = refused(tmp_path, s2("a.tif", "2023-01-01", offset="", bands="B04"))
    assert (
        "offset is not known" in reason and "the date does not decide it" in reason and "+1000 is still in it" in reason
    )
    write(tmp_path / "a.tif", dn(16, 16, low=200))
    assert "has been removed or never was" in refused(tmp_path, s2("a.tif", "2017-01-01", offset="", bands="B04"))
    assert "looks already removed" in refused(
        tmp_path, s2(write(tmp_path / "b.tif", dn(16, 16, low=1, high=999)).name, offset="-1000", bands="B04")
    )


def test_sentinel2_units_that_contradict_the_file(tmp_path):
    write(tmp_path / "a.tif", np.full((16, 16), 0.3, np.float32))
    assert "without declared units" in refused(tmp_path, s2("a.tif", units="", bands="B04"))
    write(tmp_path / "a.tif", dn(16, 16))
    assert "integers declared as reflectance" in refused(tmp_path, s2("a.tif", units="reflectance", bands="B04"))
    assert "offset is not known" in refused(
        tmp_path, s2("a.tif", units="reflectance", scale="0.0001", offset="", bands="B04")
    )
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.scales, file.offsets = [0.0001], [-0.1]
    assert "declare units=reflectance" in refused(tmp_path, s2("a.tif", offset="", bands="B04"))


@pytest.mark.parametrize(
    "values, units, text",
    [
        (np.linspace(0.001, 0.9, 256), "", "like linear power"),
        (np.linspace(1, 5000, 256), "", "like uncalibrated numbers"),
        (np.linspace(-900, -100, 256), "", "do not look like dB"),
        (np.linspace(0.001, 0.9, 256), "db", "the values are positive"),
        (np.linspace(-25, -5, 256), "linear_power", "the values are negative"),
        (np.linspace(-9000, -100, 256), "db", "not plausible"),
    ],
)
def test_sentinel1_units(tmp_path, values, units, text):
    write(tmp_path / "a.tif", values.reshape(16, 16).astype(np.float32))
    row = {"sensor": "s1", "datetime": "2021-01-01", "path": "a.tif", "bands": "VV", "units": units}
    assert text in refused(tmp_path, row)


def test_sixteen_bit_imagery_needs_a_declared_stretch(tmp_path):
    write(tmp_path / "hr.tif", dn(3, 32, 32), step=5)
    assert "16-bit imagery needs a declared scale" in refused(tmp_path, HR)
    record, _ = one(tmp_path, {**HR, "scale": "0.1"})
    with rasterio.open(tmp_path / "hr.tif") as file:
        expected = np.rint((np.moveaxis(file.read(), 0, -1) * np.float64(0.1)).clip(0, 255).astype(np.float32))
    np.testing.assert_array_equal(record["hr_image"][0], expected)


def test_files_that_are_not_rasters(tmp_path):
    row = s2("a.tif", bands="B04")
    (tmp_path / "a.tif").write_bytes(b"")
    assert "the file is empty" in refused(tmp_path, row)
    (tmp_path / "a.tif").write_text("hello")
    assert "neither a GeoTIFF nor a JPEG 2000" in refused(tmp_path, row)
    write(tmp_path / "real.tif", dn(16, 16))
    (tmp_path / "a.tif").write_text(
        '<VRTDataset rasterXSize="16" rasterYSize="16"><SRS>EPSG:32631</SRS><VRTRasterBand dataType="UInt16" '
        'band="1"><SimpleSource><SourceFilename>real.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
    )
    assert "neither a GeoTIFF nor a JPEG 2000" in refused(tmp_path, row)
    write(tmp_path / "a.png", np.ones((3, 16, 16), np.uint8), driver="PNG", crs=None)
    assert "neither a GeoTIFF nor a JPEG 2000" in refused(tmp_path, {**HR, "path": "a.png"})


@pytest.mark.parametrize("compress", [None, "deflate", "lzw"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.97])
def test_truncated_file(tmp_path, compress, share):
    write(tmp_path / "full.tif", dn(2, 256, 256), compress=compress)
    data = (tmp_path / "full.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: int(len(data) * share)])
    records, report = ingest(
        tmp_path, [s2("full.tif", bands="B02,B03"), s2("a.tif", "2021-06-02", bands="B02,B03")], **SMALL
    )
    # so short that not even the CRS is left: refused for that
    assert len(refusals(report)) == 1 and ("no CRS" if share < 0.01 else "truncated") in refusals(report)[0]
    assert all(len(record["s2_date"]) == 1 for record in records) and len(records) > 100


def test_all_nodata_nan_and_masked(tmp_path):
    row = s2("a.tif", bands="B04")
    write(tmp_path / "a.tif", np.zeros((16, 16), np.uint16))  # 0 is Sentinel-2's nodata, tagged or not
    assert "no valid pixel" in refused(tmp_path, row)
    write(tmp_path / "a.tif", np.full((16, 16), 7, np.uint16), nodata=7)
    assert "no valid pixel" in refused(tmp_path, row)
    write(tmp_path / "a.tif", np.full((16, 16), np.nan, np.float32))
    assert "no valid pixel" in refused(tmp_path, {**row, "units": "reflectance"})
    write(tmp_path / "a.tif", np.full((16, 16), np.inf, np.float32))
    assert "no valid pixel" in refused(tmp_path, {**row, "units": "reflectance"})


def test_the_only_valid_pixels_of_a_large_raster_are_found(tmp_path):
    image = np.zeros((1, 700, 700), np.uint16)
    image[0, 150, 150] = 900
    write(tmp_path / "a.tif", image)
    records, report = ingest(tmp_path, [s2("a.tif", bands="B04")], **SMALL)
    assert len(records) == 1 and records[0]["s2_valid"].sum() == 1 and report["tiles_dropped"] > 1000


def test_absurd_declared_size_is_refused_before_anything_is_allocated(tmp_path):
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        driver="GTiff",
        width=1_000_000,
        height=1_000_000,
        count=1,
        dtype="uint8",
        crs=UTM,
        transform=from_origin(WEST, NORTH, 0.1, 0.1),
        sparse_ok=True,
        tiled=True,
        blockxsize=4096,
        blockysize=4096,
        bigtiff="YES",
    ):
        pass
    assert os.path.getsize(tmp_path / "a.tif") < 2**24
    reason = refused(tmp_path, {**HR, "path": "a.tif", "bands": ""})
    assert "declares 1000000 x 1000000 x 1" in reason and "--max-pixels" in reason
    write(tmp_path / "many.tif", np.ones((513, 1, 1), np.uint8))
    assert "513 bands" in refused(tmp_path, {**HR, "path": "many.tif"})


def test_a_window_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(raster, "MAX_WINDOW_PIXELS", 30_000)  # above what a sample window needs
    write(tmp_path / "hr.tif", np.ones((3, 160, 160), np.uint8), step=1)
    assert "of its pixels at once" in refused(tmp_path, HR)


def test_pixels_far_coarser_than_the_grid(tmp_path):
    write(tmp_path / "a.tif", dn(16, 16), step=1000)
    assert "too coarse" in refused(tmp_path, s2("a.tif", bands="B04"))


def test_a_measured_band_tagged_as_alpha(tmp_path):
    """Near infrared, red, green, blue as GDAL tags them: red, green, blue, alpha."""
    image = np.random.default_rng(3).integers(1, 255, (4, 32, 32)).astype(np.uint8)
    write(tmp_path / "hr.tif", image, step=5, photometric="RGB", alpha="YES")
    assert "tagged as alpha but holds measurements" in refused(tmp_path, HR | {"bands": ""})


def test_complex_pixels(tmp_path):
    write(tmp_path / "a.tif", np.ones((16, 16), np.complex64))
    assert "one real type" in refused(
        tmp_path, {"sensor": "s1", "datetime": "2021-01-01", "path": "a.tif", "bands": "VV"}
    )


def test_nodata_hidden_in_a_sidecar(tmp_path):
    write(tmp_path / "a.tif", dn(16, 16))
    (tmp_path / "a.tif.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>'
    )
    assert "sidecars are not read" in refused(tmp_path, s2("a.tif", bands="B04"))
    one(tmp_path, s2("a.tif", bands="B04", nodata="7"))


def test_the_same_band_twice_on_a_date(tmp_path):
    first, second, other = dn(16, 16), dn(16, 16), dn(16, 16)
    write(tmp_path / "a.tif", first), write(tmp_path / "b.tif", second), write(tmp_path / "c.tif", other)
    record, report = one(
        tmp_path, s2("a.tif", bands="B04"), s2("b.tif", "2021-06-01T11:00:00", bands="B04"), s2("c.tif", bands="B08")
    )
    assert (
        len(refusals(report)) == 1 and "twice on this date: B04 of s2 already comes from row 2" in refusals(report)[0]
    )
    np.testing.assert_array_equal(record["s2_image"][0, ..., 3], first)
    np.testing.assert_array_equal(record["s2_image"][0, ..., 7], other)
    assert record["s2_measured"][0].tolist() == [band in ("B04", "B08") for band in SENSORS["s2"].bands]


def test_label_map_guards(tmp_path):
    row = {"sensor": "label_map", "path": "a.tif"}
    write(tmp_path / "a.tif", np.ones((16, 16), np.float32))
    assert "holds integer classes" in refused(tmp_path, row)
    write(tmp_path / "a.tif", np.full((16, 16), 300, np.int16))
    assert "label values 300" in refused(tmp_path, row)
    write(tmp_path / "a.tif", np.ones((3, 16, 16), np.uint8))
    assert "a label_map has one" in refused(tmp_path, row)
    write(tmp_path / "a.tif", np.ones((16, 16), np.uint8))
    assert "a mask without a usable s2 raster" in refused(
        tmp_path, {"sensor": "mask:s2", "path": "a.tif", "datetime": "2021-01-01", "classes": "1"}
    )
