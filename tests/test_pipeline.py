"""The input pipeline: batch = f(seed, step), one ground box per view, dates, validity, spec."""
from __future__ import annotations

import itertools
import json
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_dict

from configs import skysense_smoke
from skysense_jax import sensors
from skysense_jax.data import augment, pipeline, radiometry, sources, spec
from skysense_jax.ops import crops

TILE, RATIO, PLACES, CLASSES = 12, 4, 7, 3
DATES = {"hr": 1, "s2": 6, "s1": 2}


def ground(kind: str) -> np.ndarray:
    """[S, S, 2]: (x, y) of every pixel centre in base pixels of the tile."""
    per_base = RATIO if kind == "hr" else 1
    steps = (np.arange(TILE * per_base) + 0.5) / per_base
    return np.stack(np.meshgrid(steps, steps), -1)


def make_record(number: int, names=("hr", "s2", "s1")) -> dict:
    """A place whose pixels say where they are: band 0 holds 10 x, band 1 holds 10 y. Place 3 has no s1, place 4 two dates of s2."""
    rng = np.random.default_rng(number)
    record = {
        "place": f"place-{'x' * number}{number}", "crs": "EPSG:32631", "lon": 3.0 + number, "lat": 48.0, "footprint": np.zeros(4),
        "label": np.eye(CLASSES, dtype=np.uint8)[number % CLASSES], "label_map": np.full((TILE, TILE), number, np.uint8),
    }
    for name in names:
        row = sensors.SENSORS[name]
        count = {("s1", 3): 0, ("s2", 4): 2}.get((name, number), DATES[name])
        position = ground(row.grid)
        image = np.zeros((count, *position.shape[:2], len(row.bands)))
        image[...] = 50 + number
        order = [row.bands.index(band) for band in sensors.SKYSENSE_BANDS[name]]
        image[..., order[0]], image[..., order[1]] = 10 * position[..., 0], 10 * position[..., 1]
        record[f"{name}_image"] = np.round(image).astype(row.dtype) if row.dtype != "float32" else image.astype(np.float32)
        record[f"{name}_valid"] = np.ones(image.shape[:3], np.uint8)
        record[f"{name}_clear"] = np.ones(image.shape[:3], np.uint8)
        record[f"{name}_measured"] = np.ones((count, len(row.bands)), np.uint8)
        days = np.sort(rng.choice(400, count, replace=False)).astype(np.int32) + 18262  # from 2020-01-01
        record[f"{name}_date"] = np.full(count, -1, np.int32) if name == "hr" else days
    return record


def write_dataset(folder: pathlib.Path, splits: dict[str, list[dict]]) -> str:
    features = spec.record_features(("hr", "s2", "s1"), TILE, RATIO, CLASSES)
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for split, records in splits.items():
        writer = ArrayRecordWriter(str(folder / f"places-{split}.array_record-00000-of-00001"), "group_size:1")
        for record in records:
            writer.write(features.serialize_example(record))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="places", split=split, filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[len(records)], num_bytes=0, filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
    meta = {"format": 1, "tile": TILE, "ratio": RATIO, "gsd": 10.0, "sensors": ["hr", "s2", "s1"], "label_classes": list("abc")}
    (folder / sources.METADATA).write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    records = [make_record(i) for i in range(PLACES)]
    return write_dataset(tmp_path_factory.mktemp("places"), {"train": records, "test": records[:5]})


@pytest.fixture()
def cfg(dataset) -> config_dict.ConfigDict:
    c = skysense_smoke.get_config()
    c.data.dir, c.data.batch, c.model.ratio = dataset, 4, RATIO
    c.data.global_size, c.data.local_size = 6, 4
    c.data.eval_dates = config_dict.ConfigDict({"hr": 1, "s2": 4, "s1": 3})
    return c


@pytest.fixture()
def contract(cfg) -> dict:
    return sensors.input_contract(cfg.data.bands, cfg.model.ratio)


def calm(cfg) -> config_dict.ConfigDict:
    """Geometry only."""
    cfg.data.augment.update({"hr_jitter": 0.0, "hr_gray": 0.0, "hr_blur": (0.0, 0.0, 0.0), "hr_solarize": 0.0, "s2_gain": 0.0,
                             "s2_band_gain": 0.0, "s1_shift_db": 0.0, "s1_speckle_db": 0.0})
    return cfg


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def take(iterator, count: int) -> list:
    got = list(itertools.islice(iterator, count))
    iterator.close()
    return got


def test_batch_is_exactly_the_spec(cfg, contract):
    want = spec.batch_spec(cfg, contract)
    got = jax.tree.map(lambda x: spec.Leaf(x.shape, x.dtype), pipeline.train_batch(cfg, contract, 0, 0))
    assert got == want
    cfg.data.n_local = 0
    got = jax.tree.map(lambda x: spec.Leaf(x.shape, x.dtype), pipeline.train_batch(cfg, contract, 0, 0))
    assert got == spec.batch_spec(cfg, contract) and "local" not in got


def test_batch_depends_on_seed_and_step_only(cfg, contract):
    straight = take(pipeline.make_train_iterator(cfg, contract, 5), 6)
    for step in (0, 3, 5):
        assert_same(pipeline.train_batch(cfg, contract, 5, step), straight[step])
    cfg.data.threads, cfg.data.prefetch = 1, 1
    for a, b in zip(take(pipeline.make_train_iterator(cfg, contract, 5, start_step=3), 3), straight[3:]):
        assert_same(a, b)
    other = pipeline.train_batch(cfg, contract, 6, 0)
    assert not np.array_equal(other["global"]["coords"], straight[0]["global"]["coords"])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batch_in_order(cfg, contract, processes):
    parts = [take(pipeline.make_train_iterator(cfg, contract, 1, 2, rank, processes), 2) for rank in range(processes)]
    for number in range(2):
        joined = jax.tree.map(lambda *xs: np.concatenate(xs), *[part[number] for part in parts])
        assert_same(joined, pipeline.train_batch(cfg, contract, 1, 2 + number))


def test_an_epoch_covers_each_place_once_and_the_next_is_shuffled_anew(cfg, contract):
    cfg.data.batch = 1
    order = [int(batch["place"]["index"][0]) for batch in take(pipeline.make_train_iterator(cfg, contract, 0), 3 * PLACES)]
    epochs = [order[i:i + PLACES] for i in range(0, 3 * PLACES, PLACES)]
    assert all(sorted(epoch) == list(range(PLACES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_every_sensor_of_a_view_shows_the_ground_its_coords_say(cfg, contract):
    calm(cfg)
    turned = set()
    for step in range(6):
        batch = pipeline.train_batch(cfg, contract, 2, step)
        for scope in ("global", "local"):
            views = batch[scope]
            coords, cell = views["coords"], views["cell"][:, :, None, None]
            for name in ("hr", "s2", "s1"):
                one = views["sensors"][name]
                present = one["valid"].any((3, 4))
                shown = one["image"][..., :2] / 10
                if name == "hr":  # the mean of the pixels of a cell lies at the cell's centre
                    size = coords.shape[2]
                    shown = shown.reshape(*shown.shape[:3], size, RATIO, size, RATIO, 2).mean((4, 6))
                for k in range(shown.shape[2]):
                    far = np.abs(shown[:, :, k] - coords).max(-1)
                    inner = (np.abs(coords - TILE / 2) < TILE / 2 - 1.5).all(-1) & present[:, :, k, None, None]
                    assert far[inner].max(initial=0) < 0.15  # base pixels; a wrong flip or turn is off by several
                    assert np.abs(far / cell)[present[:, :, k]].max(initial=0) < 0.6
            step_x, step_y = (coords[:, :, 0, 1] - coords[:, :, 0, 0]).reshape(-1, 2), (coords[:, :, 1, 0] - coords[:, :, 0, 0]).reshape(-1, 2)
            turned |= {tuple(np.sign(np.round([*a, *b], 5)).astype(int)) for a, b in zip(step_x, step_y)}
    assert len(turned) == 8  # all four turns, mirrored and not
