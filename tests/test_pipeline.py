"""The input pipeline: batch = f(seed, step), one ground box per view, dates, validity, spec."""

from __future__ import annotations

import datetime
import itertools
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_dict

from skysense_jax import recipes, sensors
from skysense_jax.commands import data_bench
from skysense_jax.configs import skysense_smoke
from skysense_jax.data import records
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import geometry, radiometry, spec, whole_places
from skysense_jax.data.batches import views as view_batches
from skysense_jax.ops import crops
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
    for a, b in zip(take(view_batches.make_train_iterator(cfg, contract, 5, start_step=3), 3), straight[3:]):
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
            turned |= {tuple(np.sign(np.round([*a, *b], 5)).astype(int)) for a, b in zip(step_x, step_y)}
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


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.lists(st.integers(-1, 30000), min_size=1, max_size=8))
def test_jitter_stays_within_its_bounds(seed, days, dates):
    dates = np.array(dates, np.int32)
    moved = geometry.jitter_days(np.random.default_rng(seed), dates, days)
    assert (moved[dates < 0] == -1).all()
    known = dates >= 0
    assert (np.abs(moved[known] - dates[known]) <= days).all() and (moved[known] >= 0).all()


@given(st.dates(min_value=datetime.date(1970, 1, 1), max_value=datetime.date(2100, 12, 31)))
def test_day_of_year(date):
    number = (date - datetime.date(1970, 1, 1)).days
    day = geometry.day_of_year(np.array([number, -1]))
    assert day.tolist() == [min(date.timetuple().tm_yday - 1, 364), -1] and day.dtype == np.int32


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 128),
    st.floats(0.02, 1.0),
    st.floats(0.0, 0.5),
    st.floats(0.3, 1.0),
    st.floats(1.0, 3.0),
)
def test_boxes_lie_in_the_tile_and_keep_area_and_aspect(seed, tile, low, more, narrow, wide):
    scale = (low, min(low + more, 1.0))
    box = geometry.sample_box(np.random.default_rng(seed), tile, scale, (narrow, wide))
    eps = 1e-9 * tile
    assert -eps <= box.left and box.left + box.width <= tile + eps
    assert -eps <= box.top and box.top + box.height <= tile + eps
    assert narrow - 1e-6 <= box.width / box.height <= wide + 1e-6
    whole = box.width > tile - eps or box.height > tile - eps  # the fallback
    assert whole or scale[0] - 1e-6 <= box.width * box.height / tile**2 <= scale[1] + 1e-6


def dense(band: geometry.Band, n_in: int) -> np.ndarray:
    full = np.zeros((band[-1][0].stop, n_in), np.float32)
    for out, src, weights in band:
        full[out, src] = weights
    return full


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 90), st.floats(0, 1), st.floats(0.05, 1))
def test_resampling_weights_average_around_the_cell(n_out, n_in, where, part):
    extent = part * n_in
    start = where * (n_in - extent)
    full = dense(geometry.axis_weights(start, extent, n_out, n_in), n_in)
    assert full.shape == (n_out, n_in) and (full >= 0).all()
    np.testing.assert_allclose(full.sum(1), 1, atol=1e-5)
    centres, pixels = start + (np.arange(n_out) + 0.5) * extent / n_out, np.arange(n_in) + 0.5
    reach = max(extent / n_out, 1.0)
    assert (full[np.abs(pixels - np.clip(centres, 0.5, n_in - 0.5)[:, None]) > reach + 1e-6] == 0).all()
    assert np.abs(full @ pixels - centres)[(centres > reach) & (centres < n_in - reach)].max(initial=0) < 0.1 * reach


def test_whole_tile_at_its_own_size_is_untouched_and_blocks_equal_one_matrix():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (2, 40, 40, 3)).astype(np.uint8)
    valid = np.ones((2, 40, 40), np.uint8)
    planes, mask = geometry.resample(image, valid, None, geometry.make_window(geometry.Box(0, 0, 10, 10), 40, 4, 40))
    assert mask is None
    np.testing.assert_array_equal(planes, np.moveaxis(image, -1, 1))
    box = geometry.Box(1.3, 0.4, 7.1, 8.8)
    planes, _ = geometry.resample(image, valid, np.array([2, 0]), geometry.make_window(box, 24, 4, 40))
    rows = dense(geometry.axis_weights(box.top * 4, box.height * 4, 24, 40), 40)
    cols = dense(geometry.axis_weights(box.left * 4, box.width * 4, 24, 40), 40)
    want = np.einsum("yi,tijc,xj->tcyx", rows, image[..., [2, 0]].astype(np.float64), cols)
    np.testing.assert_allclose(planes, want, rtol=1e-5, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_values_under_invalid_pixels_do_not_bleed(seed, share):
    rng = np.random.default_rng(seed)
    valid = (rng.random((2, 20, 20)) > share).astype(np.uint8)
    image = np.where(valid[..., None], 100.0, 1e6).astype(np.float32) * np.ones(2, np.float32)
    window = geometry.make_window(geometry.sample_box(rng, 20, (0.2, 1.0), (0.75, 1.33)), 16, 1, 20)
    planes, mask = geometry.resample(image, valid, None, window)
    mask = np.ones((2, 16, 16)) if mask is None else mask
    np.testing.assert_allclose(planes, np.broadcast_to(100.0 * mask[:, None], planes.shape), rtol=1e-5)
    cfg = {
        "hr_jitter": 0.0,
        "hr_jitter_strength": (0, 0, 0, 0),
        "hr_gray": 0.5,
        "hr_blur": (1.0, 0.0, 0.0),
        "hr_solarize": 0.0,
    }
    grey = np.repeat(planes[:, :1], 3, 1)
    blurred = radiometry.disturb(rng, "hr", grey, mask.astype(np.float32), "global0", cfg)
    np.testing.assert_allclose(blurred, grey, rtol=1e-4, atol=1e-3)


@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.integers(0, 3))
def test_orientation_is_flips_then_turns(seed, flip_x, flip_y, turns):
    array = np.random.default_rng(seed).random((2, 3, 3))
    want = np.flip(array, 2) if flip_x else array
    want = np.rot90(np.flip(want, 1) if flip_y else want, turns, axes=(1, 2))
    np.testing.assert_array_equal(geometry.orient(array, geometry.Orientation(flip_x, flip_y, turns)), want)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_dates_are_drawn_or_spread_in_order_without_repetition(given_, count, seed):
    rng = np.random.default_rng(seed)
    usable = np.sort(rng.choice(100, given_, replace=False))
    clear = rng.random(given_)
    for chosen in (geometry.draw_dates(rng, usable, count), geometry.spread_dates(usable, clear, count)):
        assert len(chosen) == min(count, given_) and (np.diff(chosen) > 0).all() and np.isin(chosen, usable).all()
    if count == 1:
        assert chosen[0] == usable[clear.argmax()]


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
    for a, b in zip(batches, again):
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


def match_cells_numpy(a, b, cell_a, cell_b):
    a, b = a.reshape(-1, 2), b.reshape(-1, 2)
    distance = np.hypot(a[:, None, 0] - b[None, :, 0], a[:, None, 1] - b[None, :, 1])
    return distance, distance.min(1) <= max(cell_a, cell_b) * np.sqrt(2) / 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_matched_cells_show_the_same_ground(seed):
    rng = np.random.default_rng(seed)
    boxes = [
        [geometry.sample_box(rng, 16, scale, (0.75, 1.33)) for scale in ((0.4, 1.0), (0.1, 0.4))] for _ in range(3)
    ]
    turns = [[geometry.sample_orientation(rng, 0.5, 0.5) for _ in range(2)] for _ in range(3)]
    a = np.stack([geometry.cell_centres(box[0], 8, turn[0]) for box, turn in zip(boxes, turns)])
    b = np.stack([geometry.cell_centres(box[1], 4, turn[1]) for box, turn in zip(boxes, turns)])
    cell_a = np.array([geometry.cell_side(box[0], 8) for box in boxes], np.float32)
    cell_b = np.array([geometry.cell_side(box[1], 4) for box in boxes], np.float32)
    index, mask = jax.jit(crops.match_cells)(jnp.array(a), jnp.array(b), jnp.array(cell_a), jnp.array(cell_b))
    assert index.shape == mask.shape == (3, 64) and index.dtype == jnp.int32 and mask.dtype == jnp.float32
    for i in range(3):
        distance, near = match_cells_numpy(a[i].astype(np.float64), b[i].astype(np.float64), cell_a[i], cell_b[i])
        picked = distance[np.arange(64), np.asarray(index[i])]
        np.testing.assert_allclose(picked, distance.min(1), atol=1e-5)
        limit = max(cell_a[i], cell_b[i]) * np.sqrt(2) / 2
        clear_cut = np.abs(distance.min(1) - limit) > 1e-4
        np.testing.assert_array_equal(np.asarray(mask[i])[clear_cut], near[clear_cut])


def test_a_view_matches_itself_cell_by_cell():
    coords = geometry.cell_centres(geometry.Box(0, 0, 8, 8), 5, geometry.Orientation(True, False, 3))
    index, mask = crops.match_cells(coords, coords, np.float32(1.6), np.float32(1.6))
    assert index.tolist() == list(range(25)) and (np.asarray(mask) == 1).all()
    _, mask = crops.match_cells(coords, coords + 100, np.float32(1.6), np.float32(1.6))
    assert (np.asarray(mask) == 0).all()


def test_bench_measures_the_three_stages(cfg):
    rates = data_bench.bench(cfg, 0.1)
    assert set(rates) == {"read", "place", "batches"} and all(min(rate) > 0 for rate in rates.values())
