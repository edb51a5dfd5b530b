"""Ground geometry: the grid of a place, its tiles, and bringing pixels of any raster onto one tile's grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.warp import reproject, transform, transform_bounds
from rasterio.windows import Window

from skysense_jax.data.ingest.raster import GDAL_ERRORS, Header, RasterRefused
from skysense_jax.data.ingest.settings import Settings
from skysense_jax.sensors import base_grid_first

MAX_TILES = 1_000_000
_ALIGNED = 1e-3  # fraction of a pixel below which two grids are the same
_OUTSIDE = np.float32(-3.0e38)  # never a measurement: only tells GDAL that no source value is to be skipped


Read = Callable[[Window], np.ndarray]
"""window of a raster -> its values [bands, h, w]."""

Bounds = tuple[float, float, float, float]
"""left, bottom, right, top."""


class Tile(NamedTuple):
    """One square of ground. name: the record's place. left, top: corner in `crs`; side: metres."""

    name: str
    crs: CRS
    left: float
    top: float
    side: float

    @property
    def bounds(self) -> Bounds:
        """The square in `crs`."""
        return self.left, self.top - self.side, self.left + self.side, self.top

    def grid(self, size: int) -> Affine:
        """Pixel -> ground of the tile cut into size x size pixels."""
        step = self.side / size
        return Affine(step, 0.0, self.left, 0.0, -step, self.top)

    def lonlat(self) -> tuple[float, float]:
        """Longitude and latitude of the centre, degrees (EPSG:4326)."""
        x, y = transform(self.crs, "EPSG:4326", [self.left + self.side / 2], [self.top - self.side / 2])
        return x[0], y[0]


def crs_text(crs: CRS | None) -> str:
    """EPSG:code where there is one, else WKT; "" without a CRS."""
    if crs is None:
        return ""
    authority = crs.to_authority(confidence_threshold=100)
    return ":".join(authority) if authority else crs.to_wkt()


def at(grid: Affine, column: float, row: float) -> tuple[float, float]:
    """Ground position of a pixel position (spelled out: affine 2 and 3 disagree on the operator).

    Args:
        grid: pixel -> ground.
        column: of the pixel position.
        row: of the pixel position.

    Returns:
        (x, y).
    """
    return grid.a * column + grid.b * row + grid.c, grid.d * column + grid.e * row + grid.f


def is_metric(crs: CRS) -> bool:
    """Projected with the metre as its unit, and not a world Mercator, whose metres are metres at the equator only."""
    return (
        crs.is_projected and crs.linear_units_factor[1] == 1.0 and crs.to_dict().get("proj") not in ("merc", "webmerc")
    )


def corners(head: Header) -> Bounds:
    """left, bottom, right, top of a raster in its own CRS (rotated ones: of the rectangle around it)."""
    points = [
        at(head.transform, *point) for point in ((0, 0), (head.width, 0), (0, head.height), (head.width, head.height))
    ]
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def place_crs(head: Header) -> CRS:
    """The place's CRS from its reference raster.

    That of the raster if it is metric, else the UTM zone of its centre, polar stereographic beyond 84 N and 80 S.

    Raises:
        RasterRefused: the raster's CRS does not lead to a longitude and latitude on Earth.
    """
    if is_metric(head.crs):
        return head.crs
    left, bottom, right, top = corners(head)
    try:
        x, y = transform(head.crs, "EPSG:4326", [(left + right) / 2], [(bottom + top) / 2])
    except GDAL_ERRORS as error:
        raise RasterRefused(f"its CRS cannot be related to longitude and latitude: {error}") from error
    lon, lat = (x[0] + 180) % 360 - 180, y[0]
    if not (math.isfinite(lon) and -90 <= lat <= 90):
        raise RasterRefused(f"its centre lies at longitude {x[0]}, latitude {y[0]}: no place on Earth")
    if lat > 84:
        return CRS.from_epsg(3413)
    if lat < -80:
        return CRS.from_epsg(3031)
    return CRS.from_epsg((32600 if lat >= 0 else 32700) + min(60, int((lon + 180) // 6) + 1))


def extent(head: Header, crs: CRS) -> tuple[Bounds, Bounds]:
    """Where a raster lies in another CRS.

    Args:
        head: of the raster.
        crs: the place's.

    Returns:
        (bounds, core): bounds encloses the raster; core spans the middles of its edges, so that a raster turned against
        the grid (another UTM zone, degrees) does not look larger than it is.

    Raises:
        RasterRefused: the raster cannot be located there.
    """
    native = corners(head)
    if head.crs == crs:
        return native, native
    left, bottom, right, top = native
    if head.crs.is_geographic and not (-180.001 <= left <= right <= 180.001 and -90.001 <= bottom <= top <= 90.001):
        raise RasterRefused(
            f"spans longitudes {left:g} .. {right:g}, latitudes {bottom:g} .. {top:g}: only -180 .. 180 and -90 .. 90 "
            f"are read; reproject it (for example `rio warp --dst-crs EPSG:326xx`), or split it at the 180th meridian"
        )
    try:
        bounds = transform_bounds(head.crs, crs, *native, densify_pts=21)
        xs, ys = transform(
            head.crs,
            crs,
            [left, right, (left + right) / 2, (left + right) / 2],
            [(bottom + top) / 2, (bottom + top) / 2, bottom, top],
        )
    except GDAL_ERRORS as error:
        raise RasterRefused(f"cannot be brought into the place's CRS {crs_text(crs)[:40]}: {error}") from error
    core = min(xs[0], xs[1]), min(ys[2], ys[3]), max(xs[0], xs[1]), max(ys[2], ys[3])
    if not all(math.isfinite(value) for value in (*bounds, *core)):
        raise RasterRefused(f"lies outside the validity of the place's CRS {crs_text(crs)[:40]}")
    return bounds, core


def reference(heads: Sequence[tuple[str, Header]]) -> Header:
    """The raster that decides a place's CRS and, in a single-tile place, where the grid starts.

    That of the first sensor of :func:`skysense_jax.sensors.base_grid_first`, then the raster with the smallest pixel,
    then the first in the catalog's order. heads: (sensor, header) of every image.
    """
    order = base_grid_first()
    return min(heads, key=lambda head: (order.index(head[0]), head[1].step))[1]


def tiles_of(
    place: str, head: Header, extents: Sequence[tuple[Bounds, Bounds]], crs: CRS, settings: Settings
) -> Iterator[Tile]:
    """The tiles of a place, north to south, west to east.

    One tile starting on the reference raster's corner (moved by whole base pixels where another sensor reaches further)
    if everything fits within one base pixel; otherwise all tiles of the CRS's ground grid (origin 0, 0) that touch a
    raster, named PLACE@COLUMN_ROW (evaluation keeps the tiles of a place together).

    Args:
        place: name of the place.
        head: reference raster.
        extents: (bounds, core) of every image of the place.
        crs: the place's.
        settings: size of a tile and of a base pixel.

    Yields:
        Tiles.

    Raises:
        RasterRefused: an absurd number of tiles.
    """
    gsd = settings.gsd
    side = settings.tile * gsd
    cores = [core for _, core in extents]
    left, bottom = min(core[0] for core in cores), min(core[1] for core in cores)
    right, top = max(core[2] for core in cores), max(core[3] for core in cores)
    first = extent(head, crs)[1]
    start_x = first[0] - max(0, math.ceil((first[0] - left) / gsd - 0.5)) * gsd
    start_y = first[3] + max(0, math.ceil((top - first[3]) / gsd - 0.5)) * gsd
    if right <= start_x + side + gsd and bottom >= start_y - side - gsd:
        yield Tile(place, crs, start_x, start_y, side)
        return
    slack = gsd * _ALIGNED
    touched: set[tuple[int, int]] = set()
    for (x0, y0, x1, y1), _ in extents:
        columns = range(math.floor((x0 + slack) / side), math.ceil((x1 - slack) / side))
        rows = range(math.floor((y0 + slack) / side), math.ceil((y1 - slack) / side))
        if len(columns) * len(rows) > MAX_TILES:
            raise RasterRefused(
                f"the place would be cut into {len(columns)} x {len(rows)} tiles of {side:g} m; limit {MAX_TILES}"
            )
        touched.update((row, column) for row in rows for column in columns)
    if len(touched) > MAX_TILES:
        raise RasterRefused(f"the place would be cut into {len(touched)} tiles of {side:g} m; limit {MAX_TILES}")
    for row, column in sorted(touched, key=lambda key: (-key[0], key[1])):
        yield Tile(f"{place}@{column}_{row}", crs, column * side, (row + 1) * side, side)


def _same_grid(head: Header, crs: CRS, grid: Affine, size: int) -> tuple[int, int] | None:
    """(row, column) of the tile's first pixel in the raster where both grids coincide, else None."""
    source = head.transform
    if head.crs != crs or source.b != 0 or source.d != 0:
        return None
    if max(abs(source.a - grid.a), abs(source.e - grid.e)) * max(size, 1) > _ALIGNED * abs(grid.a):
        return None
    column, row = at(~source, grid.c, grid.f)
    if abs(column - round(column)) > _ALIGNED or abs(row - round(row)) > _ALIGNED:
        return None
    return round(row), round(column)


def _around(head: Header, tile: Tile, grid: Affine) -> Window | None:
    """The part of the raster that can influence the tile, None where the tile misses it.

    It has a margin for the resampling kernel.
    """
    try:
        left, bottom, right, top = transform_bounds(tile.crs, head.crs, *tile.bounds, densify_pts=21)
    except GDAL_ERRORS:
        return None  # the tile lies where the raster's CRS is not defined, hence not on the raster
    if head.crs.is_geographic:  # longitudes as the raster counts them, also for a tile on the 180th meridian
        right += 360.0 if left > right else 0.0
        west, _, east, _ = corners(head)
        turn = 360.0 * round((west + east - left - right) / 720.0)
        left, right = left + turn, right + turn
    points = [at(~head.transform, *point) for point in ((left, bottom), (left, top), (right, bottom), (right, top))]
    if not all(math.isfinite(value) for point in points for value in point):
        return None
    columns, rows = zip(*points, strict=True)
    shrink = max(max(columns) - min(columns), max(rows) - min(rows)) / (tile.side / grid.a)
    margin = 2 + math.ceil(shrink)
    first_column, last_column = (
        max(0, math.floor(min(columns)) - margin),
        min(head.width, math.ceil(max(columns)) + margin),
    )
    first_row, last_row = max(0, math.floor(min(rows)) - margin), min(head.height, math.ceil(max(rows)) + margin)
    if first_column >= last_column or first_row >= last_row:
        return None
    return Window(first_column, first_row, last_column - first_column, last_row - first_row)


def measurements_onto_tile(head: Header, tile: Tile, size: int, bands: int, read: Read) -> np.ndarray | None:
    """Brings measurements of a raster onto a tile's grid.

    Where the grids coincide, values are copied unchanged. Otherwise they are resampled bilinearly over the valid source
    pixels alone, each result weighted by their share; where less than half of the weight is valid, the result is NaN.

    Args:
        head: of the raster.
        tile: the square of ground.
        size: pixels along the tile.
        bands: number of bands.
        read: window of the raster -> float32 [bands, h, w], NaN where invalid.

    Returns:
        float32 [bands, size, size], NaN where invalid; None where the raster does not reach the tile.
    """
    grid = tile.grid(size)
    out = np.full((bands, size, size), np.nan, np.float32)
    origin = _same_grid(head, tile.crs, grid, size)
    if origin is not None:
        return out if _copy(head, origin, out, read) else None
    window = _around(head, tile, grid)
    if window is None:
        return None
    values = read(window)
    valid = np.isfinite(values)
    if not valid.any():
        return out
    common = _both_grids(head, window, tile, grid)
    common |= {"src_nodata": _OUTSIDE, "dst_nodata": np.nan, "resampling": Resampling.bilinear}
    if valid.all():
        reproject(values, out, **common)
        return out
    # One weight plane where all bands share their holes, one per band otherwise.
    planes = valid[:1] if (valid == valid[:1]).all() else valid
    weight = np.full((len(planes), size, size), np.nan, np.float32)
    reproject(planes.astype(np.float32), weight, **common)
    reproject(np.where(valid, values, np.float32(0)), out, **common)
    enough = np.broadcast_to(weight >= 0.5, out.shape)
    return np.where(enough, out / np.where(weight >= 0.5, weight, 1), np.float32(np.nan)).astype(np.float32)


def classes_onto_tile(head: Header, tile: Tile, size: int, read: Read) -> np.ndarray | None:
    """Brings the classes of a mask or label map onto a tile's grid: copied where the grids coincide, else the nearest.

    Args:
        head: of the raster.
        tile: the square of ground.
        size: pixels along the tile.
        read: window of the raster -> int32 [1, h, w], -1 where invalid.

    Returns:
        int32 [1, size, size], -1 where invalid; None where the raster does not reach the tile.
    """
    grid = tile.grid(size)
    out = np.full((1, size, size), -1, np.int32)
    origin = _same_grid(head, tile.crs, grid, size)
    if origin is not None:
        return out if _copy(head, origin, out, read) else None
    window = _around(head, tile, grid)
    if window is None:
        return None
    values, common = read(window), _both_grids(head, window, tile, grid)
    reproject(values, out, src_nodata=-1, dst_nodata=-1, resampling=Resampling.nearest, **common)
    return out


def _copy(head: Header, origin: tuple[int, int], out: np.ndarray, read: Read) -> bool:
    """Copies the part of the raster that lies on the tile; False where none does. origin: of :func:`_same_grid`."""
    size = out.shape[-1]
    row0, column0 = max(0, origin[0]), max(0, origin[1])
    row1, column1 = min(head.height, origin[0] + size), min(head.width, origin[1] + size)
    if row0 >= row1 or column0 >= column1:
        return False
    part = read(Window(column0, row0, column1 - column0, row1 - row0))
    out[:, row0 - origin[0] : row1 - origin[0], column0 - origin[1] : column1 - origin[1]] = part
    return True


def _both_grids(head: Header, window: Window, tile: Tile, grid: Affine) -> dict[str, Any]:
    """Arguments that tell GDAL where the window's pixels lie and where the tile's."""
    native = head.transform
    x, y = at(native, window.col_off, window.row_off)
    source = Affine(native.a, native.b, x, native.d, native.e, y)
    return {"src_transform": source, "src_crs": head.crs, "dst_transform": grid, "dst_crs": tile.crs}
