"""The Python door: every check names the sensor and the rule; loading from a workdir, a checkpoint or an export gives
the same features."""

import argparse
import datetime
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import skysense_jax
from skysense_jax import cli, evaluation, recipes, sensors
from skysense_jax.commands import export_torch
from skysense_jax.core import exits
from skysense_jax.core.config import read_config
from skysense_jax.data.batches import spec
from skysense_jax.models import prepare
from skysense_jax.objectives.skysense import make_objective
from skysense_jax.run import checkpoint, state
from tests.helpers import noise_dataset

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "skysense_tiny.py"
BANDS = {"hr": ("R", "G", "B"), "s2": ("B02", "B03", "B04", "B08"), "s1": ("VV", "VH")}
CONTRACT = sensors.input_contract(BANDS, ratio=4)


def place(batch: int = 0) -> dict:
    """Plausible input of one place of 8 x 8 base pixels, or of `batch` of them."""
    rng = np.random.default_rng(0)
    lead = (batch,) if batch else ()
    dates = {"s2": ["2023-01-05", "2023-06-30", "2023-12-31"], "s1": [4, 180]}
    return {
        "hr": {"image": rng.integers(0, 256, (*lead, 1, 32, 32, 3)).astype(np.uint8)},
        "s2": {
            "image": rng.integers(300, 3000, (*lead, 3, 8, 8, 4)),
            "dates": [dates["s2"]] * batch if batch else dates["s2"],
        },
        "s1": {
            "image": rng.normal(-14, 3, (*lead, 2, 8, 8, 2)),
            "dates": [dates["s1"]] * batch if batch else dates["s1"],
        },
    }


def changed(sensor: str, **fields) -> dict:
    given = place()
    given[sensor] = {**given[sensor], **fields}
    return given


def test_prepare_batches_and_keeps_the_values():
    inputs, batched = prepare.prepare(CONTRACT, place())
    assert not batched
    assert {name: entry["image"].shape for name, entry in inputs.items()} == {
        "hr": (1, 1, 32, 32, 3),
        "s2": (1, 3, 8, 8, 4),
        "s1": (1, 2, 8, 8, 2),
    }
    np.testing.assert_array_equal(inputs["s2"]["image"][0], place()["s2"]["image"])
    np.testing.assert_array_equal(inputs["s2"]["dates"], [[4, 180, 364]])
    np.testing.assert_array_equal(inputs["hr"]["dates"], [[-1]])
    assert all(entry["valid"].all() and entry["bands"].all() for entry in inputs.values())
    assert {entry[key].dtype.name for entry in inputs.values() for key in ("image", "valid", "bands")} == {"float32"}
    inputs, batched = prepare.prepare(CONTRACT, place(batch=3))
    assert batched and inputs["s1"]["image"].shape == (3, 2, 8, 8, 2) and inputs["s1"]["dates"].shape == (3, 2)


def test_prepare_reads_every_kind_of_date():
    kinds = [
        datetime.date(2024, 12, 31),
        np.datetime64("2023-03-01T10:00"),
        datetime.datetime(2024, 3, 1, 5, tzinfo=datetime.UTC),
    ]
    assert prepare.prepare(CONTRACT, changed("s2", dates=kinds))[0]["s2"]["dates"].tolist() == [[364, 59, 60]]
    kinds = ["1965-02-01", "2023-02-01T23:59:59Z", 365]
    assert prepare.prepare(CONTRACT, changed("s2", dates=kinds))[0]["s2"]["dates"].tolist() == [[31, 31, 364]]


def test_prepare_finds_invalid_pixels():
    given = place()
    given["s2"]["image"][1, 2, 3, 0] = 0  # the nodata value of Sentinel-2
    given["s1"]["image"][0, 1, 1, 1] = np.nan
    inputs, _ = prepare.prepare(CONTRACT, given)
    assert inputs["s2"]["valid"][0, 1, 2, 3] == 0 and inputs["s2"]["valid"].sum() == 3 * 64 - 1
    assert inputs["s1"]["valid"][0, 0, 1, 1] == 0 and (inputs["s1"]["image"][0, 0, 1, 1] == 0).all()
    valid = np.ones((3, 8, 8), bool)
    valid[:, :4] = False
    inputs, _ = prepare.prepare(CONTRACT, changed("s2", valid=valid))
    assert inputs["s2"]["valid"].sum() == 3 * 32 and (inputs["s2"]["image"][0, :, :4] == 0).all()


def test_prepare_accepts_names_and_units_that_agree():
    plain, _ = prepare.prepare(CONTRACT, place())
    spelled, _ = prepare.prepare(CONTRACT, changed("s2", bands=["blue", "b3", "B4", "B08"], unit="dn"))
    jax.tree.map(np.testing.assert_array_equal, spelled, plain)
    subset, _ = prepare.prepare(CONTRACT, {"hr": place()["hr"]})  # any subset of the sensors
    jax.tree.map(np.testing.assert_array_equal, subset, {"hr": plain["hr"]})


S2, S1 = place()["s2"]["image"], place()["s1"]["image"]
NORMALISED = (place()["hr"]["image"] - 120.0) / 58.0
REFUSED = {
    "empty": ({}, "at least one of the sensors hr, s2, s1"),
    "unknown sensor": ({"dsm": {"image": np.zeros((1, 8, 8, 1))}}, "takes no 'dsm'"),
    "not a dict": ({"s2": S2}, 's2: give a dict with "image"'),
    "unknown field": (changed("s2", date=["2020-01-01"] * 3), "s2: unknown field 'date'"),
    "channels": (changed("s2", image=S2[..., :3]), "s2: 3 channels given, the model expects 4: B02, B03, B04, B08"),
    "channels first": (changed("s2", image=np.moveaxis(S2, -1, 1)), r"s2: 8 channels given.*bands are the last axis"),
    "axes": (changed("s2", image=S2[0]), r"s2: image of shape \(8, 8, 4\); give \[dates, rows"),
    "text": (changed("s2", image=np.full(S2.shape, "a")), "s2: image of type"),
    "nothing": (changed("s2", image=S2[:0], dates=[]), "s2: image of shape .* holds nothing"),
    "order": (
        changed("s2", bands=["B04", "B03", "B02", "B08"]),
        r"s2: bands \['B04', 'B03', 'B02', 'B08'\] given, the model expects",
    ),
    "unknown band": (changed("s2", bands=["B02", "B03", "B04", "B42"]), "band 'B42' is not a band of sensor 's2'"),
    "unit": (changed("s1", unit="linear_power"), "s1: unit 'linear_power' given, the model expects 'db'"),
    "reflectance": (changed("s2", image=S2 / 1e4), r"s2: .*reflectance 0..1\? .*multiply by 10000"),
    "hr scaled": (changed("hr", image=place()["hr"]["image"] / 255), r"hr: .*0..1\? The model expects 0..255"),
    "hr normalised": (
        changed("hr", image=NORMALISED),
        "hr: .*outside the plausible 0 .. 255 dn.*normalisation belongs to the model",
    ),
    "linear power": (
        changed("s1", image=10 ** (S1 / 10)),
        "s1: .*looks like linear power or amplitude; the model expects decibels",
    ),
    "absurd": (changed("s2", image=S2 * 20), r"s2: .*outside the plausible"),
    "statistics": (changed("s2", image=S2 + 20000), "s2: band B08 has mean .* deviations|s2: band B0. has mean"),
    "nan marked valid": (
        changed("s1", image=np.where(S1 > -14, np.nan, S1), valid=np.ones((2, 8, 8))),
        "s1: .* pixels marked valid hold NaN",
    ),
    "valid shape": (
        changed("s2", valid=np.ones((3, 8, 4))),
        r"s2: valid of shape \(3, 8, 4\) does not match .*\(3, 8, 8\)",
    ),
    "valid values": (changed("s2", valid=np.full((3, 8, 8), 255)), "s2: valid must hold 0 and 1 only"),
    "nothing valid": (changed("s2", image=np.zeros_like(S2)), "s2: no valid pixel at all"),
    "no dates": ({"s2": {"image": S2}}, 's2: a time series needs "dates"'),
    "number of dates": (changed("s2", dates=["2020-01-01"]), "s2: 1 dates given for 3 acquisitions"),
    "date as text": (changed("s2", dates="2020-01-01"), "s2: give dates as a list"),
    "a missing date": (
        changed("s2", dates=["2020-01-01", None, "2020-02-01"]),
        "s2: an acquisition of a time series without a date",
    ),
    "year only": (changed("s2", dates=["2020", "2021", "2022"]), "s2: '2020' is not a full date"),
    "no date": (changed("s2", dates=["2020-13-01"] * 3), "s2: '2020-13-01' is no date"),
    "year as day": (changed("s2", dates=[2020, 2021, 2022]), "s2: 2020 is no day of the year"),
    "float as day": (changed("s2", dates=[1.0, 2.0, 3.0]), "s2: 1.0 is no date"),
    "not a time": (changed("s2", dates=[np.datetime64("NaT")] * 3), "s2: not a date"),
    "ratio": (
        changed("hr", image=place()["hr"]["image"][:, :30]),
        "hr: 30x32 pixels; rows and columns must be multiples of the ratio 4",
    ),
    "ground": (changed("hr", image=place()["hr"]["image"][:, :16]), r"do not cover the same ground: .*'hr': \(4, 8\)"),
    "axes differ": ({**place(), "s2": place(batch=1)["s2"]}, "some sensors have a batch axis"),
    "places differ": ({**place(batch=2), "s2": place(batch=3)["s2"]}, "different numbers of places"),
    "dates of a batch": (
        {"s2": {**place(batch=2)["s2"], "dates": ["2020-01-01"] * 3}},
        "s2: dates for 3 places given, the images hold 2",
    ),
    "flat dates of a batch": (
        {"s2": {**place(batch=3)["s2"], "dates": [1, 2, 3]}},
        "s2: a batch needs one list of dates per place",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_prepare_refuses(case):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prepare.prepare(CONTRACT, given)


def test_importing_the_package_is_light():
    code = (
        "import sys, skysense_jax; print(skysense_jax.__version__); "
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == skysense_jax.__version__
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = skysense_jax.lode


# --- networks on disk -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with one checkpoint of freshly drawn weights, its dataset, and the export of the same weights."""
    root = tmp_path_factory.mktemp("run")
    cfg = read_config(CONFIG)
    cfg.data.dir = noise_dataset.write_dataset(root / "data", 12)
    cfg.eval.batch, cfg.eval.bootstrap = 5, 20
    meta = json.loads((root / "data" / "places.json").read_text())
    (root / "data" / "places.json").write_text(
        json.dumps({**meta, "label_map_classes": {"0": "water", "1": "trees", "2": "crops"}})
    )
    contract = sensors.input_contract(cfg.data.bands.to_dict(), cfg.model.ratio)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        recipes.recipe_of(cfg).batch_spec(cfg, contract),
        is_leaf=lambda node: isinstance(node, spec.Leaf),
    )
    made = jax.jit(lambda: state.init_state(make_objective(cfg, contract), shapes, cfg.seed + 1))()
    saver = checkpoint.Saver(root / "work", keep=1)
    saver.save(
        made,
        {"step": 0},
        {"config": json.loads(cfg.to_json()), "contract": contract, "dataset_id": "noise", "code": {"jax": "x"}},
    )
    saver.close()
    assert cli.main(["export-torch", str(root / "work"), "--out", str(root / "export")]) == 0
    return root


def given_place() -> dict:
    record = noise_dataset.record(0)
    index = [sensors.SENSORS["s2"].bands.index(band) for band in sensors.SKYSENSE_BANDS["s2"]]
    return {
        "hr": {"image": record["hr_image"]},
        "s2": {"image": record["s2_image"][..., index], "dates": [10, 100, 200]},
        "s1": {"image": record["s1_image"], "dates": ["2020-02-01", "2020-07-01"], "unit": "db"},
    }


def test_the_same_weights_give_the_same_features_wherever_they_lie(run):
    from_workdir, from_step, from_export = (
        skysense_jax.load(run / part) for part in ("work", "work/checkpoints/0", "export")
    )
    expected = from_workdir.features(given_place())
    assert (
        expected["image"].shape == (32,)
        and expected["pixel"].shape == (8, 8, 32)
        and expected["s1_image"].shape == (32,)
    )
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in expected.values())
    for other in (from_step, from_export):
        assert json.loads(json.dumps(other.contract)) == json.loads(json.dumps(from_workdir.contract))
        assert other.config.to_dict() == from_workdir.config.to_dict()
        found = other.features(given_place())
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_features_of_a_subset_of_sensors_and_of_a_batch(run):
    loaded = skysense_jax.load(run / "export")
    alone = loaded.features({"s1": given_place()["s1"]})
    assert set(alone) == {"image", "pixel", "s1_image", "s1_pixel"}
    entry = given_place()["s1"]
    both = loaded.features({"s1": {"image": np.stack([entry["image"]] * 2), "dates": [entry["dates"]] * 2}})
    assert both["image"].shape == (2, 32)
    np.testing.assert_allclose(both["image"][1], alone["image"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="s1: .*looks like linear power"):
        loaded.features({"s1": {**entry, "image": 10 ** (entry["image"] / 10)}})


def test_loading_refuses_what_is_no_network(run, tmp_path):
    with pytest.raises(ValueError, match="is a dataset, not a network"):
        skysense_jax.load(run / "data")
    with pytest.raises(ValueError, match="none of the folders known here: a dataset has places.json"):
        skysense_jax.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        skysense_jax.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="exported already"):
        export_torch.run(argparse.Namespace(path=run / "export", out=tmp_path / "again"))


def test_eval_scores_both_tasks_beside_both_baselines(run, capsys):
    out = run / "eval.json"
    assert cli.main(["eval", str(run / "work"), "--data", str(run / "data"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "SYNTHETIC DATA" in printed and "trained - untrained" in printed and "patch of 4x4 base pixels" in printed
    report = json.loads(out.read_text())
    assert (
        set(report["tasks"]) == {"scene", "patch"} and report["dataset"]["synthetic"] and report["network"]["step"] == 0
    )
    assert report["tasks"]["scene"]["n"] == {"train_rows": 12, "train_places": 12, "test_rows": 6, "test_places": 6}
    assert report["tasks"]["patch"]["n"] == {"train_rows": 48, "train_places": 12, "test_rows": 24, "test_places": 6}
    assert report["tasks"]["patch"]["class_names"] == ["water", "trees", "crops"]
    for task in report["tasks"].values():
        assert {(r["method"], r["probe"]) for r in task["results"]} == {
            (method, probe) for method in ("trained", "untrained", "statistics") for probe in ("knn", "linear")
        }
    again = evaluation.evaluate(run / "export", run / "data")  # the same weights: the same numbers
    assert again["tasks"] == report["tasks"]


def test_eval_of_one_sensor_scores_only_places_that_have_it(run):
    report = evaluation.evaluate(run / "work", run / "data", task="scene", features="s1")
    assert report["tasks"]["scene"]["n"] == {"train_rows": 10, "train_places": 10, "test_rows": 5, "test_places": 5}
    with pytest.raises(ValueError, match="--features dsm: the network gives fused, "):
        evaluation.evaluate(run / "work", run / "data", features="dsm")


def test_eval_refuses_a_task_without_labels(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run / "data", bare)
    meta = json.loads((bare / "places.json").read_text())
    (bare / "places.json").write_text(json.dumps({**meta, "label_map_classes": {}}))
    with pytest.raises(ValueError, match="--task patch: the dataset has no label map; it has scene"):
        evaluation.evaluate(run / "work", bare, task="patch")
    (bare / "places.json").write_text(json.dumps({**meta, "label_map_classes": {}, "label_classes": []}))
    with pytest.raises(ValueError, match="neither scene labels nor a label map"):
        evaluation.evaluate(run / "work", bare)


def test_inspect_says_what_a_folder_is_and_what_it_expects(run, capsys):
    def printed(*words: str) -> str:
        assert cli.main(["inspect", *words]) == 0
        return capsys.readouterr().out

    for part, title in (
        ("work", "workdir (newest checkpoint)"),
        ("work/checkpoints/0", "checkpoint"),
        ("export", "exported weights"),
    ):
        text = printed(str(run / part))
        assert title in text and "input expected: 4 HR pixels along one base pixel" in text
        assert "s1: [dates, rows, columns, 2], db, base grid" in text and "B8A" in text and "encoder/fusion" in text
    text = printed(str(run / "data"))
    assert (
        "SYNTHETIC DATA" in text
        and "train 12, test 6" in text
        and "0=water, 1=trees, 2=crops" in text
        and "no statistics" in text
    )
    meta = json.loads((run / "data" / "places.json").read_text())
    own = {"mean": [-11.5, -18.25], "std": [3.0, 4.0], "n": [12345, 0], "date": "2026-01-02", "sha256": "abc"}
    (run / "data" / "places.json").write_text(json.dumps({**meta, "statistics": {"s1": own}}))
    text = printed(str(run / "data"))
    assert "-18.2500" in text and "n 12,345" in text and "2026-01-02" in text
    text = printed("--config", str(CONFIG))
    assert "params" in text and "heads/fused" in text and "all of teacher" in text and "statistics: " in text
    assert cli.main(["inspect"]) == exits.BAD_INPUT
    assert "give a path, or --config FILE" in capsys.readouterr().err


# --- the command ----------------------------------------------------------------------------------


def test_help_of_every_command_says_what_it_does(capsys):
    words = [
        ["--help"],
        *([name, "--help"] for name in cli.COMMANDS if name != "train"),
        *(["data", action, "--help"] for action in ("build", "check", "catalog", "stats", "synth", "preview", "bench")),
    ]
    for line in words:
        with pytest.raises(SystemExit) as stop:
            cli.main(line)
        text = capsys.readouterr().out
        assert stop.value.code == 0 and len(text.splitlines()[2 if "\n\n" in text else 0 :]) > 2, line
    for name, text in cli.COMMANDS.items():
        assert text and "\n" not in text, name


def test_top_level_help_imports_nothing_heavy():
    code = (
        "import sys; from skysense_jax import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'jax', 'numpy', 'rasterio', 'tensorflow_datasets', 'sklearn'} & set(sys.modules)"
    )
    assert (
        "export-torch"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def test_exit_codes(run, capsys):
    assert cli.main(["eval", str(run / "nowhere"), "--data", str(run / "data")]) == 78
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["eval", str(run / "work"), "--data", str(run)]) == 78
    assert "is not a dataset of places" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval"])
    assert stop.value.code == 78
    with pytest.raises(SystemExit) as stop:
        cli.main(["fly"])
    assert stop.value.code == 78


def test_a_fault_of_ours_keeps_its_traceback():
    """Only a ValueError that this package raises is a refusal; one from inside a library is not dressed up as bad
    input."""
    try:
        np.zeros(3).reshape(2, 2)
    except ValueError as error:
        assert not cli._is_refusal(error)
    try:
        prepare.prepare(CONTRACT, {})
    except ValueError as error:
        assert cli._is_refusal(error)
