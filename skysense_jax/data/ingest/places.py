"""Turns the rasters of one catalog place into records: inspect every file, lay the grid, read tile by tile.

A file that cannot be used is refused with its reason and the rest of the place goes on without it. A file whose
pixels turn out to be unreadable only while a tile is read raises :class:`BrokenFile`; the caller starts the place
again without it, so that a record never depends on how far a broken file could be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rasterio.crs import CRS
from rasterio.windows import Window

from skysense_jax.data.ingest.catalog import Row
from skysense_jax.data.ingest.grid import (
    Bounds,
    Tile,
    classes_onto_tile,
    crs_text,
    extent,
    measurements_onto_tile,
    place_crs,
    reference,
    tiles_of,
)
from skysense_jax.data.ingest.inspection import (
    Layer,
    duplicate_bands,
    inspect_classes,
    inspect_image,
    path_of,
    to_labels,
)
from skysense_jax.data.ingest.plain_images import Cut, cuts_of
from skysense_jax.data.ingest.raster import GDAL_ERRORS, BrokenFile, Files, Header, RasterRefused, read_window
from skysense_jax.data.ingest.report import REFUSED, USED, Report, add_dates, file_entry
from skysense_jax.data.ingest.settings import Settings
from skysense_jax.data.ingest.units import convert
from skysense_jax.data.records import Record
from skysense_jax.sensors import NO_DATE, SENSORS, UNLABELLED


class _Place(NamedTuple):
    images: dict[str, dict[int, list[Layer]]]  # sensor -> date -> files with disjoint bands
    masks: dict[tuple[str, int], list[Layer]]
    label_maps: list[Layer]
    labels: tuple[str, ...]


def _inspect(
    rows: Sequence[Row], settings: Settings, files: Files, broken: Mapping[Path, str], report: Report
) -> _Place:
    """Inspects every row of a place; refusals go into the report."""
    place = _Place({}, {}, [], tuple(name for row in rows if row.kind == "label" for name in row.classes))
    masks: list[tuple[Layer, int]] = []
    for row in rows:
        if row.kind == "label":
            continue
        try:
            path = path_of(row)
            if path in broken:
                raise RasterRefused(broken[path])
            if not settings.georeferenced and (row.kind != "image" or place.images):
                raise RasterRefused("without georeference a place is one image: nothing says what lies on what")
            if row.kind == "image":
                layer = inspect_image(row, files, settings)
                same = place.images.setdefault(row.sensor, {}).setdefault(row.date, [])
                twice = duplicate_bands(same, layer)
                if twice:
                    when = "without a date" if row.date == NO_DATE else "on this date"
                    raise RasterRefused(
                        f"twice {when}: {','.join(twice)} of {row.sensor} already comes from row {same[0].row.number}"
                    )
                same.append(layer)
            else:
                layer = inspect_classes(row, files, settings.max_pixels)
                if row.kind == "mask":
                    masks.append((layer, len(report["files"])))
                else:
                    place.label_maps.append(layer)
        except RasterRefused as error:
            reason = error.reason if isinstance(error, BrokenFile) else str(error)
            report["files"].append(file_entry(row, REFUSED, reason=reason))
        else:
            report["files"].append(file_entry(row, USED, **layer.facts))
    for layer, entry in masks:
        row = layer.row
        if place.images.get(row.sensor, {}).get(row.date):
            place.masks.setdefault((row.sensor, row.date), []).append(layer)
        else:
            report["files"][entry] = file_entry(
                row, REFUSED, reason=f"a mask without a usable {row.sensor} raster of the same date"
            )
    return place


def _drop_unlocated(place: _Place, crs: CRS, report: Report) -> list[tuple[Bounds, Bounds]]:
    """Extents of the images in the place's CRS; an image that cannot be located in it leaves the place, refused."""
    extents = []
    for dates in place.images.values():
        for layers in dates.values():
            for layer in list(layers):
                try:
                    extents.append(extent(layer.reading.header, crs))
                except RasterRefused as error:
                    layers.remove(layer)
                    index = next(i for i, entry in enumerate(report["files"]) if entry["row"] == layer.row.number)
                    report["files"][index] = file_entry(layer.row, REFUSED, reason=str(error))
    return extents


@contextlib.contextmanager
def _named(layer: Layer, tile: Tile | Cut) -> Iterator[None]:
    """What GDAL raises while a file is brought onto a tile, as BrokenFile with the file's name."""
    try:
        yield
    except GDAL_ERRORS as error:
        reason = f"cannot be brought onto the grid of {tile.name}: {error}"
        raise BrokenFile(layer.reading.header.path, reason) from error


def _read_image(layer: Layer, tile: Tile | Cut, size: int, files: Files) -> np.ndarray | None:
    """float32 [bands of the file, size, size] in the stored unit, NaN where invalid; None where it misses the tile."""
    conversion = layer.conversion
    if conversion is None:
        raise ValueError(f"{layer.row.name}: a layer of kind {layer.row.kind} holds no measurements")

    def read(window: Window) -> np.ndarray:
        return convert(*read_window(files, layer.reading, window), conversion)

    if isinstance(tile, Cut):
        return read(tile.window(size))
    with _named(layer, tile):
        return measurements_onto_tile(layer.reading.header, tile, size, len(layer.columns), read)


def _read_classes(layer: Layer, tile: Tile | Cut, size: int, files: Files) -> np.ndarray | None:
    """int32 [size, size], -1 where there is no class; None where it misses the tile."""

    def read(window: Window) -> np.ndarray:
        return to_labels(*read_window(files, layer.reading, window))

    if isinstance(tile, Cut):
        return read(tile.window(size))[0]
    with _named(layer, tile):
        classes = classes_onto_tile(layer.reading.header, tile, size, read)
    return None if classes is None else classes[0]


def _clear(masks: Sequence[Layer], tile: Tile | Cut, size: int, files: Files) -> np.ndarray:
    """1 where a mask layer says clear; where there is a mask but it says nothing (outside it, its nodata): 0."""
    clear = np.zeros((size, size), np.uint8)
    for layer in masks:
        classes = _read_classes(layer, tile, size, files)
        if classes is not None:
            clear |= np.isin(classes, [int(value) for value in layer.row.classes]).astype(np.uint8)
    return clear


def _sensor(
    name: str, place: _Place, tile: Tile | Cut, settings: Settings, files: Files, counts: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The five features of one sensor in one tile."""
    sensor = SENSORS[name]
    size = settings.side(name)
    images: list[np.ndarray] = []
    valids: list[np.ndarray] = []
    clears: list[np.ndarray] = []
    measured: list[np.ndarray] = []
    dates: list[int] = []
    for date, layers in sorted(place.images.get(name, {}).items()):
        values = np.full((size, size, len(sensor.bands)), np.nan, np.float32)
        bands = np.zeros(len(sensor.bands), np.uint8)
        for layer in layers:
            part = _read_image(layer, tile, size, files)
            if part is not None and np.isfinite(part).any():
                values[..., list(layer.columns)] = np.moveaxis(part, 0, -1)
                bands[list(layer.columns)] = 1
        valid = np.zeros((size, size), bool)
        if bands.any():
            valid[:] = np.isfinite(values[..., bands == 1]).all(axis=-1)
        if not valid.any():
            counts["dropped"] += bool(layers)
            continue
        masks = place.masks.get((name, date))
        clear = np.ones((size, size), np.uint8) if not masks else _clear(masks, tile, size, files)
        kept = np.where(valid[..., None] & (bands == 1), values, 0)
        images.append((np.rint(kept) if np.dtype(sensor.dtype).kind in "iu" else kept).astype(sensor.dtype))
        valids.append(valid.astype(np.uint8))
        clears.append(clear)
        measured.append(bands)
        dates.append(date)
    counts["tiles"] += bool(dates)
    counts["acquisitions"] += len(dates)
    counts["dates_squared"] += len(dates) ** 2
    counts["pixels"] += len(dates) * size * size
    counts["valid"] += int(sum(valid.sum() for valid in valids))
    counts["clear"] += int(sum((clear & valid).sum() for clear, valid in zip(clears, valids, strict=True)))
    add_dates(counts, dates)

    def stack(arrays: list[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.stack(arrays) if arrays else np.zeros((0, *shape), dtype)

    return {
        f"{name}_image": stack(images, (size, size, len(sensor.bands)), sensor.dtype),
        f"{name}_valid": stack(valids, (size, size), np.uint8),
        f"{name}_clear": stack(clears, (size, size), np.uint8),
        f"{name}_measured": stack(measured, (len(sensor.bands),), np.uint8),
        f"{name}_date": np.array(dates, np.int32),
    }


def _label_map(place: _Place, tile: Tile | Cut, settings: Settings, files: Files) -> np.ndarray:
    """[N, N] uint8, 255 = unlabelled; where label maps overlap the earlier catalog row wins."""
    out = np.full((settings.tile, settings.tile), UNLABELLED, np.uint8)
    for layer in place.label_maps:
        classes = _read_classes(layer, tile, settings.tile, files)
        if classes is not None:
            if classes.max() > UNLABELLED:
                reason = f"label value {classes.max()}: 0..{UNLABELLED - 1} are stored"
                raise BrokenFile(layer.reading.header.path, reason)
            fill = (out == UNLABELLED) & (classes >= 0)
            out[fill] = classes[fill]
    return out


def ingest_place(
    name: str, rows: Sequence[Row], settings: Settings, files: Files, broken: Mapping[Path, str], report: Report
) -> Iterator[Record]:
    """The records of one catalog place, tile by tile; data/records.py describes them.

    Args:
        name: of the place.
        rows: its catalog rows.
        settings: what the build is asked for.
        files: open handles of this process.
        broken: files already known to fail while being read, with the reason.
        report: counts of the build, filled as tiles are read.

    Yields:
        Records, features by name.

    Raises:
        BrokenFile: a new file fails while it is read. Then `report` and what was yielded for this place are void, and
            the caller starts the place again with the file in `broken`.
    """
    report["places"] += 1
    place = _inspect(rows, settings, files, broken, report)
    heads = [
        (sensor, layer.reading.header)
        for sensor, dates in place.images.items()
        for layers in dates.values()
        for layer in layers
    ]
    written = 0
    try:
        if heads:
            for tile in _tiles(name, heads, place, settings, report):
                record = _record(place, tile, settings, files, report)
                if record is None:
                    report["tiles_dropped"] += 1
                else:
                    written += 1
                    yield record
    except BrokenFile:
        raise
    except RasterRefused as error:
        # the place as a whole: its reference raster cannot be located, or absurdly many tiles
        for index, entry in enumerate(report["files"]):
            if entry["place"] == name and entry["status"] == USED:
                report["files"][index] = {key: entry[key] for key in ("row", "place", "sensor", "path")} | {
                    "status": REFUSED,
                    "reason": f"place refused: {error}",
                }
    report["tiles"] += written
    if not written:
        report["places_without_tiles"].append(name)


def _tiles(
    name: str, heads: Sequence[tuple[str, Header]], place: _Place, settings: Settings, report: Report
) -> Iterator[Tile | Cut]:
    if not settings.georeferenced:
        [(sensor, head)] = heads
        return cuts_of(name, head, settings.side(sensor))
    head = reference(heads)
    crs = place_crs(head)
    extents = _drop_unlocated(place, crs, report)
    return tiles_of(name, head, extents, crs, settings) if extents else iter(())


def _record(place: _Place, tile: Tile | Cut, settings: Settings, files: Files, report: Report) -> Record | None:
    """One record, or None where no sensor has a valid pixel."""
    record: dict[str, Any] = {}
    for sensor in settings.sensors:
        record |= _sensor(sensor, place, tile, settings, files, report["sensors"][sensor])
    if not any(len(record[f"{sensor}_date"]) for sensor in settings.sensors):
        return None
    label = np.zeros(max(len(settings.label_classes), 1), np.uint8)
    for name in place.labels:
        label[settings.label_classes.index(name)] = 1
    label_map = _label_map(place, tile, settings, files)
    report["labelled"] += bool(label.any())
    report["mapped"] += bool((label_map != UNLABELLED).any())
    lon, lat = tile.lonlat()
    return record | {
        "place": tile.name,
        "crs": crs_text(tile.crs),
        "lon": np.float64(lon),
        "lat": np.float64(lat),
        "footprint": np.array(tile.bounds, np.float64),
        "label": label,
        "label_map": label_map,
    }
