"""A run whose records, checkpoints and folder lie in a bucket (helpers/gcs_emulator.py: one on this machine)."""

from __future__ import annotations

import importlib.util
import io
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from skysense_jax import cli, networks, train
from skysense_jax.core import paths, trees
from skysense_jax.data import records as dataset_records
from skysense_jax.draw import reconstructions
from skysense_jax.run import checkpoint
from skysense_jax.run.folder import COMPLETE
from skysense_jax.run.log import metrics, profiler, records
from tests.helpers import gcs_emulator, jobs, noise_dataset, toy_objective

needs_gcsfs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gcsfs", "gcp_storage_emulator")),
    reason="needs gcsfs and gcp-storage-emulator: pip install 'skysense_jax[test]'",
)
STEPS = ("--config.steps=6", "--config.run.save_every=2", "--config.run.log_every=1")


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> pathlib.Path:
    return pathlib.Path(noise_dataset.write_dataset(tmp_path_factory.mktemp("places")))


@pytest.fixture(scope="module")
def bucket(local):
    """A bucket with the dataset of `local` under data/."""
    with gcs_emulator.emulated() as address:
        for file in local.iterdir():
            (paths.path(address) / "data" / file.name).write_bytes(file.read_bytes())
        yield address


def arguments(data: str, workdir: str) -> list[str]:
    return ["--config", jobs.TOY, "--workdir", workdir, f"--config.data.dir={data}", "--config.data.batch=8", *STEPS]


@pytest.fixture(scope="module")
def killed(bucket, local, tmp_path_factory):
    """(workdir in the bucket of a run killed at a save and started again, the straight run's on a disk, what was
    said)."""
    straight, workdir = tmp_path_factory.mktemp("straight"), paths.path(f"{bucket}/run")
    remote = arguments(f"{bucket}/data", str(workdir))
    jobs.finish(jobs.start(arguments(str(local), str(straight)), module="tests.helpers.jobs"))
    code, _ = jobs.interrupt(
        jobs.start(remote, module="tests.helpers.jobs"), lambda: (workdir / "checkpoints" / "4").exists()
    )
    assert code == -9 and not (workdir / COMPLETE).exists()
    return workdir, straight, jobs.finish(jobs.start(remote, module="tests.helpers.jobs"))


@needs_gcsfs
def test_pictures_are_written_into_a_bucket(bucket, tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for folder in (paths.path(f"{bucket}/pictures"), tmp_path):
        reconstructions.write(image, folder / "step.png")
        assert np.array_equal(Image.open(io.BytesIO((folder / "step.png").read_bytes())), image)


@needs_gcsfs
def test_a_run_in_a_bucket_that_was_killed_ends_as_the_straight_one_on_a_disk(killed):
    workdir, straight, said = killed
    assert "resuming from step" in said
    assert (workdir / COMPLETE).read_text() == (straight / COMPLETE).read_text()
    assert jobs.without_clocks(jobs.records(workdir)) == jobs.without_clocks(jobs.records(straight))
    assert [record["step"] for record in jobs.records(workdir)] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.steps(workdir / "checkpoints") == checkpoint.steps(straight / "checkpoints")
    jobs.assert_same(jobs.arrays(workdir, 6), jobs.arrays(straight, 6))
    names = {path.name for path in workdir.iterdir()}
    assert names == {path.name for path in straight.iterdir()}
    assert len(list((workdir / "tensorboard").iterdir())) == 2  # one file for each start


@needs_gcsfs
def test_commands_that_read_a_run_read_it_from_the_bucket(killed):
    workdir, straight, _ = killed
    found, wanted = networks.read_description(str(workdir)), networks.read_description(straight)
    assert found.kind == "workdir" and found.step == wanted.step == 6 and found.contract == wanted.contract
    one = workdir / "checkpoints" / "6"
    assert networks.identify(str(one)) == "checkpoint"
    there, here = (checkpoint.load_tree(path, "params") for path in (str(one), straight))
    jobs.assert_same(trees.flatten(there), trees.flatten(here))


@needs_gcsfs
def test_a_step_without_its_mark_or_with_a_flipped_byte_is_not_taken(bucket, local, capfd):
    """Unmarked: a save that was killed. Flipped: Orbax would load it without an error."""
    cfg = toy_objective.config(str(local))
    _, _, shapes, state = toy_objective.small_state(cfg)
    workdir = paths.path(f"{bucket}/damaged")
    saver = checkpoint.Saver(workdir, 5)
    folder = workdir / checkpoint.FOLDER

    def save(step: int) -> None:
        saver.save(state._replace(step=jax.numpy.int32(step)), {"step": step}, {"seconds": {}})
        saver.wait()

    for step in (1, 2, 3):
        save(step)
    assert checkpoint.steps(folder) == [1, 2, 3]
    (folder / "3" / checkpoint.COMMITTED).unlink()
    assert checkpoint.steps(folder) == [1, 2]
    [part] = (folder / "2" / "params" / "ocdbt.process_0" / "d").iterdir()
    body = bytearray(part.read_bytes())
    body[len(body) // 2] ^= 1
    part.write_bytes(bytes(body))
    saver.close()
    found = checkpoint.restore_latest_valid(workdir, shapes)
    assert found.step == 1 and toy_objective.same(found.state.params, state.params)
    assert "checkpoint 2 rejected" in capfd.readouterr().err
    aside = workdir / checkpoint.REJECTED / "2-0"
    assert "params" in (aside / "REASON.txt").read_text() and (aside / "params").is_dir()
    assert checkpoint.steps(folder) == [1]

    (folder / "3" / "params" / "left").write_text("by the save that was killed")
    saver = checkpoint.Saver(workdir, 5)
    save(3)
    saver.close()
    assert checkpoint.steps(folder) == [1, 3] and not (folder / "3" / "params" / "left").exists()
    assert checkpoint.restore_latest_valid(workdir, shapes).step == 3


@needs_gcsfs
def test_records_in_a_bucket_are_the_same_as_on_a_disk(bucket, local):
    there, here = dataset_records.open_places(f"{bucket}/data", "train"), dataset_records.open_places(local, "train")
    assert len(there) == len(here) > 0
    for number in range(len(here)):
        for name, value in here[number].items():
            assert np.array_equal(there[number][name], value), (number, name)
    for ours, theirs in zip(
        dataset_records.locations(f"{bucket}/data", "train"), dataset_records.locations(local, "train"), strict=True
    ):
        assert np.array_equal(ours, theirs)
    with pytest.raises(ValueError, match="gs://bucket/none is not a dataset of places: places.json is missing"):
        dataset_records.read_metadata(f"{bucket}/none")


@needs_gcsfs
def test_the_lines_in_a_bucket_hold_every_synced_step_once(bucket):
    file = paths.path(f"{bucket}/lines/{metrics.FILE}")

    def go_on(start: int, steps: range, synced: int) -> list[int]:
        log = records.open_records(file, start)
        for step in steps:
            log.add(json.dumps({"step": step}) + "\n")
            if step == synced:
                log.sync()  # what is added after it is lost, as with a kill
        return [json.loads(line)["step"] for line in file.read_text().splitlines()]

    assert go_on(0, range(1, 6), synced=4) == [1, 2, 3, 4]
    assert go_on(2, range(3, 5), synced=9) == [1, 2, 3, 4]  # killed before anything new was kept
    assert go_on(2, range(3, 8), synced=6) == [1, 2, 3, 4, 5, 6]


@needs_gcsfs
def test_a_trace_and_the_stacks_of_a_hung_run_reach_the_bucket(bucket):
    workdir = paths.path(f"{bucket}/watched")
    window = profiler.Window("1:2", workdir, 2)
    window.before_step(1, None)
    window.before_step(2, jax.numpy.ones(3) + 1)
    [folder] = (workdir / profiler.FOLDER / "plugins" / "profile").iterdir()
    assert any(path.name.endswith(".xplane.pb") and path.stat().length for path in folder.iterdir())
    hung = (
        "import time; from skysense_jax.core import paths; from skysense_jax.run import watchdog\n"
        f"with watchdog.Watchdog(0.2, paths.path('{workdir}/stacks-0.txt')): time.sleep(600)"
    )
    ended = subprocess.run([sys.executable, "-c", hung], capture_output=True, text=True, timeout=jobs.PATIENCE_S)
    assert ended.returncode == 70, ended.stderr
    assert "most recent call first" in (workdir / "stacks-0.txt").read_text()


@pytest.mark.parametrize(
    "given, said",
    [
        ("s3://bucket/run", "only local paths and gs://BUCKET/NAME"),
        ("gs://", "names no bucket"),
        ("gs:///run", "names no bucket"),
    ],
)
def test_other_addresses_are_refused_with_78(given, said, capfd):
    assert train.main(["--config", jobs.TINY, "--workdir", given]) == 78
    assert said in capfd.readouterr().err


@needs_gcsfs
@pytest.mark.parametrize(
    "command, said",
    [
        (["build", "--catalog", "c.csv", "--tile", "8", "--out", "gs://bucket/data"], "records are built on a disk"),
        (["stats", "gs://bucket/data"], "statistics are stored on a disk"),
    ],
)
def test_what_writes_to_a_disk_only_says_so(command, said, capfd):
    assert cli.main(["data", *command]) == 78
    assert said in capfd.readouterr().err


def test_without_gcsfs_the_error_says_what_to_install(monkeypatch, capfd):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else found(name))
    assert train.main(["--config", jobs.TINY, "--workdir", "gs://bucket/run"]) == 78
    assert "pip install 'skysense_jax[gcs]'" in capfd.readouterr().err
