"""The Beam pipeline writes the dataset that the local build writes, byte for byte, whatever stops it in between."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from array_record.python.array_record_module import ArrayRecordReader

pytest.importorskip(
    "apache_beam", reason="needs apache-beam, which has an environment of its own (.venv-beam, made by ./tests/run.sh)"
)

from skysense_jax import cli
from skysense_jax.data import records
from skysense_jax.data.ingest import build, on_beam
from skysense_jax.data.ingest.catalog import read_catalog
from skysense_jax.data.ingest.on_processes import WorkerDied
from tests.helpers.build_worlds import OPTIONS, damaged_world, world
from tests.helpers.rasters import catalog, write

DIRECT = ("--runner=DirectRunner", "--allow_unsafe_triggers")  # the second keeps Beam from downloading its Prism binary
PROCESSES = (*DIRECT, "--direct_num_workers=2", "--direct_running_mode=multi_processing")
THREADS = (*DIRECT, "--direct_num_workers=2", "--direct_running_mode=multi_threading")


def command(source, out, places=2):
    """Arguments of `skysense-jax` for the build that OPTIONS describe, with `places` in a shard."""
    sizes = ("--tile", OPTIONS.tile, "--ratio", OPTIONS.ratio, "--shard-places", places)
    return [str(word) for word in ("data", "build", "--catalog", source, "--out", out, *sizes)]


def with_beam(arguments, options):
    return [*arguments, "--runner", "beam", "--", *options]


def raw_records(folder):
    """Shard -> its records, as bytes."""
    found = {}
    for path in sorted(folder.glob("*.array_record*")):
        reader = ArrayRecordReader(str(path))
        found[path.name] = [reader.read([i])[0] for i in range(reader.num_records())]
        reader.close()
    return found


def same(one, two):
    assert raw_records(one) == raw_records(two)
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in two.iterdir()
    }


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return damaged_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def local(damaged, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "dataset"
    assert cli.main([*command(damaged, out), "--workers", "1"]) == 0
    return out


@pytest.mark.parametrize("options", [DIRECT, THREADS, PROCESSES], ids=["in_memory", "two_threads", "two_processes"])
def test_the_same_dataset_as_the_local_build(damaged, local, tmp_path, capfd, options):
    """Records, refusals, splits, metadata: with a file that breaks while it is read and four more that are refused."""
    assert cli.main(with_beam(command(damaged, tmp_path / "d"), options)) == 0
    assert "refused (5)" in capfd.readouterr().out
    assert sum(map(len, raw_records(local).values())) == 6
    same(local, tmp_path / "d")
    meta = records.read_metadata(tmp_path / "d")
    places = [records.open_places(tmp_path / "d", split) for split in meta["splits"]]
    assert sorted(place[i]["place"] for place in places for i in range(len(place))) == [b"p%02d" % i for i in range(6)]


@pytest.fixture
def job_server(tmp_path):
    """Address of Beam's own job server: pipelines reach Flink's and Spark's through the same interface."""
    port = tmp_path / "port"
    module = "apache_beam.runners.portability.local_job_service_main"
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--port_file", port, "--staging_dir", tmp_path / "staging"],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (port.is_file() and port.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"localhost:{port.read_text()}"
    process.terminate()
    process.wait()


def test_through_a_job_server(damaged, local, tmp_path, job_server):
    portable = ("--runner=PortableRunner", f"--job_endpoint={job_server}", "--environment_type=LOOPBACK")
    assert cli.main(with_beam(command(damaged, tmp_path / "d"), portable)) == 0
    same(local, tmp_path / "d")


def test_existing_folders(damaged, local, tmp_path, capfd):
    out = shutil.copytree(local, tmp_path / "d")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert cli.main(with_beam(command(damaged, out), DIRECT)) == 0 and "nothing to do" in capfd.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert cli.main(with_beam(command(damaged, out, places=3), DIRECT)) == 78
    assert "shard_places: 2 there, 3 now" in capfd.readouterr().err
    (tmp_path / "thesis.doc").write_text("x")
    assert cli.main(with_beam(command(damaged, tmp_path), DIRECT)) == 78
    assert "neither empty nor an unfinished build" in capfd.readouterr().err


@pytest.mark.parametrize(
    "option, reason",
    [
        ("--runner=Nope", "refuses the options after --: Unexpected pipeline runner"),
        ("--direct_num_workers=x", "invalid int value: 'x'"),
    ],
)
def test_options_that_beam_does_not_take(damaged, tmp_path, capfd, option, reason):
    assert cli.main(with_beam(command(damaged, tmp_path / "d"), [option])) == 78
    assert reason in capfd.readouterr().err


def test_nothing_usable_is_an_error_that_says_why(tmp_path, capfd):
    (tmp_path / "a.tif").write_text("x")
    source = catalog(tmp_path, [{"sensor": "hr", "path": "a.tif", "bands": "R,G,B"}])
    assert cli.main(with_beam(command(source, tmp_path / "d"), DIRECT)) == 78
    assert "neither a GeoTIFF" in capfd.readouterr().err


def test_killed_and_continued(tmp_path):
    """SIGKILL of everything while two workers write; finished shards are kept, by whichever way it goes on."""
    root, out = tmp_path / "world", tmp_path / "d"
    root.mkdir()
    source = catalog(root, world(root, places=60))
    assert cli.main([*command(source, tmp_path / "straight", places=1), "--workers", "1"]) == 0
    program = [sys.executable, "-m", "skysense_jax.cli", *with_beam(command(source, out, places=1), PROCESSES)]
    process = subprocess.Popen(
        program,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1])},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("parts/*.json"))) < 10 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / build.METADATA).exists(), "the build was over before it could be killed"
    (out / "parts" / ".train-00099.array_record.tmp-1").write_bytes(b"half a record")
    shutil.copytree(out, tmp_path / "local", ignore=shutil.ignore_patterns("*.tmp-*"))
    finished = {part.stat().st_ino for part in out.glob("parts/*.array_record") if part.with_suffix(".json").is_file()}
    assert len(finished) >= 9
    assert cli.main(with_beam(command(source, out, places=1), DIRECT)) == 0
    assert finished <= {shard.stat().st_ino for shard in out.iterdir()}
    same(tmp_path / "straight", out)
    assert cli.main([*command(source, tmp_path / "local", places=1), "--workers", "1"]) == 0
    same(tmp_path / "straight", tmp_path / "local")


@pytest.mark.parametrize("options", [DIRECT, PROCESSES], ids=["in_memory", "two_processes"])
def test_a_raster_only_the_building_machine_sees_is_no_refusal(tmp_path, options):
    """It stops the pipeline, names the raster and the worker, and the build goes on once it is there."""
    source = catalog(tmp_path, world(tmp_path, places=3))
    settings, units = build.plan(read_catalog(source), OPTIONS)
    raster, parts = tmp_path / "p01" / "hr.tif", tmp_path / "parts"
    parts.mkdir()
    raster.rename(tmp_path / "away.tif")
    with pytest.raises(WorkerDied, match=r"p01/hr\.tif is on the building machine but not on worker"):
        list(on_beam.run_units(units, settings, parts, "key", options))
    (tmp_path / "away.tif").rename(raster)
    found = {unit.name: done for unit, done in on_beam.run_units(units, settings, parts, "key", options)}
    assert found == {unit.name: json.loads((parts / f"{unit.name}.json").read_bytes()) for unit in units}
    before = {path.name: path.stat().st_ino for path in parts.iterdir()}
    on_beam.ingest_line(on_beam.to_line(units[0]), settings, str(parts), "key")  # handed out twice
    assert {path.name: path.stat().st_ino for path in parts.iterdir()} == before
    with pytest.raises(RuntimeError, match=r"units\.jsonl is on the building machine but not on worker"):
        list(on_beam.planned(str(tmp_path / "elsewhere")))


def test_a_unit_survives_its_line(tmp_path):
    """Every kind of cell: paths, tuples, numbers that JSON lacks, letters outside ASCII."""
    write(tmp_path / "ü [1].tif", [[1.0]])
    rows = [
        {"sensor": "dsm", "path": "ü [1].tif", "nodata": "nan", "scale": "0.1", "offset": "-1000", "units": "m"},
        {"sensor": "mask:s2", "path": "ü [1].tif", "datetime": "2021-06-01", "classes": "4;5", "split": "test"},
        {"sensor": "label", "classes": "Wald;Wasser"},
        {"sensor": "label_map", "path": "ü [1].tif", "classes": "1=water", "nodata": "none"},
    ]
    _, units = build.plan(read_catalog(catalog(tmp_path, rows)), OPTIONS)
    assert [len(places) for _, places in units[0].places] == [4]
    assert [repr(on_beam.from_line(on_beam.to_line(unit))) for unit in units] == [repr(unit) for unit in units]
