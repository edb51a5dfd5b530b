"""Rasters to records: units and offsets are exact, everything lands where it is on the ground."""

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform, transform_bounds

from tests.helpers.rasters import GOOD, HR, NORTH, SMALL, UTM, WEST, dn, ingest, one, refusals, refused, s2, write

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "offset, cells", [(0, {}), (-1000, {}), (-1000, {"units": "reflectance", "scale": "0.0001", "offset": "-0.1"})]
)
def test_sentinel2_values_and_offset(tmp_path, offset, cells):
    image = dn(16, 16, low=1500)
    image[0, :4] = 0, 1, 999, 1000
    write(tmp_path / "a.tif", image)
    record, report = one(tmp_path, s2("a.tif", bands="B04", **{"offset": str(offset)} | cells))
    expected = np.where(image > 0, np.maximum(image.astype(int) + offset, 1), 0)
    np.testing.assert_array_equal(record["s2_image"][0, ..., 3], expected)
    np.testing.assert_array_equal(record["s2_valid"][0], image > 0)
    facts = report["files"][0]
    assert facts["offset_source"] == "catalog" and facts["offset_applied"] == [float(cells.get("offset", offset))]


MTD = """<?xml version="1.0" encoding="UTF-8"?>
<n1:Level-2A_User_Product xmlns:n1="https://x/y"><n1:General_Info>
<PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE>
<BOA_QUANTIFICATION_VALUE unit="none">{quantum}</BOA_QUANTIFICATION_VALUE>{offsets}
</n1:General_Info></n1:Level-2A_User_Product>"""


def product(baseline="05.00", offset=None, quantum=10000):
    bands = (
        "".join(f'<BOA_ADD_OFFSET band_id="{i}">{offset}</BOA_ADD_OFFSET>' for i in range(13))
        if offset is not None
        else ""
    )
    return MTD.format(baseline=baseline, quantum=quantum, offsets=f"<L>{bands}</L>" if bands else "")


def test_sentinel2_offset_from_metadata(tmp_path):
    image = dn(16, 16, low=1500)
    row = s2("p.SAFE/GRANULE/x/a.tif", "2019-01-01", offset="", bands="B04")

    def stored(source):
        record, report = one(tmp_path, row)
        assert report["files"][0]["offset_source"] == source
        return record["s2_image"][0, ..., 3].astype(int)

    write(tmp_path / row["path"], image, tags={"BOA_ADD_OFFSET": "-1000"})
    np.testing.assert_array_equal(stored("file tags"), image - 1000)
    write(tmp_path / row["path"], image, tags={"BOA_ADD_OFFSET": "many"})
    assert "is not an offset" in refused(tmp_path, row)
    write(tmp_path / row["path"], image)
    with rasterio.open(tmp_path / row["path"], "r+") as file:
        file.offsets = [-1000]
    np.testing.assert_array_equal(stored("file band offset"), image - 1000)

    write(tmp_path / row["path"], image)
    metadata = tmp_path / "p.SAFE" / "MTD_MSIL2A.xml"
    metadata.write_text(product(offset=-1000))
    np.testing.assert_array_equal(stored("MTD_MSIL2A.xml"), image - 1000)
    metadata.write_text(product(baseline="02.14"))
    np.testing.assert_array_equal(stored("MTD_MSIL2A.xml"), image)
    for text, reason in (
        (product(), "offset is not known"),
        (product(offset=-1000, quantum=1000), "is not 10000"),
        ("<x>", "is not XML"),
        ('<!DOCTYPE x [<!ENTITY e "e">]><x>&e;</x>', "document type or entities"),
        (product(offset="much"), "unreadable offset"),
    ):
        metadata.write_text(text)
        assert reason in refused(tmp_path, row)
    metadata.write_text(product(offset=-1000))
    write(tmp_path / row["path"], image, tags={"BOA_ADD_OFFSET": "0"})
    assert "settle it in the catalog" in refused(tmp_path, row)
    (tmp_path / "p.SAFE" / "MTD_MSIL1C.xml").write_text(product(offset=-1000))
    assert "holds both" in refused(tmp_path, row)
    # metadata of some other product further up says nothing about this file
    write(tmp_path / "folder" / "deeper" / "b.tif", image)
    (tmp_path / "folder" / "MTD_MSIL2A.xml").write_text(product(offset=-1000))
    assert "offset is not known" in refused(tmp_path, {**row, "path": "folder/deeper/b.tif"})


@pytest.mark.parametrize(
    "units, values, expected",
    [
        ("linear_power", [1.0, 0.1, 0.01, 1e-12, 0.0, -1.0], [0, -10, -20, -50, np.nan, np.nan]),
        ("amplitude", [1.0, 0.1, 0.01, 1e-12, 0.0, -1.0], [0, -20, -40, -50, np.nan, np.nan]),
        ("db", [-3.0, -20.0, -49.9, -55.0, -99.0, -32768.0], [-3, -20, -49.9, -50, np.nan, np.nan]),
    ],
)
def test_sentinel1_becomes_db(tmp_path, units, values, expected):
    image = np.full((16, 16), -10.0 if units == "db" else 0.1, np.float32)
    image[0, :6] = values
    write(tmp_path / "a.tif", image)
    record, _ = one(
        tmp_path, {"sensor": "s1", "datetime": "2021-01-01", "path": "a.tif", "bands": "VH", "units": units}
    )
    valid = record["s1_valid"][0, 0, :6].astype(bool)
    np.testing.assert_array_equal(valid, np.isfinite(expected))
    np.testing.assert_allclose(record["s1_image"][0, 0, :6, 1], np.nan_to_num(expected), atol=1e-4)
    assert record["s1_measured"][0].tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["int32 dB * 1e4", "uint16 amplitude with calibration", "tag"])
def test_scaled_sentinel1(tmp_path, kind):
    db = RNG.uniform(-25, -5, (16, 16))
    row = {"sensor": "s1", "datetime": "2021-01-01", "path": "a.tif", "bands": "VV"}
    if kind == "int32 dB * 1e4":
        write(tmp_path / "a.tif", (db * 1e4).astype(np.int32))
        row |= {"units": "db", "scale": "0.0001"}
    elif kind == "tag":
        write(tmp_path / "a.tif", 10 ** (db / 10), tags={"units": "linear power"})
    else:  # dB = 20 log10(DN) - 83
        write(tmp_path / "a.tif", np.rint(10 ** ((db + 83) / 20)).astype(np.uint16))
        row |= {"units": "amplitude", "scale": str(10 ** (-83 / 20))}
    record, report = one(tmp_path, row)
    np.testing.assert_allclose(record["s1_image"][0, ..., 0], db, atol=0.02)
    assert report["files"][0]["units_source"] == ("file tags" if kind == "tag" else "catalog")


def test_undeclared_db_is_accepted_and_noted(tmp_path):
    write(tmp_path / "a.tif", RNG.uniform(-25, -5, (16, 16)).astype(np.float32))
    _, report = one(tmp_path, {"sensor": "s1", "datetime": "2021-01-01", "path": "a.tif", "bands": "VV"})
    assert report["files"][0]["units_source"] == "looks like dB" and "accepted as dB" in report["files"][0]["note"]


def test_nodata_per_band_and_from_the_catalog(tmp_path):
    image = dn(2, 16, 16, low=300)
    image[0, 0, 0], image[1, 0, 1], image[0, 0, 2] = 65535, 299, 299
    write(tmp_path / "a.tif", image, nodata=65535)
    valid = one(tmp_path, s2("a.tif", bands="B02,B03"))[0]["s2_valid"][0, 0]
    assert valid[:4].tolist() == [0, 1, 1, 1]
    valid = one(tmp_path, s2("a.tif", bands="B02,B03", nodata="65535,299"))[0]["s2_valid"][0, 0]
    assert valid[:4].tolist() == [0, 0, 1, 1]


def test_nodata_alpha_and_masks_of_imagery(tmp_path):
    image = RNG.integers(1, 255, (3, 32, 32)).astype(np.uint8)
    image[:, 0, 0], image[0, 0, 1] = 0, 0  # a dark red channel is a real value
    write(tmp_path / "hr.tif", image, step=5, nodata=0)
    assert one(tmp_path, HR)[0]["hr_valid"][0, 0, :3].tolist() == [0, 1, 1]
    assert one(tmp_path, {**HR, "nodata": "none"})[0]["hr_valid"].all()
    alpha = np.full((1, 32, 32), 255, np.uint8)
    alpha[0, 5, 5] = 0
    write(tmp_path / "hr.tif", np.concatenate([image, alpha]), step=5, photometric="RGB", alpha="YES")
    for bands in ("", "R,G,B"):
        valid = one(tmp_path, {**HR, "bands": bands})[0]["hr_valid"][0]
        assert valid[5, 5] == 0 and valid.sum() == 32 * 32 - 1
    # an aerial archive that calls near infrared first, its last band falsely tagged alpha: the catalog is believed
    record, report = one(tmp_path, {**HR, "bands": "-,R,G,B"})
    np.testing.assert_array_equal(np.moveaxis(record["hr_image"][0], -1, 0), np.concatenate([image, alpha])[1:])
    assert record["hr_valid"].all() and "colour interpretation says otherwise" in report["files"][0]["note"]
    for internal in ("NO", "YES"):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
            write(tmp_path / f"mask{internal}.tif", image, step=5)
            with rasterio.open(tmp_path / f"mask{internal}.tif", "r+") as file:
                file.write_mask(alpha[0])
        assert (tmp_path / "maskNO.tif.msk").exists()
        valid = one(tmp_path, {**HR, "path": f"mask{internal}.tif"})[0]["hr_valid"][0]
        np.testing.assert_array_equal(valid, alpha[0] // 255)


def test_masks_make_pixels_unclear(tmp_path):
    write(tmp_path / "a.tif", dn(1, 16, 16)), write(tmp_path / "b.tif", dn(1, 16, 16))
    classes = RNG.integers(3, 9, (8, 8)).astype(np.uint8)
    classes[0, 0] = 255
    write(tmp_path / "scl.tif", classes[:, :6], step=20, nodata=255)
    record, _ = one(
        tmp_path,
        s2("b.tif", "2021-06-09", bands="B04"),
        s2("a.tif", bands="B04"),
        {"sensor": "mask:s2", "datetime": "2021-06-09", "path": "scl.tif", "classes": "4;5"},
    )
    assert np.diff(record["s2_date"]).tolist() == [8] and record["s2_clear"][0].all()
    expected = np.zeros((16, 16), bool)
    expected[:, :12] = np.isin(classes[:, :6], [4, 5]).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(record["s2_clear"][1], expected)


def test_labels(tmp_path):
    write(tmp_path / "a.tif", dn(1, 16, 16))
    left, right = RNG.integers(0, 5, (16, 9)).astype(np.uint8), RNG.integers(5, 9, (16, 16)).astype(np.int16)
    left[0, 0], right[3, 3] = 99, -1
    write(tmp_path / "left.tif", left, nodata=99), write(tmp_path / "right.tif", right, nodata=-1)
    rows = [
        s2("a.tif", bands="B04"),
        {"sensor": "label", "classes": "Water; Forest"},
        {"sensor": "label", "place": "b", "classes": "Alpine"},
        {"sensor": "label_map", "path": "left.tif", "classes": "1=water"},
        {"sensor": "label_map", "path": "right.tif"},
    ]
    record, _ = one(tmp_path, *rows)
    assert record["label"].tolist() == [0, 1, 1]  # Alpine, Forest, Water
    expected = right.copy()
    expected[:, :9] = left
    expected[0, 0], expected[3, 3] = right[0, 0], left[3, 3]
    np.testing.assert_array_equal(record["label_map"], expected)


def test_aligned_grids_are_copied_exactly_and_padding_is_invalid(tmp_path):
    image, fine = dn(2, 12, 12), RNG.integers(0, 256, (3, 24, 24)).astype(np.uint8)
    write(tmp_path / "a.tif", image), write(tmp_path / "hr.tif", fine, step=5)
    height = RNG.uniform(0, 50, (24, 24)).astype(np.float32)
    write(tmp_path / "dsm.tif", height, step=5)
    record, _ = one(tmp_path, s2("a.tif", bands="B8A,B02"), HR, {**GOOD, "path": "dsm.tif"})
    np.testing.assert_array_equal(np.moveaxis(record["s2_image"][0, :12, :12][..., [8, 1]], -1, 0), image)
    np.testing.assert_array_equal(np.moveaxis(record["hr_image"][0, :24, :24], -1, 0), fine)
    np.testing.assert_array_equal(record["dsm_image"][0, :24, :24, 0], height)
    for name, size in (("s2", 12), ("hr", 24), ("dsm", 24)):
        assert record[f"{name}_valid"][0, :size, :size].all() and record[f"{name}_valid"].sum() == size**2
        assert not record[f"{name}_image"][0, size:].any() and not record[f"{name}_image"][0, :, size:].any()
    assert record["crs"] == UTM and record["footprint"].tolist() == [WEST, NORTH - 160, WEST + 160, NORTH]
    lon, lat = transform(UTM, "EPSG:4326", [WEST + 80], [NORTH - 80])
    assert abs(record["lon"] - lon[0]) < 1e-9 and abs(record["lat"] - lat[0]) < 1e-9


def test_mixed_resolutions_in_one_acquisition(tmp_path):
    write(tmp_path / "b2.tif", dn(24, 24)), write(tmp_path / "b5.tif", np.full((12, 12), 700, np.uint16), step=20)
    write(tmp_path / "b1.tif", np.full((4, 4), 300, np.uint16), step=60)
    record, _ = one(tmp_path, *(s2(f"{name.lower()}.tif", bands=name) for name in ("B2", "B5", "B1")), tile=24)
    assert len(record["s2_date"]) == 1 and record["s2_valid"].all()
    assert (record["s2_image"][0, ..., 0] == 300).all() and (record["s2_image"][0, ..., 4] == 700).all()


def coordinates(crs, bounds, width, height):
    """A raster in `crs` over `bounds` whose two bands say the UTM easting and northing (less an origin) of every
    pixel's centre.
    """
    grid = rasterio.transform.from_bounds(*bounds, width, height)
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    xs, ys = grid.a * columns + grid.c, grid.e * rows + grid.f
    east, north = transform(crs, UTM, xs.ravel(), ys.ravel())
    return np.stack([np.reshape(east, xs.shape) - WEST + 5000, np.reshape(north, xs.shape) - NORTH + 5000]).astype(
        np.float32
    ), grid


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32632", "EPSG:3857", "EPSG:3035"])
def test_reprojection_lands_at_the_right_place(tmp_path, crs):
    """A raster that knows its own coordinates: after reprojection every pixel says where it is.

    Within 0.15 pixels (GDAL's approximation of the projection, and rounding to whole numbers), except along the
    raster's edge, where the outermost half pixel has no second neighbour to interpolate with.
    """
    write(tmp_path / "a.tif", dn(1, 16, 16))
    bounds = transform_bounds(UTM, crs, WEST - 300, NORTH - 500, WEST + 500, NORTH + 300)
    image, grid = coordinates(crs, bounds, 80, 80)
    write(tmp_path / "b.tif", image, crs=crs, transform=grid)
    rows = [
        s2("a.tif", bands="B04"),
        s2("b.tif", "2021-07-01", bands="B02,B03", units="reflectance", scale="0.0001", offset="0"),
    ]
    records, report = ingest(tmp_path, rows, **SMALL)
    assert not refusals(report)
    checked = rough = 0
    for record in records:
        left, bottom, right, top = record["footprint"]
        east = left + (np.arange(16) + 0.5) * 10 - WEST + 5000
        north = top - (np.arange(16) + 0.5) * 10 - NORTH + 5000
        index = len(record["s2_date"]) - 1
        if not record["s2_measured"][index, 1]:
            continue
        valid = record["s2_valid"][index].astype(bool)
        x, y = record["s2_image"][index, ..., 1], record["s2_image"][index, ..., 2]
        wrong = np.maximum(np.abs(x - east[None]), np.abs(y - north[:, None]))[valid]
        assert wrong.max() <= 7
        checked, rough = checked + wrong.size, rough + (wrong > 1.5).sum()
    assert checked > 60 * 60 and rough < 0.05 * checked


def test_degrees_alone_get_the_utm_zone_of_their_centre(tmp_path):
    bounds = transform_bounds(UTM, "EPSG:4326", WEST, NORTH - 160, WEST + 160, NORTH)
    image, grid = coordinates("EPSG:4326", bounds, 16, 16)
    write(tmp_path / "a.tif", image, crs="EPSG:4326", transform=grid)
    record, _ = one(tmp_path, s2("a.tif", bands="B02,B03", units="reflectance", scale="0.0001", offset="0"))
    assert record["crs"] == UTM and abs(record["footprint"] - [WEST, NORTH - 160, WEST + 160, NORTH]).max() < 10
    assert record["s2_valid"].mean() > 0.85
    for lat, code in ((86.0, "EPSG:3413"), (-85.0, "EPSG:3031"), (-30.0, "EPSG:32731")):
        write(tmp_path / "a.tif", dn(16, 16), crs="EPSG:4326", west=3.0, north=lat, step=0.0001)
        assert ingest(tmp_path, [s2("a.tif", bands="B04")], **SMALL)[0][0]["crs"] == code


@pytest.mark.parametrize("west", [179.9985, -180.0])
def test_rasters_that_touch_the_180th_meridian(tmp_path, west):
    image = dn(15, 15)
    write(tmp_path / "a.tif", image, crs="EPSG:4326", west=west, north=0.01, step=0.0001)
    record, _ = one(tmp_path, s2("a.tif", bands="B04"))
    assert record["s2_valid"].mean() > 0.85 and abs(abs(record["lon"]) - 180) < 0.01
    assert abs(np.median(record["s2_image"][0, ..., 3][record["s2_valid"][0] > 0]) - np.median(image)) < 300


def test_longitudes_beyond_180_are_refused(tmp_path):
    write(tmp_path / "a.tif", dn(16, 16), crs="EPSG:4326", west=200, north=0.01, step=0.0001)
    records, report = ingest(tmp_path, [s2("a.tif", bands="B04")], **SMALL)
    assert not records and "180th meridian" in refusals(report)[0]


def test_south_up_and_turned_rasters(tmp_path):
    """A transform whose rows run north, and one turned by a quarter: the same ground, the same record."""
    image = dn(16, 16)
    write(tmp_path / "a.tif", image)
    record, _ = one(tmp_path, s2("a.tif", bands="B04"))
    write(tmp_path / "up.tif", image[::-1], transform=rasterio.Affine(10, 0, WEST, 0, 10, NORTH - 160))
    write(tmp_path / "turned.tif", image.T, transform=rasterio.Affine(0, 10, WEST, -10, 0, NORTH))
    for name in ("up.tif", "turned.tif"):
        other, _ = one(tmp_path, s2("a.tif", bands="B04"), s2(name, "2021-07-01", bands="B04"))
        np.testing.assert_array_equal(other["s2_image"][1], record["s2_image"][0])


def test_a_larger_raster_is_cut_on_the_ground_grid_once(tmp_path):
    """Cut of 50 x 37 pixels: together the tiles hold every pixel exactly once, at its own coordinates."""
    image = np.arange(1, 50 * 37 + 1, dtype=np.uint16).reshape(37, 50)
    write(tmp_path / "a.tif", image, west=WEST + 70, north=NORTH - 30)
    records, report = ingest(tmp_path, [s2("a.tif", bands="B04")], **SMALL)
    seen = np.zeros_like(image)
    for record in records:
        left, bottom, right, top = record["footprint"]
        assert left % 160 == 0 and top % 160 == 0 and right - left == top - bottom == 160
        assert record["place"] == f"a@{round(left / 160)}_{round(bottom / 160)}"
        for row, column in zip(*np.nonzero(record["s2_valid"][0]), strict=True):
            x, y = left + column * 10 - WEST - 70, NORTH - 30 - top + row * 10
            assert record["s2_image"][0, row, column, 3] == image[int(y // 10), int(x // 10)]
            seen[int(y // 10), int(x // 10)] += 1
    assert (seen == 1).all() and report["tiles"] == len(records)


def test_one_base_pixel_more_is_still_one_tile(tmp_path):
    """304 aerial pixels of 0.2 m are 60.8 m, the six Sentinel-2 pixels under them 60 m: one place, on the Sentinel-2
    grid.
    """
    image = dn(6, 6)
    write(tmp_path / "a.tif", image)
    write(tmp_path / "hr.tif", np.full((3, 304, 304), 9, np.uint8), west=WEST - 0.4, north=NORTH + 0.4, step=0.2)
    record, _ = one(tmp_path, s2("a.tif", bands="B04"), HR, tile=6, ratio=4)
    assert record["footprint"].tolist() == [WEST, NORTH - 60, WEST + 60, NORTH]
    np.testing.assert_array_equal(record["s2_image"][0, ..., 3], image)
    assert record["hr_valid"].all() and (record["hr_image"] == 9).all()


def test_resampling_next_to_nodata(tmp_path):
    """Bilinear over valid pixels alone: holes neither darken their neighbours nor spread over a coarser grid."""
    image = np.full((64, 64), 100.0, np.float32)
    image[RNG.uniform(size=image.shape) < 0.3] = -9999
    image[:16, :16] = -9999
    write(tmp_path / "dsm.tif", image, step=2.5, nodata=-9999)
    record, _ = one(tmp_path, {**GOOD, "path": "dsm.tif"})
    valid = record["dsm_valid"][0].astype(bool)
    np.testing.assert_allclose(record["dsm_image"][0, ..., 0][valid], 100, rtol=1e-5)
    assert not valid[:7, :7].any() and valid[9:, 9:].mean() > 0.85


def test_jpeg2000(tmp_path):
    image = dn(32, 32)
    write(tmp_path / "a.jp2", image, driver="JP2OpenJPEG", quality=100, reversible="YES")
    record, _ = one(tmp_path, s2("a.jp2", bands="B04"), tile=32)
    np.testing.assert_array_equal(record["s2_image"][0, ..., 3], image)
