"""A sensor is one row of the table: nothing else asks for its name, and a made-up fifth one goes the whole way."""

import ast
import csv
import json
import pathlib

import numpy as np
import pytest

from skysense_jax import cli, networks, sensors
from skysense_jax import train as training
from skysense_jax.core import exits
from skysense_jax.data import records
from skysense_jax.data.batches import radiometry
from skysense_jax.draw import places
from skysense_jax.models.prepare import prepare
from skysense_jax.run.preempt import Preemption
from skysense_jax.sensors import SENSORS, Mistake, Offset, Sensor, Unit
from tests.helpers import noise_dataset
from tests.helpers.rasters import WEST, catalog, dn, refused, run, write
from tests.helpers.rasters import one as only_record

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skysense_jax"
MAY_COMPARE = {
    "sensors.py": "the table itself",
    "convert/modeling_skysense.py": "ships alone with the weights and imports nothing of the package",
}


def literals(node: ast.AST) -> set[str]:
    """Texts that one side of a comparison states, also in a tuple, list or set."""
    sides = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return {side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)}


def test_sensors_are_compared_nowhere_but_in_the_table():
    """A comparison with the name of a sensor, or with the name of a grid, is a rule that belongs to the row."""
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        path = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare) and path not in MAY_COMPARE:
                texts = set().union(*map(literals, [node.left, *node.comparators]))
                if texts & (set(SENSORS) | {"base", "fine"}):
                    wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
    for path in MAY_COMPARE:
        assert (PACKAGE / path).is_file(), f"{path} is allowed to compare and does not exist"


@pytest.mark.parametrize("name", SENSORS)
def test_every_row_is_whole(name):
    row = SENSORS[name]
    assert row.name == name and len(row.bands) == len(row.mean) == len(row.std) == len(set(row.bands))
    assert row.units[row.unit] == Unit() and row.grid in ("base", "fine") and row.pair in ("", *SENSORS)
    assert row.disturbance == radiometry.NONE or row.disturbance in radiometry.DISTURBANCES
    assert row.picture == places.FIRST_BAND or row.picture in places.PICTURES
    assert set(row.aliases.values()) <= set(row.bands) and len(row.colour_bands) in (0, 3)
    assert all(sensors.band_name(name, word) in row.bands for word in row.band_words)
    others = set().union(*(other.words for other in SENSORS.values() if other is not row))
    assert not row.words & others, "a word that stands for two sensors recognises none"


def test_contracts_keep_their_words():
    """Checkpoints and exports hold "hr" and "s2" for the grids; rows say fine and base. One function reads both."""
    contract = sensors.input_contract({name: row.bands for name, row in SENSORS.items()}, 4)
    words = {name: rule["grid"] for name, rule in contract["sensors"].items()}
    assert words == {"hr": "hr", "s2": "s2", "s1": "s2", "dsm": "hr"}
    for name, row in SENSORS.items():
        rule = contract["sensors"][name]
        assert sensors.pixels_per_base(row, 4) == sensors.pixels_per_base(rule, 4) == {"hr": 4, "s2": 1}[rule["grid"]]
    assert sensors.base_grid_first() == ("s2", "s1", "hr", "dsm"), "the first one that a place has lays its grid"


# ---------------------------------------------------------------- a fifth sensor

LANDSAT = Sensor(
    name="landsat",
    title="Landsat",
    bands=("RED", "NIR08"),
    aliases={"b4": "RED", "b5": "NIR08"},
    unit="dn",
    units={"dn": Unit(), "reflectance": Unit(factor=40000.0)},
    dtype="uint16",
    grid="base",
    dated=True,
    gsd=30.0,
    plausible=(0.0, 40000.0),
    mean=(3000.0, 9000.0),
    std=(2000.0, 4000.0),
    source="made up for a test",
    disturbance="reflectance",
    picture="first band",
    words=frozenset({"landsat", "lc08"}),
    nodata=0.0,
    floor=1.0,
    offset=Offset(-8000.0, ("REFLECTANCE_ADD",), (), 40000.0, "RED", -800.0, -16000.0),
    band_words=frozenset({"red", "nir08"}),
    mistakes=(Mistake(0.0, 2.0, False, "are you passing reflectance? Multiply by 40000"),),
    pair="s2",
)
"""Everything in it differs from Sentinel-2's row: a rule that is not read from the row shows."""

TILE, RATIO, PLACES = noise_dataset.TILE, noise_dataset.RATIO, 10


@pytest.fixture()
def table(monkeypatch):
    """The table with one more row."""
    monkeypatch.setitem(SENSORS, LANDSAT.name, LANDSAT)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with PLACES places of Landsat and Sentinel-2 rasters, and what Landsat's digital numbers are."""
    root = tmp_path_factory.mktemp("world")
    numbers = {}
    for place in range(PLACES):
        name = f"p{place:02}"
        numbers[name] = dn(2, TILE, TILE, low=9000, high=20000)
        where = {"west": WEST + 1000.0 * place, "step": 10.0}
        write(root / name / f"LC08_{name}_20210601.tif", numbers[name], bands=("red", "NIR08"), **where)
        write(root / name / f"S2A_{name}_20210603.tif", dn(13, TILE, TILE), bands=SENSORS["s2"].bands, **where)
    return root, numbers


def built(root: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The dataset of a drafted catalog, its open questions answered."""
    assert run("catalog", root) == 0
    source = root / "places.csv"
    rows = list(csv.DictReader(source.open()))
    for row in rows:
        row["offset"] = f"{LANDSAT.offset.usual:g}" if row["sensor"] == LANDSAT.name else "0"
        row["split"] = "test" if row["place"] > "p07" else "train"
    catalog(root, rows)
    sizes = ("--tile", TILE, "--ratio", RATIO, "--workers", 1)
    assert run("build", "--catalog", source, "--out", out, *sizes) == 0
    return out


def test_a_fifth_sensor_goes_from_raster_to_weights(table, world, tmp_path, capsys):
    root, numbers = world
    data, workdir, weights = built(root, tmp_path / "data"), tmp_path / "run", tmp_path / "weights"
    asked = capsys.readouterr().out
    assert "landsat 10" in asked and "offset: not known from metadata; -8000 where" in asked, "drafted by its words"
    for number in range(2):
        record, meta = records.read_place(data, str(number))
        place = records.as_text(record["place"])
        expected = np.moveaxis(numbers[place] - 8000, 0, -1)
        np.testing.assert_array_equal(record["landsat_image"][0], expected)
    assert meta["sensors"] == ["s2", "landsat"] and not meta["report"]["refused"]

    assert run("stats", data) == 0
    assert run("preview", data, "--place", "0", "--out", tmp_path / "place.png") == 0
    config = f"{ROOT / 'configs' / 'msgfm_tiny.py'}:s2,landsat"
    words = ["--config", config, "--workdir", str(workdir), f"--config.data.dir={data}", "--config.steps=3"]
    options = training.parse([*words, "--config.data.statistics=dataset", "--config.run.save_every=3"])
    preemption = Preemption()
    try:
        assert training.run(options, 0, 1, preemption) == exits.DONE
    finally:
        preemption.close()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/landsat-landsat", "loss/landsat-s2"} <= set(lines[0]), "trained, also across to its pair"

    assert cli.main(["export-torch", str(workdir), "--out", str(weights)]) == 0
    assert cli.main(["inspect", str(weights)]) == 0
    said = capsys.readouterr().out
    assert f"landsat: [dates, rows, columns, 2], dn, base grid, about {LANDSAT.gsd:g} m, dated acquisitions" in said
    record, _ = records.read_place(data, "0")
    place = {"landsat": {"image": record["landsat_image"].astype(np.float32), "dates": ["2021-06-01"]}}
    results = [networks.load(folder).features(place) for folder in (workdir, weights)]
    for feature in ("image", "landsat_pixel"):
        np.testing.assert_array_equal(results[0][feature], results[1][feature])
        assert np.isfinite(results[0][feature]).all()


def test_the_rules_are_those_of_the_row(table, tmp_path):
    image = dn(2, 16, 16, low=9000, high=20000)
    rows = {"sensor": "landsat", "datetime": "2021-06-01", "bands": "RED,NIR08"}
    write(tmp_path / "lc.tif", image)
    reason = refused(tmp_path, {**rows, "path": "lc.tif"})
    assert "the Landsat offset is not known" in reason and "offset=-8000" in reason and "MTD" not in reason
    assert SENSORS["s2"].offset.product == "MTD_MSIL*.xml" and not LANDSAT.offset.product
    write(tmp_path / "tagged.tif", image, tags={"REFLECTANCE_ADD": "-8000"})
    record, _ = only_record(tmp_path, {**rows, "path": "tagged.tif"})
    np.testing.assert_array_equal(record["landsat_image"][0], np.moveaxis(image - 8000, 0, -1))
    write(tmp_path / "share.tif", np.full((2, 16, 16), 0.25, np.float32))
    record, _ = only_record(tmp_path, {**rows, "path": "share.tif", "units": "reflectance"})
    assert (record["landsat_image"] == 10000).all(), "the row's factor, not that of Sentinel-2"
    write(tmp_path / "low.tif", dn(2, 16, 16, low=100, high=5000))
    assert "clearly below zero (under -800)" in refused(tmp_path, {**rows, "path": "low.tif", "offset": "-8000"})


def test_a_sensor_of_several_units_without_a_rule_needs_them_declared(monkeypatch, tmp_path):
    row = SENSORS["dsm"]._replace(name="bathymetry", units={"m": Unit(), "reflectance": Unit(factor=0.5)})
    monkeypatch.setitem(SENSORS, row.name, row)
    write(tmp_path / "a.tif", np.full((16, 16), 8, np.float32))
    cells = {"sensor": row.name, "datetime": "", "path": "a.tif"}
    assert "say m or reflectance" in refused(tmp_path, cells)
    record, _ = only_record(tmp_path, {**cells, "units": "reflectance"})
    assert (record["bathymetry_image"] == 4).all()


def test_it_lays_the_grid_where_it_is_the_first(table, tmp_path):
    """Base grid before fine grid: Landsat decides where the tiles lie, not the aerial image beside it."""
    write(tmp_path / "lc.tif", dn(2, 16, 16, low=9000, high=20000), west=WEST + 4)
    write(tmp_path / "hr.tif", dn(3, 32, 32, high=250).astype(np.uint8), step=5.0)
    rows = {"sensor": "landsat", "datetime": "2021-06-01", "bands": "RED,NIR08", "offset": "-8000", "path": "lc.tif"}
    record, _ = only_record(tmp_path, rows, {"sensor": "hr", "datetime": "", "bands": "R,G,B", "path": "hr.tif"})
    assert record["footprint"][0] == WEST + 4


def test_it_is_augmented_and_its_mistakes_are_named(table):
    planes = np.full((1, 2, 4, 4), 5000, np.float32)
    changed = radiometry.disturb(
        np.random.default_rng(0), "landsat", planes, None, "local", {"s2_gain": 0.1, "s2_band_gain": 0.1}
    )
    assert changed.shape == planes.shape and not np.array_equal(changed, planes)
    contract = sensors.input_contract({"landsat": LANDSAT.bands}, RATIO)
    image = np.full((1, 8, 8, 2), 0.3)
    with pytest.raises(ValueError, match="are you passing reflectance. Multiply by 40000"):
        prepare(contract, {"landsat": {"image": image, "dates": ["2021-06-01"]}})


def test_a_draft_takes_band_descriptions_before_folders(table, tmp_path):
    write(tmp_path / "s2" / "x_20210601.tif", dn(2, 8, 8), bands=("RED", "nir08"))
    assert run("catalog", tmp_path) == 0
    [row] = csv.DictReader((tmp_path / "places.csv").open())
    assert row["sensor"] == "landsat" and row["place"] == "s2"
