"""Geometry of a view: crop box, orientation, resampling of every sensor onto it, choice and disturbance of dates.

One box per view, in continuous base pixels of the tile, is applied to every sensor at that sensor's resolution, so the
sensors of a view show the same ground (SkySense paper 3.1; SkySense++ lib/datasets/utils/transforms.py,
MSSSLRandomResizedCrop, does the same with relative boxes). Resampling is separable: two banded matrices per view and
sensor, applied in blocks so that the work is linear in the size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from skysense_jax.core import days

_BLOCK = 16  # output cells per matrix block: skips the zeros of the band
# Multiplications per matrix product: OpenBLAS runs larger products (2**18) on threads of its pool, which compete with
# the reader threads of the pipeline: measured on two cores, twelve times slower than this.
_PRODUCT = 200_000


class Box(NamedTuple):
    """A crop box in base pixels of the tile: floats, the origin is the top left corner of the tile."""

    left: float
    top: float
    width: float
    height: float


class Orientation(NamedTuple):
    """Flips of a view, and the counter-clockwise quarter turns that follow them."""

    flip_x: bool
    flip_y: bool
    turns: int


Band = list[tuple[slice, slice, np.ndarray]]
"""A banded matrix in blocks: (output cells, input pixels, weights float32 [outputs, inputs])."""


def sample_box(rng: np.random.Generator, tile: int, scale: tuple[float, float], aspect: tuple[float, float]) -> Box:
    """A random box inside a tile.

    The rule of torchvision's RandomResizedCrop, without rounding to pixels: the area is uniform and the aspect
    log-uniform; after ten attempts that do not fit, the largest box of the nearest admissible aspect in the middle.

    Args:
        rng: source of all randomness.
        tile: base pixels along the tile.
        scale: least and largest area of the box, as fractions of the tile.
        aspect: least and largest width / height.

    Returns:
        The box, in base pixels.
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
    """A random orientation.

    Args:
        rng: source of all randomness.
        flip: probability of the horizontal and, independently, of the vertical flip.
        rotate: probability of a turn by 90, 180 or 270 degrees.

    Returns:
        The orientation.
    """
    draws = rng.random(3)
    turns = int(rng.integers(1, 4))
    return Orientation(bool(draws[0] < flip), bool(draws[1] < flip), turns if draws[2] < rotate else 0)


def orient(array: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Flips and turns an array: the only rule for images, masks and coordinates.

    Args:
        array: [..., H, W], any dtype.
        orientation: flips and turns.

    Returns:
        [..., H, W], or [..., W, H] after an odd number of turns; a view of the same memory.
    """
    array = array[..., :: -1 if orientation.flip_y else 1, :: -1 if orientation.flip_x else 1]
    if orientation.turns == 1:
        return array.swapaxes(-1, -2)[..., ::-1, :]
    if orientation.turns == 2:
        return array[..., ::-1, ::-1]
    return array.swapaxes(-1, -2)[..., ::-1] if orientation.turns == 3 else array


def cell_centres(box: Box, size: int, orientation: Orientation) -> np.ndarray:
    """Where the cells of a view lie on the tile.

    Args:
        box: the view's box.
        size: cells along the view.
        orientation: the view's flips and turns.

    Returns:
        float32 [size, size, 2]: (x, y) of every cell centre in base pixels of the tile, after flips and turns.
    """
    steps = (np.arange(size) + 0.5) / size
    grid = np.empty((2, size, size), np.float32)
    grid[0], grid[1] = box.left + box.width * steps, (box.top + box.height * steps)[:, None]
    return np.stack(list(orient(grid, orientation)), -1)


def cell_side(box: Box, size: int) -> float:
    """Side of a cell in base pixels: the geometric mean of its two sides.

    Args:
        box: the view's box.
        size: cells along the view.

    Returns:
        The side, in base pixels.
    """
    return float(np.sqrt(box.width * box.height)) / size


def make_band(centres: np.ndarray, reach: float, n_in: int, kernel: Callable[[np.ndarray], np.ndarray]) -> Band:
    """Banded matrix of a kernel around ascending centres; its rows sum to one.

    Args:
        centres: float [cells], ascending, in pixels; 0.5 is the centre of the first pixel.
        reach: distance in pixels beyond which the kernel is 0.
        n_in: pixels of the input.
        kernel: distances in pixels -> weights >= 0, positive at the pixel nearest to a centre.

    Returns:
        The matrix in blocks of output cells.
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
        for a, b, block in zip(first.tolist(), low.tolist(), weights, strict=True)
    ]


def axis_weights(start: float, extent: float, n_out: int, n_in: int) -> Band:
    """Bilinear weights along one axis, antialiased when shrinking (triangle as wide as an output cell).

    Input pixels outside the box but inside the tile may contribute. The identity crop gives the identity matrix.

    Args:
        start: first edge of the crop, in input pixels.
        extent: length of the crop, in input pixels.
        n_out: cells over the crop.
        n_in: pixels of the input.

    Returns:
        The banded matrix [n_out, n_in].
    """
    step = extent / n_out
    reach = max(step, 1.0)
    centres = np.clip(start + (np.arange(n_out) + 0.5) * step, 0.5, n_in - 0.5)
    return make_band(centres, reach, n_in, lambda distance: np.maximum(1.0 - np.abs(distance) / reach, 0.0))


def apply_axes(planes: np.ndarray, rows: Band, cols: Band) -> np.ndarray:
    """Resamples both axes by two banded matrices, rows first.

    Args:
        planes: float32 [..., H, W].
        rows: banded matrix [H', H].
        cols: banded matrix [W', W].

    Returns:
        float32 [..., H', W'].
    """
    width = planes.shape[-1]
    half = np.empty((*planes.shape[:-2], rows[-1][0].stop, width), np.float32)
    for out, src, weights in rows:
        for columns in _slices(width, weights.size):
            np.matmul(weights, planes[..., src, columns], out=half[..., out, columns])
    result = np.empty((*half.shape[:-1], cols[-1][0].stop), np.float32)
    for out, src, weights in cols:
        for lines in _slices(half.shape[-2], weights.size):
            np.matmul(half[..., lines, src], weights.T, out=result[..., lines, out])
    return result


def _slices(length: int, cost: int) -> list[slice]:
    """Slices of an axis so short that a product which costs `cost` per row of the slice stays below `_PRODUCT`."""
    step = max(_PRODUCT // cost, 1)
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def weighted(planes: np.ndarray, valid: np.ndarray | None, rows: Band, cols: Band) -> np.ndarray:
    """Like `apply_axes`, but invalid pixels carry no weight, so that their values cannot bleed.

    Args:
        planes: float32 [T, C, H, W].
        valid: [T, H, W], 0 = invalid; None = all valid.
        rows: banded matrix [H', H].
        cols: banded matrix [W', W].

    Returns:
        float32 [T, C, H', W'], 0 where no valid pixel is in reach.
    """
    if valid is None:
        return apply_axes(planes, rows, cols)
    mask = valid[:, None].astype(np.float32)
    total = apply_axes(mask, rows, cols)
    return apply_axes(planes * mask, rows, cols) / np.where(total > 1e-6, total, np.inf)


class Window(NamedTuple):
    """A view in a sensor's raster.

    Attributes:
        reach: rows and columns of the raster that contribute to the view.
        rows, cols: weights relative to `reach`.
        nearest: row [H, 1] and column [1, W] of the raster's pixel nearest to every pixel of the view.
    """

    reach: tuple[slice, slice]
    rows: Band
    cols: Band
    nearest: tuple[np.ndarray, np.ndarray]


def make_window(box: Box, size: int, per_base: int, n_in: int) -> Window:
    """The window of a box in a sensor's raster.

    Args:
        box: the view's box, in base pixels.
        size: pixels along the view.
        per_base: pixels of the raster along a base pixel.
        n_in: pixels along the raster.

    Returns:
        The window.
    """
    axes = []
    for start, extent in ((box.top * per_base, box.height * per_base), (box.left * per_base, box.width * per_base)):
        band = axis_weights(start, extent, size, n_in)
        reach = slice(band[0][1].start, band[-1][1].stop)
        band = [(out, slice(src.start - reach.start, src.stop - reach.start), weights) for out, src, weights in band]
        nearest = np.floor(start + (np.arange(size) + 0.5) * (extent / size)).astype(int)
        axes.append((reach, band, np.clip(nearest, 0, n_in - 1)))
    (reach_y, rows, nearest_y), (reach_x, cols, nearest_x) = axes
    return Window((reach_y, reach_x), rows, cols, (nearest_y[:, None], nearest_x[None, :]))


def resample(
    image: np.ndarray, valid: np.ndarray, bands: np.ndarray | None, window: Window
) -> tuple[np.ndarray, np.ndarray | None]:
    """A window of a sensor's stack on the view's pixels, not yet flipped or turned.

    `valid` is taken from the nearest pixel; values are averaged over valid pixels only.

    Args:
        image: [T, S, S, C], any dtype.
        valid: uint8 [T, S, S].
        bands: indices into C; None = all.
        window: the view in the raster.

    Returns:
        (planes float32 [T, C', H, W], 0 where invalid; valid float32 [T, H, W], None where every pixel in reach is
        valid, the common case, kept cheap).
    """
    stack = image[:, *window.reach].transpose(0, 3, 1, 2)
    stack = np.ascontiguousarray(stack if bands is None else stack[:, bands], dtype=np.float32)
    valid_in_reach = valid[:, *window.reach]
    if valid_in_reach.all():
        return apply_axes(stack, window.rows, window.cols), None
    planes = weighted(stack, valid_in_reach, window.rows, window.cols)
    mask = valid[:, *window.nearest].astype(np.float32)
    return planes * mask[:, None], mask


def draw_dates(rng: np.random.Generator, usable: np.ndarray, count: int) -> np.ndarray:
    """A random subsequence of acquisitions, in time order.

    Args:
        rng: source of all randomness.
        usable: indices of the usable acquisitions, in time order.
        count: acquisitions in the subsequence, at most.

    Returns:
        The chosen indices, in time order.
    """
    if len(usable) <= count:
        return usable
    return np.sort(rng.choice(usable, count, replace=False))


def spread_dates(usable: np.ndarray, clear: np.ndarray, count: int) -> np.ndarray:
    """Acquisitions spread evenly over time, for evaluation: the clearest of each of `count` consecutive groups.

    Args:
        usable: indices of the usable acquisitions, in time order.
        clear: clear fraction of each of them; of equally clear ones the first of the group is taken.
        count: acquisitions in the result, at most.

    Returns:
        The chosen indices, in time order.
    """
    if len(usable) <= count:
        return usable
    edges = np.linspace(0, len(usable), count + 1).round().astype(int)
    return np.array([usable[a + int(np.argmax(clear[a:b]))] for a, b in itertools.pairwise(edges)])


def jitter_days(rng: np.random.Generator, dates: np.ndarray, days: int) -> np.ndarray:
    """Moves every date by a few days, uniformly; an unknown date stays unknown.

    Args:
        rng: source of all randomness.
        dates: days since 1970-01-01, -1 = unknown.
        days: largest move in either direction.

    Returns:
        The moved dates, of the same shape, never before 1970-01-01.
    """
    return np.where(dates < 0, dates, np.maximum(dates + rng.integers(-days, days + 1, dates.shape), 0))


def day_of_year(dates: np.ndarray) -> np.ndarray:
    """Days since 1970-01-01 -> int32 day of the year 0..364 (1 January = 0, day 365 clamped); -1 (unknown) stays -1."""
    of_year = days.day_of_year(days.EPOCH + dates.astype(np.int64))
    return np.where(dates < 0, -1, of_year).astype(np.int32)
