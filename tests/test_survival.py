"""What else befalls a run: a full disk, numbers that are none, damaged records. Real processes, real limits.

Kills and signals: test_resume.py. A process that stands still, one that is missing: test_processes.py. Damaged
checkpoints: test_run.py.
"""

from __future__ import annotations

import json
import pathlib
import resource
import shutil

import jax
import numpy as np
import pytest

from skysense_jax import recipes, train
from skysense_jax.configs import skysense_tiny
from skysense_jax.data import records
from skysense_jax.data.batches import views
from skysense_jax.run import checkpoint
from skysense_jax.run import plan as plans
from tests.helpers import jobs, msgfm_places, noise_dataset

STEPS = 9
SHARD = "places-train.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return noise_dataset.write_dataset(tmp_path_factory.mktemp("places"))


def toy(dataset: str, workdir: pathlib.Path, *more: str) -> list[str]:
    return [
        "--config",
        jobs.TOY,
        "--workdir",
        str(workdir),
        f"--config.data.dir={dataset}",
        f"--config.steps={STEPS}",
        "--config.run.save_every=3",
        *more,
    ]


def settings(dataset: str):
    c = skysense_tiny.get_config("series")
    c.data.dir = dataset
    return c, plans.make_contract(c)


# ---------------------------------------------------------------- a full disk


def test_a_full_disk_is_74_and_the_last_checkpoint_stands(dataset, tmp_path):
    """From the first checkpoint on no file may grow past 200 kB: the next save fails, in tensorstore, in the
    background.
    """
    full, free = tmp_path / "full", tmp_path / "free"
    jobs.finish(jobs.start(toy(dataset, free), module="tests.helpers.jobs"))
    process = jobs.start(toy(dataset, full), module="tests.helpers.jobs", READ_S="0.05")
    jobs.await_moment(process, lambda: checkpoint.steps(full / checkpoint.FOLDER) == [3])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    [(code, said)] = jobs.ended([process])
    last = said.strip().splitlines()[-1]
    assert code == 74 and last.startswith("skysense-jax train: ") and "File too large" in last and "make room" in last
    assert checkpoint.steps(full / checkpoint.FOLDER) == [3]

    said = jobs.finish(jobs.start(toy(dataset, full), module="tests.helpers.jobs"))
    assert "resuming from step 3" in said and not jobs.saving(full)
    jobs.assert_same(jobs.arrays(full, STEPS), jobs.arrays(free, STEPS))
    assert jobs.without_clocks(jobs.records(full)) == jobs.without_clocks(jobs.records(free))


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize(
    "config, module, sensors",
    [(jobs.TINY, noise_dataset, tuple(noise_dataset.DATES)), (jobs.MSGFM, msgfm_places, msgfm_places.SENSORS)],
    ids=["skysense", "msgfm"],
)
def test_a_place_of_nans_changes_nothing_is_counted_and_too_many_are_65(config, module, sensors, tmp_path):
    """The real objectives; the radar series of one place of ten is NaN, and every batch that holds it is skipped: of
    msGFM's those of s1, and of s2 where the place reconstructs its s1, as in both before the run ends.
    """
    poison = 7
    places = [module.record(number) for number in range(10)]
    places[poison]["s1_image"][:] = np.nan
    features = records.record_features(sensors, noise_dataset.TILE, noise_dataset.RATIO, noise_dataset.CLASSES)
    meta = {
        "format": 1,
        "tile": noise_dataset.TILE,
        "ratio": noise_dataset.RATIO,
        "gsd": 10.0,
        "sensors": list(sensors),
        "label_classes": ["a", "b", "c"],
        "label_map_classes": {},
        "synthetic": True,
        "dataset_id": "poisoned",
    }
    data = noise_dataset.write_records(tmp_path / "places", features, {"train": places}, meta)
    workdir = tmp_path / "run"
    given = [
        "--config",
        config,
        "--workdir",
        str(workdir),
        f"--config.data.dir={data}",
        *jobs.QUICK[config],
        "--config.steps=12",
        "--config.run.save_every=1",
        "--config.run.keep=12",
        "--config.run.max_skipped=2",
    ]
    cfg = train.parse(given).config
    batches = recipes.recipe_of(cfg).batches.train_dataset(cfg, plans.make_contract(cfg), cfg.seed)

    def poisoned(batch):
        return any(np.isnan(leaf).any() for leaf in jax.tree.leaves(batch))

    bad = [n for n in range(1, 13) if poisoned(batches[n - 1])][:3]  # a record counts the steps done
    assert len(bad) == 3

    [(code, said)] = jobs.ended([jobs.start(given)])
    assert code == 65 and "3 updates were not finite, config.run.max_skipped is 2" in said, said
    lines = jobs.records(workdir)
    assert [line["step"] for line in lines][: bad[-1]] == list(range(1, bad[-1] + 1))
    for line in lines[: bad[-1]]:
        assert (line["finite"] == 0) == (line["step"] in bad) == (line["loss"] == "nan"), line
        assert line["skipped"] == sum(step <= line["step"] for step in bad)
    kept = set(checkpoint.steps(workdir / checkpoint.FOLDER))
    compared = 0
    for step in range(2, bad[-1] + 1):
        if {step - 1, step} <= kept:
            before, after = (checkpoint.load_meta(workdir, n)["digests"] for n in (step - 1, step))
            same = {before[part] == after[part] for part in before if part in ("params", "opt", "teacher", "memory")}
            assert same == {step in bad}, (step, same)
            compared += step in bad
    assert compared >= 1, (bad, kept)


# ---------------------------------------------------------------- damaged records


@pytest.fixture(scope="module")
def damaged(dataset, tmp_path_factory) -> tuple[str, list[int]]:
    """A copy of the dataset with a flipped byte in two records, and their numbers."""
    folder = tmp_path_factory.mktemp("damaged") / "places"
    shutil.copytree(dataset, folder)
    data = bytearray((folder / SHARD).read_bytes())
    for at in (12_000, 45_000):
        data[at] ^= 0x04
    (folder / SHARD).write_bytes(data)
    places = records.open_places(folder, "train", allowed=10)
    numbers = [number for number in range(len(places)) if places[number]["index"] != number]
    assert len(numbers) == 2 and numbers[1] > numbers[0] + 1
    return str(folder), numbers


def test_a_damaged_record_is_named_counted_and_the_next_is_read(dataset, damaged, capfd):
    folder, (first, second) = damaged
    sound, places = records.open_places(dataset, "train"), records.open_places(folder, "train", allowed=2)
    for _ in range(2):  # the second epoch says nothing new
        for number in range(len(sound)):
            stand_in = number + (number in (first, second))
            jax.tree.map(np.testing.assert_array_equal, places[number], sound[stand_in])
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith(
        f"damaged record (1 of at most 2): record {first} of split train (number {first} in {SHARD})"
    )
    assert "hash mismatch" in said[0] and said[1].endswith(f"record {second + 1} is read in its place")
    few = records.open_places(folder, "train", allowed=1)
    few[first]
    with pytest.raises(ValueError, match=rf"2 damaged .*max_bad_records allows 1: {first}, {second}; record {second}"):
        few[second]
    with pytest.raises(ValueError, match=f"1 damaged records, .*record {first} of split train"):
        records.open_places(folder, "train")[first]


def test_batches_with_damaged_records_do_not_depend_on_the_number_of_processes(dataset, damaged):
    folder, numbers = damaged
    (cfg, contract), (broken, _) = settings(dataset), settings(folder)
    for step in range(4):
        whole = views.train_dataset(broken, contract, 0)[step]
        parts = [views.train_dataset(broken, contract, 0, index, 2)[step] for index in range(2)]
        jax.tree.map(lambda x, *y: np.testing.assert_array_equal(x, np.concatenate(y)), whole, *parts)
        sound = views.train_dataset(cfg, contract, 0)[step]
        moved = np.isin(sound["place"]["index"], numbers)
        np.testing.assert_array_equal(whole["place"]["index"], sound["place"]["index"] + moved)
        for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(sound), strict=True):
            np.testing.assert_array_equal(ours[~moved], theirs[~moved])


def test_a_shard_without_its_end_is_named(damaged, tmp_path):
    folder = tmp_path / "places"
    shutil.copytree(damaged[0], folder)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:100_000])
    with pytest.raises(ValueError, match=f"10 damaged records.*in {SHARD}"):
        records.open_places(folder, "train", allowed=1000)[0]


def test_past_the_quota_of_damaged_records_the_run_is_78_and_a_larger_one_goes_on(damaged, tmp_path):
    folder, _ = damaged
    few, enough = (toy(folder, tmp_path, f"--config.data.max_bad_records={quota}") for quota in (1, 2))
    [(code, said)] = jobs.ended([jobs.start(few, module="tests.helpers.jobs")])
    assert code == 78 and "damaged record (1 of at most 1)" in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("skysense-jax train: ") and "2 damaged records, config.data.max_bad_records allows 1" in last
    said = jobs.finish(jobs.start(enough, module="tests.helpers.jobs"))
    assert (
        "damaged record (2 of at most 2)" in said
        and json.loads((tmp_path / "config.json").read_text())["data"]["max_bad_records"] == 2
    )
