"""One view of a place: dates, the box on the ground, resampling, orientation, and which cells of two views match."""

from __future__ import annotations

import datetime

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from skysense_jax.data.batches import geometry, radiometry
from skysense_jax.ops import crops


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
    a = np.stack([geometry.cell_centres(box[0], 8, turn[0]) for box, turn in zip(boxes, turns, strict=True)])
    b = np.stack([geometry.cell_centres(box[1], 4, turn[1]) for box, turn in zip(boxes, turns, strict=True)])
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
