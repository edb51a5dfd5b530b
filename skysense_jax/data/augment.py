"""Geometry of a view: the crop box, its orientation, the resampling of every sensor onto it, and the choice and disturbance of dates.

One box per view, in continuous base pixels of the tile, is applied to every sensor at the sensor's own resolution, so the sensors
of a view show the same ground (SkySense paper 3.1; SkySense++ lib/datasets/utils/transforms.py, MSSSLRandomResizedCrop, does the same with
relative boxes). Resampling is separable: two banded matrices per view and sensor, applied in blocks so that the work is linear in the size.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BLOCK = 16  # output cells per matrix block: skips the zeros of the band
_PRODUCT = 200_000  # multiplications per matrix product: OpenBLAS hands larger ones (2**18) to its own threads, which fight with the
# reader threads of the pipeline: measured on two cores, twelve times slower than this
_EPOCH_DAYS = np.datetime64("1970-01-01", "D")
LAST_DAY = 364
"""Last row of the calendar table; 31 December of a leap year is clamped to it."""


class Box(NamedTuple):
    """A crop box in base pixels of the tile (float, origin at the top left corner of the tile)."""

    left: float
    top: float
    width: float
    height: float


class Orientation(NamedTuple):
    """Flips (first) and counter-clockwise quarter turns (after them) of a view."""

    flip_x: bool
    flip_y: bool
    turns: int


Band = list[tuple[slice, slice, np.ndarray]]
"""A banded matrix in blocks: (output cells, input pixels, weights float32 [outputs, inputs])."""


def sample_box(rng: np.random.Generator, tile: int, scale: tuple[float, float], aspect: tuple[float, float]) -> Box:
    """A random box inside a tile of `tile` x `tile` base pixels.

    Area uniform in `scale` (fraction of the tile), width/height log-uniform in `aspect`, ten attempts, then the largest box of the
    nearest admissible aspect in the middle: the rule of torchvision's RandomResizedCrop, without rounding to pixels.
    """
    low, high = np.log(aspect[0]), np.log(aspect[1])
    for _ in range(10):
        area, ratio = rng.uniform(*scale) * tile * tile, np.exp(rng.uniform(low, high))
        width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if width <= tile and height <= tile:
            return Box(float(rng.uniform(0.0, tile - width)), float(rng.uniform(0.0, tile - height)), float(width), float(height))
    ratio = min(max(1.0, aspect[0]), aspect[1])
    width, height = tile * min(1.0, ratio), tile / max(1.0, ratio)
    return Box((tile - width) / 2, (tile - height) / 2, width, height)


def sample_orientation(rng: np.random.Generator, flip: float, rotate: float) -> Orientation:
    """Horizontal and vertical flip with probability `flip` each; a turn by 90, 180 or 270 degrees with probability `rotate`."""
    draws = rng.random(3)
    turns = int(rng.integers(1, 4))
    return Orientation(bool(draws[0] < flip), bool(draws[1] < flip), turns if draws[2] < rotate else 0)


def orient(array: np.ndarray, orientation: Orientation, rows: int, cols: int) -> np.ndarray:
    """`array` flipped and turned in its axes `rows`, `cols`: a view of the same memory. The one rule for images and coordinates."""
    if orientation.flip_x:
        array = np.flip(array, cols)
    if orientation.flip_y:
        array = np.flip(array, rows)
    return np.rot90(array, orientation.turns, axes=(rows, cols)) if orientation.turns else array


def cell_centres(box: Box, size: int, orientation: Orientation) -> np.ndarray:
    """float32 [size, size, 2]: (x, y) of every cell centre of a view in base pixels of the tile, after flips and turns."""
    steps = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(box.left + box.width * steps, box.top + box.height * steps)
    return np.ascontiguousarray(orient(np.stack([x, y], -1), orientation, 0, 1), dtype=np.float32)


def cell_side(box: Box, size: int) -> float:
    """Side of one cell in base pixels (geometric mean of its two sides)."""
    return float(np.sqrt(box.width * box.height)) / size


def axis_weights(start: float, extent: float, n_out: int, n_in: int) -> Band:
    """Bilinear weights along one axis, antialiased when shrinking (triangle as wide as an output cell); rows sum to one.

    start, extent: the crop in input pixels; n_out cells over it; n_in pixels in the input. Input pixels outside the box but inside the
    tile may contribute. The identity crop gives the identity matrix.
    """
    step = extent / n_out
    reach = max(step, 1.0)
    centres = start + (np.arange(n_out) + 0.5) * step
    blocks = []
    for first in range(0, n_out, _BLOCK):
        centre = np.clip(centres[first:first + _BLOCK], 0.5, n_in - 0.5)
        low, high = max(int(centre[0] - reach), 0), min(int(centre[-1] + reach) + 1, n_in)
        pixels = np.arange(low, high) + 0.5
        weights = np.maximum(1.0 - np.abs(pixels[None, :] - centre[:, None]) / reach, 0.0)
        weights /= weights.sum(1, keepdims=True)
        blocks.append((slice(first, first + len(centre)), slice(low, high), weights.astype(np.float32)))
    return blocks


def apply_axes(planes: np.ndarray, rows: Band, cols: Band) -> np.ndarray:
    """Both axes of float32 planes [..., H, W] -> [..., H', W'] by the two banded matrices (rows first)."""
    width = planes.shape[-1]
    half = np.empty((*planes.shape[:-2], rows[-1][0].stop, width), np.float32)
    for out, src, weights in rows:
        for part in _parts(width, weights.size):
            np.matmul(weights, planes[..., src, part], out=half[..., out, part])
    result = np.empty((*half.shape[:-1], cols[-1][0].stop), np.float32)
    for out, src, weights in cols:
        for part in _parts(half.shape[-2], weights.size):
            np.matmul(half[..., part, src], weights.T, out=result[..., part, out])
    return result


def _parts(length: int, cost: int) -> list[slice]:
    """Slices of an axis so short that a product which costs `cost` per row of it stays below `_PRODUCT`."""
    step = max(_PRODUCT // cost, 1)
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def weighted(planes: np.ndarray, valid: np.ndarray | None, rows: Band, cols: Band) -> np.ndarray:
    """Like `apply_axes`, but pixels with valid [T, H, W] = 0 carry no weight, so that their value cannot bleed.

    planes: float32 [T, C, H, W]; valid None = all valid. Where no valid pixel is in reach the result is 0.
    """
    if valid is None:
        return apply_axes(planes, rows, cols)
    mask = valid[:, None].astype(np.float32)
    total = apply_axes(mask, rows, cols)
    return apply_axes(planes * mask, rows, cols) / np.where(total > 1e-6, total, np.inf)


def nearest(start: float, extent: float, n_out: int, n_in: int) -> np.ndarray:
    """Input pixel under every output cell centre along one axis, int64 [n_out]."""
    return np.clip(np.floor(start + (np.arange(n_out) + 0.5) * (extent / n_out)).astype(np.int64), 0, n_in - 1)


def resample(
    image: np.ndarray, valid: np.ndarray, bands: np.ndarray | None, box: Box, per_base: int, size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """A box of a sensor's stack, on `size` x `size` pixels, not yet flipped or turned.

    image: [T, S, S, C] any dtype; valid: [T, S, S] uint8; bands: indices into C, None = all; per_base: pixels per base pixel.
    Returns planes float32 [T, C', size, size] (0 where invalid) and valid float32 [T, size, size], None where everything is valid
    (the common case, kept cheap). Valid is taken from the nearest pixel; values are averaged over valid pixels only.
    """
    pixels = image.shape[1]
    span_x = (box.left * per_base, box.width * per_base)
    span_y = (box.top * per_base, box.height * per_base)
    rows, cols = axis_weights(*span_y, size, pixels), axis_weights(*span_x, size, pixels)
    window = (slice(None), slice(rows[0][1].start, rows[-1][1].stop), slice(cols[0][1].start, cols[-1][1].stop))
    rows, cols = _shift(rows, window[1].start), _shift(cols, window[2].start)
    stack = np.moveaxis(image[window], -1, 1)
    stack = np.ascontiguousarray(stack if bands is None else stack[:, bands], dtype=np.float32)
    seen = valid[window]
    if seen.all():
        return apply_axes(stack, rows, cols), None
    planes = weighted(stack, seen, rows, cols)
    mask = valid[:, nearest(*span_y, size, pixels)[:, None], nearest(*span_x, size, pixels)[None, :]].astype(np.float32)
    return planes * mask[:, None], mask


def _shift(band: Band, start: int) -> Band:
    return [(out, slice(src.start - start, src.stop - start), weights) for out, src, weights in band]


def draw_dates(rng: np.random.Generator, usable: np.ndarray, count: int) -> np.ndarray:
    """A random subsequence of at most `count` of the acquisitions `usable` (indices in time order), in time order."""
    if len(usable) <= count:
        return usable
    return np.sort(rng.choice(usable, count, replace=False))


def spread_dates(usable: np.ndarray, clear: np.ndarray, count: int) -> np.ndarray:
    """At most `count` acquisitions evenly over time, for evaluation: the clearest one of each of `count` consecutive groups.

    usable: indices in time order; clear: clear fraction of each of them. Equal clearness: the first of the group.
    """
    if len(usable) <= count:
        return usable
    edges = np.linspace(0, len(usable), count + 1).round().astype(int)
    return np.array([usable[a + int(np.argmax(clear[a:b]))] for a, b in zip(edges[:-1], edges[1:])])


def jitter_days(rng: np.random.Generator, dates: np.ndarray, days: int) -> np.ndarray:
    """`dates` (days since 1970, -1 = unknown) each moved by up to +-`days`, uniformly; unknown stays unknown."""
    return np.where(dates < 0, dates, np.maximum(dates + rng.integers(-days, days + 1, dates.shape), 0))


def day_of_year(dates: np.ndarray) -> np.ndarray:
    """Days since 1970-01-01 -> int32 day of the year 0..364 (1 January = 0, day 365 clamped); -1 (unknown) stays -1."""
    when = _EPOCH_DAYS + dates.astype(np.int64)
    days = (when - when.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64)
    return np.where(dates < 0, -1, np.minimum(days, LAST_DAY)).astype(np.int32)
