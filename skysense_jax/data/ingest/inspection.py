"""Inspects the file of a catalog row and says how to read it: bands, nodata, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from rasterio.enums import ColorInterp

from skysense_jax.data.ingest.catalog import SKIPPED_BAND, Row
from skysense_jax.data.ingest.raster import Files, Header, RasterRefused, Reading, header, sample
from skysense_jax.data.ingest.settings import Settings
from skysense_jax.data.ingest.units import Conversion, Source, decide, describe, spread
from skysense_jax.data.records import SYNTHETIC_TAG
from skysense_jax.sensors import SENSORS, UNLABELLED, band_name

COLOURS = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
"""Colour interpretations, in the order of a row's `colour_bands`."""

_NOT_COLOURS = "bands that are not red, green or blue were skipped"


class Layer(NamedTuple):
    """A usable file.

    columns: place of each read band in the sensor's table row. conversion: None for masks and label maps. facts: what
    was decided, for the report.
    """

    row: Row
    reading: Reading
    columns: tuple[int, ...]
    conversion: Conversion | None
    facts: dict[str, Any]


def path_of(row: Row) -> Path:
    """The raster of a catalog row.

    Raises:
        RasterRefused: the row has none, as a row of labels.
    """
    if row.path is None:
        raise RasterRefused("no raster: the row has no path")
    return row.path


def _described(file: rasterio.DatasetReader, sensor: str) -> list[str | None]:
    """Canonical band name of each band's description, None where it has none that the table knows."""
    names: list[str | None] = []
    for text in file.descriptions:
        try:
            names.append(band_name(sensor, text) if text else None)
        except ValueError:
            names.append(None)
    return names


def band_order(
    file: rasterio.DatasetReader, sensor: str, stated: Sequence[str], alpha: int
) -> tuple[dict[str, int], str]:
    """Which band of a file is which: from the catalog, else the descriptions, else the colours; never by position.

    Args:
        file: the open raster.
        sensor: name of a row of the table.
        stated: the catalog's bands in file order, empty where it has none.
        alpha: 1-based index of the file's transparency, 0 = none.

    Returns:
        (canonical name of each band to read -> its 1-based index, in file order; a note for the report, "" if none).

    Raises:
        RasterRefused: a wrong count, a contradiction between catalog and descriptions, a band twice, or an order that
            nobody states.
    """
    described = _described(file, sensor)
    if stated:
        return _as_stated(file, sensor, stated, described, alpha)
    row = SENSORS[sensor]
    by_colour = dict(zip(COLOURS, row.colour_bands, strict=True)) if row.colour_bands else {}
    data = [index for index in range(1, file.count + 1) if index != alpha]
    named = [(index, name) for index in data if (name := described[index - 1])]
    note = ""
    if named and len(named) == len(data):
        pairs = named
    elif named and by_colour and {name for _, name in named} == set(row.bands):
        pairs, note = named, _NOT_COLOURS
    elif by_colour and set(by_colour) <= set(file.colorinterp):
        colours = file.colorinterp
        pairs = [(index, by_colour[colours[index - 1]]) for index in data if colours[index - 1] in by_colour]
        note = "" if len(pairs) == len(data) else _NOT_COLOURS
    elif len(row.bands) == 1 and len(data) == 1:
        pairs = [(data[0], row.bands[0])]
    else:
        raise RasterRefused(
            f"has {file.count} bands whose order nobody states: band descriptions {list(file.descriptions)} do not "
            f"name them; give the catalog's bands column in file order (known: {', '.join(row.bands)})"
        )
    names = [name for _, name in pairs]
    if len(set(names)) != len(names):
        raise RasterRefused(
            f"its band descriptions name a band twice: {','.join(names)}; give the catalog's bands column"
        )
    return {name: index for index, name in pairs}, note


def _as_stated(
    file: rasterio.DatasetReader, sensor: str, stated: Sequence[str], described: Sequence[str | None], alpha: int
) -> tuple[dict[str, int], str]:
    """The catalog's band order, where the file does not contradict it."""
    if len(stated) not in (file.count, file.count - (1 if alpha else 0)):
        raise RasterRefused(
            f"has {file.count} bands, the catalog names {len(stated)} ({','.join(stated)}); name every band of the "
            f"file in its order, {SKIPPED_BAND!r} for one to skip"
        )
    bands = {name: index for index, name in enumerate(stated, 1) if name != SKIPPED_BAND}
    if any(described[index - 1] not in (None, name) for name, index in bands.items()):
        raise RasterRefused(
            f"the catalog's band order {','.join(stated)} contradicts the file's band descriptions "
            f"{','.join(text or '?' for text in file.descriptions)}"
        )
    colour_bands = SENSORS[sensor].colour_bands
    by_colour = dict(zip(COLOURS, colour_bands, strict=True)) if colour_bands else {}
    against = any(by_colour.get(file.colorinterp[index - 1]) not in (None, name) for name, index in bands.items())
    note = "the catalog's band order is used; the file's colour interpretation says otherwise" if against else ""
    return bands, note


def _coarse(head: Header, step: float, max_upsample: float) -> None:
    """Refuses pixels that are far larger than those of the grid, `step` metres."""
    size = head.step * (111_320.0 if head.crs.is_geographic else head.crs.linear_units_factor[1])
    if size > step * max_upsample:
        raise RasterRefused(
            f"pixels of about {size:.4g} m would be spread over a grid of {step:.4g} m: more than {max_upsample:g} "
            "times too coarse (--max-upsample)"
        )


def _real_alpha(files: Files, reading: Reading) -> None:
    """Refuses a band that is tagged as alpha but looks measured.

    GDAL tags the fourth band of many 4-band aerial images.
    """
    values, _ = sample(files, Reading(reading.header, (reading.alpha,), (None,), False, 0))
    top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else values.max()
    between = float(np.mean((values != 0) & (values != top) & (values != 1)))
    if between > 0.1:
        raise RasterRefused(
            f"band {reading.alpha} is tagged as alpha but holds measurements ({100 * between:.0f} % of it is neither "
            "transparent nor opaque), so the tags of the other bands are not believed either: give the catalog's "
            f"bands column in file order ({SKIPPED_BAND!r} skips one)"
        )


def inspect_image(row: Row, files: Files, settings: Settings) -> Layer:
    """Opens, checks and samples the raster of an image row.

    Args:
        row: the catalog row.
        files: open handles of this process.
        settings: what the build is asked for.

    Returns:
        How the file is read and converted.

    Raises:
        RasterRefused: the file cannot be used; the message is the reason.
    """
    sensor, path = SENSORS[row.sensor], path_of(row)
    file = files.get(path)
    head = header(file, path, bool(row.nodata) or row.drop_nodata, settings.max_pixels, settings.georeferenced)
    if settings.georeferenced:
        # Heights are smooth: they may be much coarser than the fine grid they are stored on.
        _coarse(head, settings.gsd if sensor.heights else settings.step(row.sensor), settings.max_upsample)
    bands, note = band_order(file, row.sensor, row.bands, head.alpha)
    if head.crs is not None and not settings.georeferenced:
        note = "; ".join(part for part in (note, "it has a CRS, which is not used") if part)
    indexes = tuple(bands.values())
    nodata: Sequence[float | None]
    if row.nodata:
        nodata = spread(row.nodata, file.count, indexes, "nodata")
    else:
        nodata = [None if row.drop_nodata else head.nodata[index - 1] for index in indexes]
    reading = Reading(
        header=head,
        indexes=indexes,
        nodata=tuple(nodata),
        # In 8-bit imagery 0 and 255 are also real values of one channel: only a pixel that has them in all channels is
        # nodata, as in GDAL.
        together=sensor.eight_bit,
        alpha=head.alpha if head.alpha not in indexes and not (row.bands and len(row.bands) == file.count) else 0,
        customary=sensor.nodata,
    )
    if reading.alpha:
        _real_alpha(files, reading)
    raw, valid = sample(files, reading)
    conversion = decide(Source(row, file, path, settings.root, bands), raw, valid)
    facts = {"bands": list(bands)} | describe(conversion)
    if note:
        facts["note"] = "; ".join(part for part in (facts.get("note"), note) if part)
    if file.tags().get(SYNTHETIC_TAG):
        facts["synthetic"] = True
    return Layer(row, reading, tuple(sensor.bands.index(name) for name in bands), conversion, facts)


def inspect_classes(row: Row, files: Files, max_pixels: int) -> Layer:
    """Opens and checks the raster of a mask or label_map row.

    Args:
        row: the catalog row; its `bands` name the band of classes where the file has several.
        files: open handles of this process.
        max_pixels: limit of width * height * bands.

    Returns:
        How the file's one integer band is read.

    Raises:
        RasterRefused: the file cannot be used; the message is the reason.
    """
    path = path_of(row)
    file = files.get(path)
    head = header(file, path, bool(row.nodata) or row.drop_nodata, max_pixels)
    if head.dtype.kind not in "iu":
        raise RasterRefused(f"pixels of type {head.dtype}: a {row.kind} holds integer classes")
    if head.bands != max(1, len(row.bands)):
        raise RasterRefused(
            f"{head.bands} bands: a {row.kind} has one, or the catalog's bands column says which it is, for example "
            f"{','.join(['class', *SKIPPED_BAND * (head.bands - 1)])}"
        )
    index = next((index for index, name in enumerate(row.bands, 1) if name != SKIPPED_BAND), 1)
    nodata = row.nodata[0] if row.nodata else None if row.drop_nodata else head.nodata[index - 1]
    reading = Reading(header=head, indexes=(index,), nodata=(nodata,), together=False, alpha=0)
    if row.kind == "label_map":
        raw, valid = sample(files, reading)
        values = raw[valid]
        if values.min() < 0 or values.max() > UNLABELLED:
            raise RasterRefused(
                f"label values {values.min()} .. {values.max()}: 0..{UNLABELLED - 1} are stored ({UNLABELLED} = "
                "unlabelled); declare nodata"
            )
    return Layer(row, reading, (0,), None, {})


def duplicate_bands(layers: Sequence[Layer], new: Layer) -> list[str]:
    """Bands that an acquisition has already.

    Args:
        layers: files of the acquisition so far.
        new: another file of it.

    Returns:
        Names of those bands of `new` that an earlier layer gives.
    """
    bands = SENSORS[new.row.sensor].bands
    taken = {column for layer in layers for column in layer.columns}
    return [bands[column] for column in new.columns if column in taken]


def to_labels(raw: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Classes of a mask or label map.

    Args:
        raw: integers [1, h, w].
        valid: bool of the same shape.

    Returns:
        int32 [1, h, w], -1 where invalid.
    """
    return np.where(valid, raw.astype(np.int64), -1).astype(np.int32)
