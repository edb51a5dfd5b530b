"""Geometry of a view: crop box, orientation, resampling of every sensor onto it, choice and disturbance of dates.

One box per view, in continuous base pixels of the tile, is applied to every sensor at the sensor's own resolution, so
the sensors of a view show the same ground (SkySense paper 3.1; SkySense++ lib/datasets/utils/transforms.py,
MSSSLRandomResizedCrop, does the same with relative boxes). Resampling is separable: two banded matrices per view and
sensor, applied in blocks so that the work is linear in the size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from skysense_jax.core import days

_BLOCK = 16  # output cells per matrix block: skips the zeros of the band
# Multiplications per matrix product: OpenBLAS hands larger ones (2**18) to its own threads, which fight with the reader
# threads of the pipeline: measured on two cores, twelve times slower than this.
_PRODUCT = 200_000


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

    Area uniform in `scale` (fraction of the tile), width/height log-uniform in `aspect`, ten attempts, then the
    largest box of the nearest admissible aspect in the middle: the rule of torchvision's RandomResizedCrop, without
    rounding to pixels.
    """
    low, high = np.log(aspect[0]), np.log(aspect[1])
    for _ in range(10):
        area, ratio = rng.uniform(*scale) * tile * tile, np.exp(rng.uniform(low, high))
        width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if width <= tile and height <= tile:
            left, top = rng.uniform(0.0, tile - width), rng.uniform(0.0, tile - height)
            return Box(float(left), float(top), float(width), float(height))
    ratio = min(max(1.0, aspect[0]), aspect[1])
    width, height = tile * min(1.0, ratio), tile / max(1.0, ratio)
    return Box((tile - width) / 2, (tile - height) / 2, width, height)


def sample_orientation(rng: np.random.Generator, flip: float, rotate: float) -> Orientation:
    """Horizontal and vertical flip with probability `flip` each, a turn by 90, 180 or 270 degrees with `rotate`."""
    draws = rng.random(3)
    turns = int(rng.integers(1, 4))
    return Orientation(bool(draws[0] < flip), bool(draws[1] < flip), turns if draws[2] < rotate else 0)


def orient(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    """`array` [..., H, W] flipped and turned (the same memory): the one rule for images, masks and coordinates."""
    array = array[..., :: -1 if orientation.flip_y else 1, :: -1 if orientation.flip_x else 1]
    if orientation.turns == 1:
        return array.swapaxes(-1, -2)[..., ::-1, :]
    if orientation.turns == 2:
        return array[..., ::-1, ::-1]
    return array.swapaxes(-1, -2)[..., ::-1] if orientation.turns == 3 else array


def cell_centres(box: Box, size: int, orientation: Orientation) -> np.ndarray:
    """float32 [size, size, 2]: (x, y) of every cell centre in base pixels of the tile, after flips and turns."""
    steps = (np.arange(size) + 0.5) / size
    grid = np.empty((2, size, size), np.float32)
    grid[0], grid[1] = box.left + box.width * steps, (box.top + box.height * steps)[:, None]
    return np.stack(orient(grid, orientation), -1)


def cell_side(box: Box, size: int) -> float:
    """Side of one cell in base pixels (geometric mean of its two sides)."""
    return float(np.sqrt(box.width * box.height)) / size


def make_band(centres: np.ndarray, reach: float, n_in: int, kernel: Callable[[np.ndarray], np.ndarray]) -> Band:
    """Banded matrix of a kernel around ascending `centres` (pixels, 0.5 = centre of the first); rows sum to one.

    kernel: distances in pixels -> weights >= 0, which must be 0 beyond `reach` and positive at the pixel nearest to a
    centre.
    """
    first = np.arange(0, len(centres), _BLOCK)
    low = np.maximum(np.floor(centres[first] - reach).astype(int), 0)
    high = np.minimum(np.ceil(centres[np.minimum(first + _BLOCK, len(centres)) - 1] + reach).astype(int), n_in)
    span = int((high - low).max())
    low = np.minimum(low, n_in - span)
    rows = np.minimum(first[:, None] + np.arange(_BLOCK), len(centres) - 1)
    weights = kernel((low[:, None] + 0.5 + np.arange(span))[:, None, :] - centres[rows][:, :, None])
    weights = (weights / weights.sum(2, keepdims=True)).astype(np.float32)
    return [
        (slice(a, min(a + _BLOCK, len(centres))), slice(b, b + span), block[: len(centres) - a])
        for a, b, block in zip(first.tolist(), low.tolist(), weights)
    ]


def axis_weights(start: float, extent: float, n_out: int, n_in: int) -> Band:
    """Bilinear weights along one axis, antialiased when shrinking (triangle as wide as an output cell).

    start, extent: the crop in input pixels; n_out cells over it; n_in pixels in the input. Input pixels outside the
    box but inside the tile may contribute. The identity crop gives the identity matrix.
    """
    step = extent / n_out
    reach = max(step, 1.0)
    centres = np.clip(start + (np.arange(n_out) + 0.5) * step, 0.5, n_in - 0.5)
    return make_band(centres, reach, n_in, lambda distance: np.maximum(1.0 - np.abs(distance) / reach, 0.0))


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


class Window(NamedTuple):
    """A view in a sensor's raster: the part in reach, the weights relative to that part, the nearest pixels."""

    part: tuple[slice, slice]
    rows: Band
    cols: Band
    near: tuple[np.ndarray, np.ndarray]


def make_window(box: Box, size: int, per_base: int, n_in: int) -> Window:
    """A box in a raster of `n_in` pixels, `per_base` per base pixel, to be put on `size` pixels a side."""
    axes = []
    for start, extent in ((box.top * per_base, box.height * per_base), (box.left * per_base, box.width * per_base)):
        band = axis_weights(start, extent, size, n_in)
        part = slice(band[0][1].start, band[-1][1].stop)
        band = [(out, slice(src.start - part.start, src.stop - part.start), weights) for out, src, weights in band]
        near = np.floor(start + (np.arange(size) + 0.5) * (extent / size)).astype(int)
        axes.append((part, band, np.clip(near, 0, n_in - 1)))
    (part_y, rows, near_y), (part_x, cols, near_x) = axes
    return Window((part_y, part_x), rows, cols, (near_y[:, None], near_x[None, :]))


def resample(
    image: np.ndarray, valid: np.ndarray, bands: np.ndarray | None, window: Window
) -> tuple[np.ndarray, np.ndarray | None]:
    """A window of a sensor's stack on the view's pixels, not yet flipped or turned.

    image: [T, S, S, C] any dtype; valid: [T, S, S] uint8; bands: indices into C, None = all.
    Returns planes float32 [T, C', H, W] (0 where invalid) and valid float32 [T, H, W], None where everything is valid
    (the common case, kept cheap). Valid is taken from the nearest pixel; values are averaged over valid pixels only.
    """
    stack = image[:, *window.part].transpose(0, 3, 1, 2)
    stack = np.ascontiguousarray(stack if bands is None else stack[:, bands], dtype=np.float32)
    seen = valid[:, *window.part]
    if seen.all():
        return apply_axes(stack, window.rows, window.cols), None
    planes = weighted(stack, seen, window.rows, window.cols)
    mask = valid[:, *window.near].astype(np.float32)
    return planes * mask[:, None], mask


def draw_dates(rng: np.random.Generator, usable: np.ndarray, count: int) -> np.ndarray:
    """A random subsequence of at most `count` of the acquisitions `usable` (indices in time order), in time order."""
    if len(usable) <= count:
        return usable
    return np.sort(rng.choice(usable, count, replace=False))


def spread_dates(usable: np.ndarray, clear: np.ndarray, count: int) -> np.ndarray:
    """At most `count` acquisitions evenly over time, for evaluation: the clearest of each of `count` groups in a row.

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
    of_year = days.day_of_year(days.EPOCH + dates.astype(np.int64))
    return np.where(dates < 0, -1, of_year).astype(np.int32)
