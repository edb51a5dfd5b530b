"""Catalog to TFDS dataset: readable by TFDS, the same records however it was run or killed, statistics, commands,
real files.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from skysense_jax.data import statistics
from skysense_jax.data.ingest import build as dataset_build
from skysense_jax.data.ingest import report
from skysense_jax.data.ingest.catalog import read_catalog
from skysense_jax.sensors import SENSORS
from tests.helpers.build_worlds import OPTIONS, damaged_world, world
from tests.helpers.rasters import catalog, run, s2, write


def records(folder):
    """Split -> list of records, read the way every other part of the package reads them."""
    dataset = tfds.builder_from_directory(str(folder))
    return {split: list(dataset.as_data_source(split=split)) for split in dataset.info.splits}


def same(one, two):
    one, two = records(one), records(two)
    assert one.keys() == two.keys()
    for split in one:
        assert len(one[split]) == len(two[split])
        for left, right in zip(one[split], two[split], strict=True):
            for name in left:
                np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return catalog(root, world(root))


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "dataset"
    dataset_build.build(source, out, OPTIONS, progress=False)
    return out


def test_tfds_reads_what_was_measured(source, straight):
    import rasterio

    found = records(straight)
    meta = json.loads((straight / dataset_build.METADATA).read_text())
    assert meta["splits"] == {name: len(part) for name, part in found.items()} and sum(meta["splits"].values()) == 6
    assert (
        meta["label_classes"] == ["even", "odd"]
        and meta["sensors"] == ["hr", "s2", "s1"]
        and meta["synthetic"] is False
    )
    assert not (straight / dataset_build.PARTS).exists()
    for record in (record for part in found.values() for record in part):
        place = record["place"].decode()
        index = int(place[1:])
        assert record["label"].tolist() == [1 - index % 2, index % 2] and (record["label_map"] == 255).all()
        assert record["footprint"][0] == 300_000 + 1000 * index and record["lon"].dtype == np.float64
        assert len(record["s1_date"]) == bool(index % 3) and record["s1_image"].shape[1:] == (8, 8, 2)
        assert record["hr_image"].shape == (1, 16, 16, 3) and record["hr_date"].tolist() == [-1]
        assert np.diff(record["s2_date"]).tolist() == [61]
        with rasterio.open(source.parent / place / "s2_2021-03-01.tif") as file:
            np.testing.assert_array_equal(record["s2_image"][0][..., [3, 7]], np.moveaxis(file.read(), 0, -1))


def test_processes_change_nothing(source, straight, tmp_path):
    meta, worked = dataset_build.build(source, tmp_path / "d", OPTIONS, workers=2, progress=False)
    assert worked and meta["dataset_id"] == json.loads((straight / dataset_build.METADATA).read_text())["dataset_id"]
    same(straight, tmp_path / "d")


def test_a_second_run_does_nothing_and_other_options_are_an_error(source, straight):
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    meta, worked = dataset_build.build(source, straight, OPTIONS, progress=False)
    assert not worked and {path.name: path.stat().st_mtime_ns for path in straight.iterdir()} == before
    with pytest.raises(dataset_build.BuildError, match="gsd: 10.0 there, 20.0 now"):
        dataset_build.build(source, straight, OPTIONS._replace(gsd=20.0), progress=False)


def test_a_folder_with_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(dataset_build.BuildError, match="neither empty nor an unfinished build"):
        dataset_build.build(source, tmp_path, OPTIONS, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


def test_an_unfinished_build_does_not_take_another_catalog(source, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_build.tfds.folder_dataset, "write_metadata", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dataset_build.build(source, tmp_path / "d", OPTIONS, progress=False)
    with pytest.raises(dataset_build.BuildError, match="tile: 8 there, 4 now"):
        dataset_build.build(source, tmp_path / "d", OPTIONS._replace(tile=4), progress=False)


def test_stopped_while_finishing(source, straight, tmp_path, monkeypatch):
    """Some parts already have their shard names: the next run goes on from there."""
    moved, move = [], dataset_build.move

    def stop(*arguments):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(move(*arguments))

    monkeypatch.setattr(dataset_build, "move", stop)
    with pytest.raises(KeyboardInterrupt):
        dataset_build.build(source, tmp_path / "d", OPTIONS, progress=False)
    monkeypatch.setattr(dataset_build, "move", move)
    assert not (tmp_path / "d" / dataset_build.METADATA).exists()
    dataset_build.build(source, tmp_path / "d", OPTIONS, progress=False)
    same(straight, tmp_path / "d")


PROGRAM = """
import sys
from skysense_jax.data.ingest import build as builder
if __name__ == "__main__":
    options = builder.Options(tile=8, ratio=2, shard_places=1)
    builder.build(sys.argv[1], sys.argv[2], options, workers=int(sys.argv[3]), progress=False)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_continued_gives_the_same_records(tmp_path, workers):
    """SIGKILL at two points of a build, the last time with a half-written part on disk; then it is run to its end."""
    root, out = tmp_path / "world", tmp_path / "d"
    root.mkdir()
    source = catalog(root, world(root, places=14))
    dataset_build.build(source, tmp_path / "straight", OPTIONS._replace(shard_places=1), progress=False)
    (tmp_path / "build.py").write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1])}

    def start():
        return subprocess.Popen([sys.executable, tmp_path / "build.py", source, out, str(workers)], env=env)

    for parts in (1, 8):
        process, deadline = start(), time.monotonic() + 120
        while (
            len(list(out.glob("parts/*.array_record"))) < parts
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        children = []
        for task in pathlib.Path(f"/proc/{process.pid}/task").glob("*/children"):
            children += [int(pid) for pid in task.read_text().split()]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / dataset_build.METADATA).exists(), "the build was over before it could be killed"
        deadline = time.monotonic() + 30
        while any(pathlib.Path(f"/proc/{pid}/environ").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.05)  # workers end with the build, they do not go on reading
        assert not any(pathlib.Path(f"/proc/{pid}/environ").exists() for pid in children)
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.json") if path.name != "build.json"}
    assert len(finished) >= 7
    (out / "parts" / ".train-00099.tmp-1").write_bytes(b"half a record")
    assert start().wait() == 0
    same(tmp_path / "straight", out)
    left, right = (json.loads((folder / dataset_build.METADATA).read_text()) for folder in (tmp_path / "straight", out))
    assert left == right
    for shard in (tmp_path / "straight").glob("*.array_record*"):
        assert shard.read_bytes() == (out / shard.name).read_bytes()


def test_two_builds_of_one_folder_at_once(source, tmp_path):
    import fcntl

    (tmp_path / "d" / "parts").mkdir(parents=True)
    with (tmp_path / "d" / "parts" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(dataset_build.BuildError, match="another process is building"):
            dataset_build.build(source, tmp_path / "d", OPTIONS, progress=False)


@pytest.fixture
def damaged(tmp_path):
    return damaged_world(tmp_path)


def test_bad_files_never_lose_the_rest(damaged, straight, tmp_path, source):
    meta, _ = dataset_build.build(damaged, tmp_path / "d", OPTIONS, workers=2, progress=False)
    reasons = {entry["path"]: entry["reason"] for entry in meta["report"]["refused"]}
    assert len(meta["report"]["refused"]) == 5 and meta["report"]["places_without_tiles"] == ["lost"]
    assert "pixels cannot be read" in reasons["p01/cut.tif"] and "GeoTIFF" in reasons["p02/hr.tif"]
    assert "outside" in reasons["../outside.tif"] and "file not found" in reasons["p04/nothing.tif"]
    good = {record["place"]: record for part in records(straight).values() for record in part}
    for record in (record for part in records(tmp_path / "d").values() for record in part):
        for name, value in good[
            record["place"]
        ].items():  # nothing of the cut file is left, not even what could be read of it
            if (record["place"], name[:3]) != (b"p02", "hr_"):
                np.testing.assert_array_equal(record[name], value)
            elif name == "hr_date":
                assert len(record[name]) == 0
    lines = [json.loads(line) for line in (tmp_path / "d" / dataset_build.FILES).read_text().splitlines()]
    labels = sum(row.kind == "label" for rows in read_catalog(damaged).places.values() for row in rows)
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    assert len(lines) == len(damaged.read_text().splitlines()) - 1 - labels
    text = report.render(meta["report"])
    assert "refused (5)" in text and "2 x file not found" in text and "lost" in text


def test_check_says_what_a_build_says_and_writes_nothing(damaged, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*"))
    found = dataset_build.check(damaged, OPTIONS, progress=False)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    meta, _ = dataset_build.build(damaged, tmp_path / "d", OPTIONS, progress=False)
    assert found == meta["report"]


def test_splits(source, tmp_path):
    meta, _ = dataset_build.build(source, tmp_path / "none", OPTIONS._replace(holdout=0.0), progress=False)
    assert meta["splits"] == {"train": 6}
    rows = [row | {"split": "test" if row["place"] in ("p01", "p04") else "train"} for row in world(tmp_path, places=6)]
    dataset_build.build(catalog(tmp_path, rows), tmp_path / "d", OPTIONS, progress=False)
    assert sorted(record["place"] for record in records(tmp_path / "d")["test"]) == [b"p01", b"p04"]
    undecided = read_catalog(source).places["p00"]
    shares = [dataset_build.split_of(f"place {i}", undecided, 0.2) == "test" for i in range(2000)]
    assert 0.17 < np.mean(shares) < 0.23


def test_sensors_can_be_left_out(source, tmp_path):
    meta, _ = dataset_build.build(source, tmp_path / "d", OPTIONS._replace(sensors=("s1",)), progress=False)
    assert meta["sensors"] == ["s1"] and sum(meta["splits"].values()) == 4
    assert meta["report"]["places_without_tiles"] == ["p00", "p03"]
    with pytest.raises(dataset_build.BuildError, match="no such images"):
        dataset_build.build(source, tmp_path / "e", OPTIONS._replace(sensors=("dsm",)), progress=False)


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    (tmp_path / "a.tif").write_text("x")
    with pytest.raises(dataset_build.BuildError, match="neither a GeoTIFF"):
        dataset_build.build(catalog(tmp_path, [s2("a.tif", bands="B04")]), tmp_path / "d", OPTIONS, progress=False)
    with pytest.raises(dataset_build.BuildError, match="no usable image row"):
        dataset_build.build(catalog(tmp_path, [s2("b.tif", bands="B04")]), tmp_path / "d", OPTIONS, progress=False)


def test_statistics(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "d")
    found = statistics.compute(tmp_path / "d", progress=False)
    assert json.loads((tmp_path / "d" / dataset_build.METADATA).read_text())["statistics"] == found
    train = records(tmp_path / "d")["train"]
    values = np.concatenate([record["s2_image"][record["s2_valid"] > 0][:, 3] for record in train]).astype(np.float64)
    entry = found["s2"]
    assert (
        entry["n"][3] == values.size == len(train) * 2 * 64 and len(entry["sha256"]) == 64 and len(entry["date"]) == 10
    )
    np.testing.assert_allclose([entry["mean"][3], entry["std"][3]], [values.mean(), values.std()], rtol=1e-12)
    assert "B10" in entry["unmeasured"] and entry["mean"][10] == SENSORS["s2"].mean[10] and entry["n"][10] == 0
    assert statistics.compute(tmp_path / "d", progress=False) == found
    with pytest.raises(dataset_build.BuildError, match="not a complete dataset"):
        statistics.compute(tmp_path, progress=False)


def test_statistics_ignore_nodata_and_clouds(tmp_path):
    image = np.full((1, 8, 8), 1000, np.uint16)
    image[0, :4], image[0, 4:, :4] = 0, 9000
    write(tmp_path / "a.tif", image)
    write(tmp_path / "m.tif", (image[0] == 1000).astype(np.uint8))
    rows = [
        s2("a.tif", bands="B04", split="train"),
        {"sensor": "mask:s2", "datetime": "2021-06-01", "path": "m.tif", "classes": "1"},
    ]
    dataset_build.build(catalog(tmp_path, rows), tmp_path / "d", OPTIONS, progress=False)
    assert statistics.compute(tmp_path / "d", progress=False)["s2"]["mean"][3] == 5000
    entry = statistics.compute(tmp_path / "d", clear_only=True, progress=False)["s2"]
    assert entry["n"][3] == 16 and "B04" in entry["unmeasured"]  # it never varies: nothing to normalise with


def test_statistics_of_heights_do_not_know_the_datum(tmp_path):
    relief = np.arange(256, dtype=np.float32).reshape(1, 16, 16)
    rows = []
    for place, datum in (("low", 0.0), ("high", 512.0)):
        write(tmp_path / f"{place}.tif", relief + datum, step=5)
        rows.append({"place": place, "sensor": "dsm", "path": f"{place}.tif", "units": "m", "split": "train"})
    dataset_build.build(catalog(tmp_path, rows), tmp_path / "d", OPTIONS, progress=False)
    found = statistics.compute(tmp_path / "d", progress=False)["dsm"]
    np.testing.assert_allclose([found["mean"][0], found["std"][0]], [0.5, relief.std()], rtol=1e-6)


def test_commands_and_their_exit_status(source, tmp_path, capsys):
    out = tmp_path / "d"
    build = ("build", "--catalog", source, "--out", out, "--tile", 8, "--ratio", 2, "--workers", 1)
    assert run(*build) == 0 and "dates/tile" in capsys.readouterr().out
    assert run(*build) == 0 and "nothing to do" in capsys.readouterr().out
    assert run(*build, "--holdout", 0.5) == 78 and "another catalog or other options" in capsys.readouterr().err
    assert run(*build, "--workers", 0) == 78
    assert run("check", "--catalog", source, "--tile", 8, "--ratio", 2, "--workers", 1) == 0
    assert run("check", "--catalog", tmp_path / "no.csv") == 78 and "no such catalog" in capsys.readouterr().err
    assert run("stats", out) == 0 and "B04" in capsys.readouterr().out
    assert run("stats", tmp_path) == 78
    shutil.copytree(source.parent / "p00", tmp_path / "raw" / "p00")
    assert run("catalog", tmp_path / "raw") == 0 and "to be filled in" in capsys.readouterr().out
    assert run("catalog", tmp_path / "raw") == 78 and "never overwrites" in capsys.readouterr().err
    assert run("catalog", tmp_path / "raw", "--out", tmp_path / "p.csv") == 0
    assert {row.name for rows in read_catalog(tmp_path / "p.csv").places.values() for row in rows} == {
        f"raw/p00/{name}.tif" for name in ("s2_2021-03-01", "s2_2021-05-01", "hr")
    }
    assert run("catalog", tmp_path / "empty") == 78


def test_beam_is_asked_for_clearly(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)  # as in an environment without it
    build = ("build", "--catalog", source, "--out", tmp_path / "d")
    assert run(*build, "--runner", "beam") == 78 and "launch/setup.sh beam" in capsys.readouterr().err
    assert run(*build, "--runner", "beam", "--workers", 2) == 78 and "--workers" in capsys.readouterr().err
    assert run(*build, "--", "--runner=FlinkRunner") == 78 and "need --runner beam" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
