"""The input pipeline: batch = f(seed, step), one ground box per view, dates, validity, spec."""

from __future__ import annotations

import itertools
import pathlib
import pickle

import jax
import numpy as np
import pytest
from ml_collections import config_dict

from skysense_jax import recipes, sensors
from skysense_jax.commands import data_bench
from skysense_jax.configs import skysense_smoke
from skysense_jax.data import records
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import geometry, radiometry, spec, whole_places
from skysense_jax.data.batches import views as view_batches
from tests.helpers import noise_dataset

TILE, RATIO, PLACES, CLASSES = 12, 4, 7, 3
DATES = {"hr": 1, "s2": 6, "s1": 2}


def ground(kind: str) -> np.ndarray:
    """[S, S, 2]: (x, y) of every pixel centre in base pixels of the tile."""
    per_base = RATIO if kind == "fine" else 1
    steps = (np.arange(TILE * per_base) + 0.5) / per_base
    return np.stack(np.meshgrid(steps, steps), -1)


def make_record(number: int, names=("hr", "s2", "s1")) -> dict:
    """A place whose pixels say where they are: band 0 holds 10 x, band 1 10 y. Place 3: no s1, place 4: 2 s2."""
    rng = np.random.default_rng(number)
    record = {
        "place": f"place-{'x' * number}{number}",
        "crs": "EPSG:32631",
        "lon": 3.0 + number,
        "lat": 48.0,
        "footprint": np.zeros(4),
        "label": np.eye(CLASSES, dtype=np.uint8)[number % CLASSES],
        "label_map": np.full((TILE, TILE), number, np.uint8),
    }
    for name in names:
        row = sensors.SENSORS[name]
        count = {("s1", 3): 0, ("s2", 4): 2}.get((name, number), DATES[name])
        position = ground(row.grid)
        image = np.zeros((count, *position.shape[:2], len(row.bands)))
        image[...] = 50 + number
        order = [row.bands.index(band) for band in sensors.SKYSENSE_BANDS[name]]
        image[..., order[0]], image[..., order[1]] = 10 * position[..., 0], 10 * position[..., 1]
        record[f"{name}_image"] = (image if row.dtype == "float32" else np.round(image)).astype(row.dtype)
        record[f"{name}_valid"] = np.ones(image.shape[:3], np.uint8)
        record[f"{name}_clear"] = np.ones(image.shape[:3], np.uint8)
        record[f"{name}_measured"] = np.ones((count, len(row.bands)), np.uint8)
        days = np.sort(rng.choice(400, count, replace=False)).astype(np.int32) + 18262  # from 2020-01-01
        record[f"{name}_date"] = np.full(count, -1, np.int32) if name == "hr" else days
    return record


def write_dataset(folder: pathlib.Path, splits: dict[str, list[dict]]) -> str:
    features = records.record_features(("hr", "s2", "s1"), TILE, RATIO, CLASSES)
    meta = {"format": 1, "tile": TILE, "ratio": RATIO, "gsd": 10.0, "sensors": ["hr", "s2", "s1"]}
    return noise_dataset.write_records(folder, features, splits, meta)


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
    cfg.data.augment.update(
        {
            "hr_jitter": 0.0,
            "hr_gray": 0.0,
            "hr_blur": (0.0, 0.0, 0.0),
            "hr_solarize": 0.0,
            "s2_gain": 0.0,
            "s2_band_gain": 0.0,
            "s1_shift_db": 0.0,
            "s1_speckle_db": 0.0,
        }
    )
    return cfg


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def take(iterator, count: int) -> list:
    got = list(itertools.islice(iterator, count))
    iterator.close()
    return got


def test_batch_is_exactly_the_spec(cfg, contract):
    want = recipes.recipe_of(cfg).batch_spec(cfg, contract)
    got = jax.tree.map(lambda x: spec.Leaf(x.shape, x.dtype), view_batches.train_batch(cfg, contract, 0, 0))
    assert got == want
    cfg.data.n_local = 0
    got = jax.tree.map(lambda x: spec.Leaf(x.shape, x.dtype), view_batches.train_batch(cfg, contract, 0, 0))
    assert got == recipes.recipe_of(cfg).batch_spec(cfg, contract) and "local" not in got


def test_batch_depends_on_seed_and_step_only(cfg, contract):
    straight = take(view_batches.make_train_iterator(cfg, contract, 5), 6)
    for step in (0, 3, 5):
        assert_same(view_batches.train_batch(cfg, contract, 5, step), straight[step])
    cfg.data.threads, cfg.data.prefetch = 1, 1
    for a, b in zip(
        take(view_batches.make_train_iterator(cfg, contract, 5, start_step=3), 3), straight[3:], strict=True
    ):
        assert_same(a, b)
    other = view_batches.train_batch(cfg, contract, 6, 0)
    assert not np.array_equal(other["global"]["coords"], straight[0]["global"]["coords"])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batch_in_order(cfg, contract, processes):
    parts = [
        take(view_batches.make_train_iterator(cfg, contract, 1, 2, rank, processes), 2) for rank in range(processes)
    ]
    for number in range(2):
        joined = jax.tree.map(lambda *xs: np.concatenate(xs), *[part[number] for part in parts])
        assert_same(joined, view_batches.train_batch(cfg, contract, 1, 2 + number))


def test_an_epoch_covers_each_place_once_and_the_next_is_shuffled_anew(cfg, contract):
    cfg.data.batch = 1
    batches = take(view_batches.make_train_iterator(cfg, contract, 0), 3 * PLACES)
    order = [int(batch["place"]["index"][0]) for batch in batches]
    epochs = [order[i : i + PLACES] for i in range(0, 3 * PLACES, PLACES)]
    assert all(sorted(epoch) == list(range(PLACES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_every_sensor_of_a_view_shows_the_ground_its_coords_say(cfg, contract):
    calm(cfg)
    turned = set()
    for step in range(6):
        batch = view_batches.train_batch(cfg, contract, 2, step)
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
            step_x = (coords[:, :, 0, 1] - coords[:, :, 0, 0]).reshape(-1, 2)
            step_y = (coords[:, :, 1, 0] - coords[:, :, 0, 0]).reshape(-1, 2)
            turned |= {tuple(np.sign(np.round([*a, *b], 5)).astype(int)) for a, b in zip(step_x, step_y, strict=True)}
    assert len(turned) == 8  # all four turns, mirrored and not


def test_views_have_their_own_sorted_dates_and_missing_ones_are_padding(cfg, contract, dataset):
    places = dataset_records.open_places(dataset, "train")
    cfg.data.date_jitter_days = 0
    plan = view_batches.make_plan(cfg, contract, TILE)
    differ = 0
    for number in range(PLACES):
        record = places[number]
        one = view_batches.sample_place(record, np.random.default_rng(number), plan)
        for scope, name in itertools.product(("global", "local"), ("hr", "s2", "s1")):
            given = record[f"{name}_date"]
            count = min(len(given), cfg.data.dates[name])
            part = one[scope]["sensors"][name]
            assert (part["valid"].any((2, 3)) == (np.arange(part["valid"].shape[1]) < count)).all()
            assert (part["image"][:, count:] == 0).all() and (part["bands"][:, count:] == 0).all()
            assert (part["dates"][:, count:] == -1).all()
            assert (part["bands"][:, :count] == 1).all()
            allowed = geometry.day_of_year(given).tolist()
            for drawn in part["dates"][:, :count].tolist():
                where = [allowed.index(day) for day in drawn]
                assert where == sorted(where) and (len(set(where)) == len(where) or name == "hr")
            if name == "s2" and scope == "global" and len(given) > count:
                differ += not np.array_equal(part["dates"][0], part["dates"][1])
    assert differ >= 3


def test_empty_acquisitions_are_not_drawn(cfg, contract):
    record = {**make_record(0), "index": 0}
    record["s2_valid"][:4] = 0
    one = view_batches.sample_place(record, np.random.default_rng(0), view_batches.make_plan(cfg, contract, TILE))
    assert (one["global"]["sensors"]["s2"]["valid"].any((2, 3)) == [True, True, False, False]).all()


def hr(cfg_change: dict, view: str = "global0", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    planes = rng.uniform(0, 255, (1, 3, 16, 16)).astype(np.float32)
    off = {
        "hr_jitter": 0.0,
        "hr_jitter_strength": (0.4, 0.4, 0.2, 0.1),
        "hr_gray": 0.0,
        "hr_blur": (0.0, 0.0, 0.0),
        "hr_solarize": 0.0,
    }
    return planes, radiometry.disturb(rng, "hr", planes.copy(), None, view, {**off, **cfg_change})


def test_optical_augmentation_does_what_its_names_say():
    planes, same = hr({})
    np.testing.assert_array_equal(same, planes)
    planes, grey = hr({"hr_gray": 1.0})
    np.testing.assert_allclose(grey[:, 0], np.einsum("c,tchw->thw", [0.299, 0.587, 0.114], planes), rtol=1e-4)
    assert np.ptp(grey, axis=1).max() < 1e-3
    for view, touched in (("global0", False), ("local", False), ("global1", True)):
        planes, out = hr({"hr_solarize": 1.0}, view)
        assert np.array_equal(out, np.where(planes >= 130, 255 - planes, planes) if touched else planes)
    for index, view in enumerate(("global0", "global1", "local")):
        planes, out = hr({"hr_blur": tuple(float(i == index) for i in range(3))}, view)
        assert not np.array_equal(out, planes) and abs(out.mean() - planes.mean()) < 3
    for seed in range(5):
        planes, out = hr({"hr_jitter": 1.0}, seed=seed)
        assert not np.array_equal(out, planes) and out.min() >= 0 and out.max() <= 255


def test_colour_matrix():
    luma = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(radiometry.colour_matrix(1, 1, 1, 0, False), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(radiometry.colour_matrix(1.3, 0.7, 1, 0, False), 0.91 * np.eye(3), atol=1e-12)
    turned = radiometry.colour_matrix(1, 1, 1.2, 0.1, False)
    np.testing.assert_allclose(luma @ turned, luma, atol=1e-12)  # hue and saturation keep luma
    np.testing.assert_allclose(turned @ np.ones(3), np.ones(3), atol=1e-12)  # and grey


def test_radar_and_reflectance_disturbances_are_bounded_and_spare_invalid_pixels():
    rng = np.random.default_rng(0)
    valid = np.ones((3, 8, 8), np.float32)
    valid[:, :4] = 0
    planes = np.full((3, 2, 8, 8), -12.0, np.float32) * valid[:, None]
    shifted = radiometry.disturb(rng, "s1", planes, valid, "local", {"s1_shift_db": 1.0, "s1_speckle_db": 0.0})
    assert (shifted[:, :, :4] == 0).all() and np.abs(shifted - planes).max() <= 1 and len(np.unique(shifted)) == 7
    noisy = radiometry.disturb(rng, "s1", planes, None, "local", {"s1_shift_db": 0.0, "s1_speckle_db": 0.5}) - planes
    assert 0.4 < noisy.std() < 0.6
    gained = radiometry.disturb(rng, "s2", planes, valid, "local", {"s2_gain": 0.1, "s2_band_gain": 0.05})
    gained = gained[:, :, 4:] / -12
    assert gained.min() >= 0.9 * 0.95 and gained.max() <= 1.1 * 1.05 and len(np.unique(gained)) == 6
    assert radiometry.disturb(rng, "dsm", planes, None, "local", {}) is planes


def test_unmeasured_bands_stay_zero(cfg, contract):
    record = {**make_record(0), "index": 0}
    record["s1_measured"][0, 1] = 0
    record["s1_image"][0, ..., 1] = 0
    one = view_batches.sample_place(record, np.random.default_rng(0), view_batches.make_plan(cfg, contract, TILE))
    one = one["global"]["sensors"]["s1"]
    assert one["bands"][0].tolist() == [[1, 0], [1, 1], [0, 0]]
    assert (one["image"][:, 0, ..., 1] == 0).all() and (one["image"][:, 1, ..., 1] != 0).any()


def test_evaluation_reads_every_place_once_and_whole(cfg, contract, dataset):
    places = dataset_records.open_places(dataset, "test")
    batches = list(whole_places.eval_batches(cfg, contract, "test", 3))
    assert [batch["weight"].tolist() for batch in batches] == [[1, 1, 1], [1, 1, 0]]
    index = np.concatenate([batch["place"]["index"][batch["weight"] > 0] for batch in batches])
    assert index.tolist() == list(range(5))
    names = np.concatenate([batch["place"]["name"] for batch in batches])
    assert names[:5].tolist() == [places[i]["place"].decode() for i in range(5)]
    first, record = batches[0], places[1]
    assert first["label"][1].tolist() == record["label"].tolist() and (first["label_map"][1] == 1).all()
    assert first["sensors"]["hr"]["image"].shape == (3, 1, TILE * RATIO, TILE * RATIO, 3)
    np.testing.assert_array_equal(first["sensors"]["hr"]["image"][1], record["hr_image"])
    order = [sensors.SENSORS["s2"].bands.index(band) for band in contract["sensors"]["s2"]["bands"]]
    assert first["sensors"]["s2"]["image"].shape[1] == 4
    np.testing.assert_array_equal(first["sensors"]["s2"]["image"][1, 0], record["s2_image"][0][..., order])
    assert (first["sensors"]["s2"]["valid"][1] == 1).all() and (first["sensors"]["s1"]["valid"][1, 2] == 0).all()
    again = list(whole_places.eval_batches(cfg, contract, "test", 3))
    for a, b in zip(batches, again, strict=True):
        assert_same(a, b)


def test_places_can_be_pickled(dataset):
    places = pickle.loads(pickle.dumps(dataset_records.open_places(dataset, "test")))
    assert len(places) == 5 and places[4]["index"] == 4


def test_errors_name_the_file_and_the_fix(cfg, contract, dataset, tmp_path):
    with pytest.raises(ValueError, match="not a dataset of places.*data build"):
        dataset_records.open_places(tmp_path, "train")
    with pytest.raises(ValueError, match="config.data.dir"):
        dataset_records.read_metadata("")
    (tmp_path / dataset_records.METADATA).write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        dataset_records.read_metadata(tmp_path)
    (tmp_path / dataset_records.METADATA).write_text('{"format": 1, "tile": 4}')
    with pytest.raises(ValueError, match="lacks ratio, sensors"):
        dataset_records.read_metadata(tmp_path)
    (tmp_path / dataset_records.METADATA).write_text('{"format": 2, "tile": 4, "ratio": 1, "sensors": []}')
    with pytest.raises(ValueError, match="format 2"):
        dataset_records.read_metadata(tmp_path)
    with pytest.raises(ValueError, match="no split 'validation'; it has test, train"):
        dataset_records.open_places(dataset, "validation")
    meta = dataset_records.read_metadata(dataset)
    dataset_records.check_dataset(meta, contract, cfg)
    with pytest.raises(ValueError, match="takes 's1', the dataset in .* holds hr, s2"):
        dataset_records.check_dataset({**meta, "sensors": ["hr", "s2"]}, contract, cfg)
    with pytest.raises(ValueError, match="has 8 HR pixels along a base pixel, the model 4"):
        dataset_records.check_dataset({**meta, "ratio": 8}, contract, cfg)
    with pytest.raises(ValueError, match="global_size=6 must lie in 1..5"):
        dataset_records.check_dataset({**meta, "tile": 5}, contract, cfg)
    with pytest.raises(ValueError, match="config.data.batch=4 cannot be shared evenly by 3"):
        view_batches.train_dataset(cfg, contract, 0, 0, 3)
    other = sensors.input_contract({**cfg.data.bands.to_dict(), "s1": ("VH", "VV")}, RATIO)
    with pytest.raises(ValueError, match="config.data.bands has .*'s1'"):
        dataset_records.check_dataset(meta, other, cfg)
    cfg.model.ratio = 8
    with pytest.raises(ValueError, match="config.model.ratio is 8"):
        dataset_records.check_dataset(meta, contract, cfg)
    cfg.model.ratio = RATIO
    del cfg.data.dates["s1"]
    with pytest.raises(ValueError, match="config.data.dates needs"):
        dataset_records.check_dataset(meta, contract, cfg)


def size_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf, np.ndarray))


def test_bench_measures_the_three_stages(cfg, contract):
    """Not how fast: MB per second by places per second are the bytes of a record, of a place, of a share of a batch."""
    rates = data_bench.bench(cfg, 0.1)
    assert list(rates) == ["read", "place", "batches"]
    size = {stage: 1e6 * rate.mb_per_s / rate.places_per_s for stage, rate in rates.items()}
    records, sample = view_batches.stages(cfg, contract, cfg.seed)
    stored = [size_of(records[number]) for number in range(PLACES)]  # places lack dates, and their names differ
    assert min(stored) <= size["read"] <= max(stored) and min(stored) < max(stored)
    assert size["place"] == pytest.approx(size_of(sample(records[0], np.random.default_rng(0))))
    batch = view_batches.train_batch(cfg, contract, cfg.seed, 0)
    assert size["batches"] == pytest.approx(size_of(batch) / cfg.data.batch)
