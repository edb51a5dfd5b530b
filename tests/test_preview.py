"""The picture of a place: fixed stretches, invalid pixels hatched, "synthetic" said in it; the whole way from synth."""

import numpy as np
import pytest
from PIL import Image

from skysense_jax import cli
from skysense_jax.data import records
from skysense_jax.data.synthetic import rasters
from skysense_jax.draw import places
from skysense_jax.sensors import NO_DATE, SENSORS

BADGE = (200, 30, 30)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("preview")
    settings = rasters.Settings(seed=1, tile=8, ratio=8, test_fraction=0.5)
    catalog = rasters.synthesise(root / "rasters", 6, settings, workers=1)
    sizes = ["--tile", "8", "--ratio", "8", "--workers", "1"]
    assert cli.main(["data", "build", "--catalog", str(catalog), "--out", str(root / "data"), *sizes]) == 0
    return root / "data"


def test_synthetic_rasters_pass_the_ingest_whole(dataset):
    meta = records.read_metadata(dataset)
    assert meta["synthetic"] is True and meta["sensors"] == ["hr", "s2", "s1", "dsm"]
    assert set(meta["label_map_classes"].values()) == {"water", "forest", "grassland", "cropland", "built-up", "bare"}
    assert meta["report"]["tiles"] == 6 and meta["report"]["files"]["refused"] == 0
    record = records.open_places(dataset, "train")[0]
    assert record["s2_image"].shape[1:] == (8, 8, 13) and record["hr_image"].shape[1:] == (64, 64, 3)
    inside = record["s2_image"][record["s2_valid"] > 0]
    assert 100 < np.median(inside[:, SENSORS["s2"].bands.index("B04")]) < 6000, "the +1000 offset is gone"
    assert -35 < np.median(record["s1_image"]) < 0 if len(record["s1_image"]) else True


def test_command_writes_a_png_that_says_synthetic(dataset, tmp_path, capsys):
    out = tmp_path / "deep" / "place.png"
    assert cli.main(["data", "preview", str(dataset), "--place", "synthetic_00003", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    image = np.asarray(Image.open(out))
    assert image.shape[0] > 500 and image.shape[1] > 1000
    assert (image == np.array(BADGE)).all(-1).sum() > 1000


def test_number_and_name_mean_the_same_place(dataset):
    record, _ = places.read_place(dataset, "0")
    again, _ = places.read_place(
        dataset, record["place"].decode() if isinstance(record["place"], bytes) else record["place"]
    )
    assert np.array_equal(record["label_map"], again["label_map"]) and record["lon"] == again["lon"]
    for wrong in ("6", "nowhere"):
        with pytest.raises(ValueError, match="has no place"):
            places.read_place(dataset, wrong)


def test_refuses_a_folder_that_is_no_dataset_and_other_formats(dataset, tmp_path):
    with pytest.raises(ValueError, match="not a dataset"):
        places.read_place(tmp_path, "0")
    with pytest.raises(ValueError, match="PNG"):
        places.preview(dataset, "0", tmp_path / "x.jpg")


def _record(**changes):
    record = {
        "place": b"somewhere",
        "lon": 1.0,
        "lat": 2.0,
        "crs": b"EPSG:32631",
        "label": np.zeros(1, np.uint8),
        "label_map": np.full((8, 8), 255, np.uint8),
    }
    for name, sensor in SENSORS.items():
        size = 8 if sensor.grid == "base" else 64
        record |= {
            f"{name}_image": np.zeros((0, size, size, len(sensor.bands)), sensor.dtype),
            f"{name}_date": np.zeros(0, np.int32),
        }
        record |= {f"{name}_{mask}": np.zeros((0, size, size), np.uint8) for mask in ("valid", "clear")}
    return record | changes


META = {"tile": 8, "ratio": 8, "gsd": 10.0, "synthetic": False, "label_classes": [], "label_map_classes": {}}


def test_a_place_without_anything_still_draws_and_real_data_has_no_badge():
    """Panels of hr, of the surface model and of labels in the light grey of no value; and only the badge is red."""
    image, synthetic = (np.asarray(places.draw(_record(), META | {"synthetic": said})) for said in (False, True))
    assert not (image == np.array(BADGE)).all(-1).any()
    rows, columns = np.nonzero((image != synthetic).any(-1))
    assert 4 <= rows.min() and rows.max() <= 28, "in the line of the title"
    assert image.shape[1] - 130 <= columns.min() and columns.max() <= image.shape[1] - 8, "at its right end"
    assert (synthetic[4:29, -130:-8] == np.array(BADGE)).all(-1).mean() > 0.5
    edges = (image == 170).all(-1).sum(0) >= 384
    assert np.flatnonzero(edges).tolist() == [10, 394, 404, 788], "empty frames: the two panels that are missing"
    unlabelled = (image == 235).all(-1)
    assert unlabelled[52 : 52 + 384, 798 : 798 + 384].all(), "the map of labels"


def test_invalid_pixels_are_hatched_not_black():
    colour = np.full((1, 8, 8, 13), 800, np.uint16)
    valid = np.ones((1, 8, 8), np.uint8)
    valid[:, :, :4] = 0
    shown = places.hatch(places.true_colour(colour[0]), valid[0] > 0)
    assert set(np.unique(shown[:, :4])) == {90, 130} and (shown[:, 4:] == shown[0, 7]).all()
    places.draw(_record(s2_image=colour, s2_valid=valid, s2_clear=valid, s2_date=np.array([19000], np.int32)), META)


def test_a_sensor_without_dates_is_drawn_too(monkeypatch):
    plain = places.draw(_record(), META)
    monkeypatch.setitem(SENSORS, "thermal", SENSORS["dsm"]._replace(name="thermal", grid="base", heights=False))
    seen = {
        "thermal_image": np.ones((1, 8, 8, 1), np.float32),
        "thermal_valid": np.ones((1, 8, 8), np.uint8),
        "thermal_clear": np.ones((1, 8, 8), np.uint8),
        "thermal_date": np.array([NO_DATE], np.int32),
    }
    assert places.draw(_record(**seen), META).height > plain.height


def test_stretches_are_fixed_and_relief_is_lit_from_the_north_west():
    dark, bright = (places.true_colour(np.full((2, 2, 13), dn, np.uint16)) for dn in (300, 2600))
    assert dark.max() < 100 and (bright == 255).all()
    small, large = (places.radar_colour(np.full((side, side, 2), -10.0, np.float32)) for side in (2, 3))
    assert (small == large[0, 0]).all()
    y, x = np.mgrid[0:16, 0:16].astype(np.float32)
    facing, turned = places.hillshade(x + y, 1.0)[8, 8], places.hillshade(-(x + y), 1.0)[8, 8]
    assert facing.sum() > turned.sum(), "ground that rises to the south-east faces the north-west sun"


def test_date_text():
    assert places.date_text(0) == "1970-01-01" and places.date_text(NO_DATE) == "no date"
