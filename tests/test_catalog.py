"""The catalog: mistakes are named with their row, one bad row of data never stops the others, drafts leave the
unknown empty.
"""

import os

import numpy as np
import pytest

from skysense_jax.data.drafting import rasters
from skysense_jax.data.ingest.catalog import CatalogError, parse_date, read_catalog
from tests.helpers.rasters import catalog, s2, write

LOOK = {"sensor": "hr", "datetime": "", "path": "a.tif"}


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "a.tif", np.ones((3, 4, 4), np.uint8))
    return tmp_path


@pytest.mark.parametrize(
    "row, text",
    [
        ({**LOOK, "sensor": "sar"}, "row 2: sensor: unknown sensor 'sar'"),
        ({**LOOK, "sensor": "mask:sar"}, "unknown sensor 'mask:sar'"),
        ({**LOOK, "place": ""}, "row 2: place: empty"),
        ({**LOOK, "place": "a/b"}, "contains a slash"),
        ({**LOOK, "path": ""}, "row 2: path: empty"),
        ({**LOOK, "datetime": "June 2021"}, "row 2: datetime"),
        ({**LOOK, "datetime": "2021-02-30"}, "row 2: datetime"),
        ({**LOOK, "datetime": "1969-12-31"}, "before 1970"),
        ({**LOOK, "units": "db"}, "row 2: units: 'db' is not accepted for hr"),
        ({**LOOK, "scale": "x"}, "row 2: scale"),
        ({**LOOK, "scale": "0"}, "row 2: scale"),
        ({**LOOK, "offset": "nan"}, "row 2: offset"),
        ({**LOOK, "nodata": "zero"}, "row 2: nodata"),
        ({**LOOK, "bands": "R,G,X"}, "row 2: bands"),
        ({**LOOK, "bands": "R,R,G"}, "row 2: bands"),
        ({**LOOK, "split": "val"}, "row 2: split"),
        ({"sensor": "label", "path": ""}, "row 2: classes"),
        ({"sensor": "label", "path": "a.tif", "classes": "x"}, "row 2: path"),
        ({"sensor": "mask:hr", "path": "a.tif"}, "row 2: classes"),
        ({"sensor": "mask:hr", "path": "a.tif", "classes": "clear"}, "row 2: classes"),
        ({"sensor": "label_map", "path": "a.tif", "classes": "255=x"}, "row 2: classes"),
    ],
)
def test_a_mistake_in_the_table_names_its_row(root, row, text):
    with pytest.raises(CatalogError, match=".*") as error:
        read_catalog(catalog(root, [row]))
    assert text in str(error.value)


def test_all_mistakes_are_listed_at_once(root):
    with pytest.raises(CatalogError) as error:
        read_catalog(catalog(root, [LOOK, {**LOOK, "sensor": "x"}, {**LOOK, "place": ""}]))
    assert "row 3" in str(error.value) and "row 4" in str(error.value)


def test_unknown_and_missing_columns(tmp_path):
    (tmp_path / "c.csv").write_text("place,sensor,date,path\n")
    with pytest.raises(CatalogError, match=r"unknown columns \['date'\], missing columns \['datetime'\]"):
        read_catalog(tmp_path / "c.csv")


def test_a_cell_too_many(tmp_path):
    (tmp_path / "c.csv").write_text("place,sensor,datetime,path,bands\na,hr,,a.tif,R,G,B\n")
    with pytest.raises(CatalogError, match="row 2: more cells than columns"):
        read_catalog(tmp_path / "c.csv")


def test_not_text_not_there_empty(tmp_path):
    (tmp_path / "c.csv").write_bytes(b"place,sensor,datetime,path\n\xff\xfe,hr,,a\n")
    with pytest.raises(CatalogError, match="not UTF-8"):
        read_catalog(tmp_path / "c.csv")
    with pytest.raises(CatalogError, match="no such catalog"):
        read_catalog(tmp_path / "d.csv")
    (tmp_path / "e.csv").write_text("place,sensor,datetime,path\n")
    with pytest.raises(CatalogError, match="no rows"):
        read_catalog(tmp_path / "e.csv")
    (tmp_path / "f.parquet").write_bytes(b"nothing")
    with pytest.raises(CatalogError, match="not a parquet file"):
        read_catalog(tmp_path / "f.parquet")


def test_contradicting_splits_and_map_classes(root):
    with pytest.raises(CatalogError, match="row 3: split test, but row 2 puts place 'a' in train"):
        read_catalog(catalog(root, [{**LOOK, "split": "train"}, {**LOOK, "split": "test"}]))
    row = {"sensor": "label_map", "path": "a.tif"}
    with pytest.raises(CatalogError, match="contradicts 1=water"):
        read_catalog(catalog(root, [{**row, "classes": "1=water"}, {**row, "classes": "1=trees"}]))


@pytest.mark.parametrize(
    "path, text",
    [
        ("../outside.tif", "outside the catalog's folder"),
        ("/etc/passwd", "outside the catalog's folder"),
        ("link.tif", "outside the catalog's folder"),
        ("/vsicurl/http://x/y.tif", "not a local path"),
        ("https://x/y.tif", "not a local path"),
        ("nothing.tif", "file not found"),
        ("folder", "not a regular file"),
    ],
)
def test_a_path_that_is_not_read_refuses_its_row_alone(root, tmp_path_factory, path, text):
    outside = write(tmp_path_factory.mktemp("elsewhere") / "x.tif", np.ones((3, 4, 4), np.uint8))
    os.symlink(outside, root / "link.tif")
    (root / "folder").mkdir()
    (root.parent / "outside.tif").write_bytes(b"")
    found = read_catalog(catalog(root, [LOOK, {**LOOK, "path": path}]))
    assert len(found.places["a"]) == 1
    assert [entry["row"] for entry in found.refused] == [3] and text in found.refused[0]["reason"]


def test_a_dated_sensor_needs_a_date(root):
    found = read_catalog(catalog(root, [s2("a.tif", ""), LOOK]))
    assert found.sensors == ("hr",)
    assert "no datetime, and s2 is a dated sensor" in found.refused[0]["reason"]


def test_dates():
    assert parse_date("1970-01-02") == 1 and parse_date("2021-06-01T23:30:00") == parse_date("2021-06-01")
    assert parse_date("2021-06-01T23:30:00-05:00") == parse_date("2021-06-02")
    assert parse_date("2021-06-01T10:00:00Z") == parse_date("2021-06-01") and parse_date("") == -1


def test_geoparquet_says_the_same_as_csv(root):
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = [
        LOOK | {"place": "a", "datetime": "2021-06-01", "bands": "R,G,B", "nodata": "0"},
        {"place": "b", "sensor": "label", "datetime": "", "path": "", "classes": "Water;Forest"},
    ]
    from_csv = read_catalog(catalog(root, rows))
    table = pyarrow.table(
        {
            "place": ["a", "b"],
            "sensor": ["hr", "label"],
            "path": ["a.tif", None],
            "bands": [["R", "G", "B"], None],
            "datetime": pyarrow.array([datetime.datetime(2021, 6, 1, 10), None]),
            "nodata": [0.0, None],
            "classes": [None, "Water;Forest"],
            "geometry": [b"", b""],
        }
    )
    pyarrow.parquet.write_table(table, root / "places.parquet")
    from_parquet = read_catalog(root / "places.parquet")
    assert from_parquet.label_classes == from_csv.label_classes == ("Forest", "Water")
    for place in ("a", "b"):
        assert [row._replace(number=0) for row in from_parquet.places[place]] == [
            row._replace(number=0) for row in from_csv.places[place]
        ]


def test_draft_fills_what_is_written_and_asks_for_the_rest(tmp_path):
    dn = np.full((1, 8, 8), 500, np.uint16)
    for band in ("B02", "B8A"):
        write(tmp_path / "site1" / f"S2A_MSIL2A_20170613T101031_{band}.tif", dn)
    write(tmp_path / "site1" / "S2A_MSIL2A_20170613T101031_SCL.tif", dn.astype(np.uint8))
    write(tmp_path / "site1" / "S1A_IW_GRDH_1SDV_2017-06-14_VV.tif", -dn.astype(np.float32))
    write(tmp_path / "site1" / "photo.tif", np.ones((3, 8, 8), np.uint8), photometric="RGB")
    write(tmp_path / "site2" / "what.tif", dn.astype(np.float32))
    write(
        tmp_path / "stack_20200101.tif", np.repeat(dn, 3, 0), bands=("B4", "B3", "B2"), tags={"BOA_ADD_OFFSET": "-1000"}
    )
    (tmp_path / "text.tif").write_text("not a raster")
    found = rasters.draft(tmp_path)
    rows = {row["path"].split("/")[-1]: row for row in found.rows}
    scene = "S2A_MSIL2A_20170613T101031"
    assert rows[f"{scene}_B8A.tif"] | {"offset": ""} == dict.fromkeys(rows[f"{scene}_B8A.tif"], "") | {
        "place": "site1",
        "sensor": "s2",
        "datetime": "2017-06-13",
        "path": f"site1/{scene}_B8A.tif",
        "bands": "B8A",
        "units": "dn",
    }
    assert rows[f"{scene}_SCL.tif"]["sensor"] == "mask:s2" and rows[f"{scene}_SCL.tif"]["classes"] == "4;5;6"
    radar = rows["S1A_IW_GRDH_1SDV_2017-06-14_VV.tif"]
    assert (radar["sensor"], radar["bands"], radar["units"], radar["datetime"]) == ("s1", "VV", "", "2017-06-14")
    assert rows["photo.tif"]["sensor"] == "hr" and rows["what.tif"]["sensor"] == ""
    assert rows["stack_20200101.tif"]["place"] == "stack" and rows["stack_20200101.tif"]["bands"] == ""
    asked = {path.split("/")[-1]: text for path, text in found.questions}
    assert "left out" in asked["text.tif"] and asked["what.tif"] == "sensor: not recognised"
    assert "stack_20200101.tif" not in asked  # order in the descriptions, offset in the tags: nothing to ask
    assert asked[f"{scene}_B02.tif"].startswith("offset") and asked["S1A_IW_GRDH_1SDV_2017-06-14_VV.tif"].startswith(
        "units"
    )
    (tmp_path / "places.csv").write_text(rasters.to_csv([row for row in found.rows if row["sensor"]]))
    read_catalog(tmp_path / "places.csv")
    write(tmp_path / "site1" / "photo2.tif", np.ones((3, 8, 8), np.uint8), photometric="RGB")
    assert ("site1/photo2.tif", "place") in [(path, text[:5]) for path, text in rasters.draft(tmp_path).questions]
    assert {"photo", "what", "stack"} <= {row["place"] for row in rasters.draft(tmp_path, "stem").rows}
