"""Inspects one catalog row's file and says how to read it: which band is which, what is nodata, what the numbers
mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from rasterio.enums import ColorInterp

from skysense_jax.data.ingest.catalog import SKIPPED_BAND, Row
from skysense_jax.data.ingest.raster import Files, Header, RasterRefused, Reading, header, sample
from skysense_jax.data.ingest.units import Conversion, decide, describe, spread
from skysense_jax.data.records import SYNTHETIC_TAG
from skysense_jax.sensors import SENSORS, UNLABELLED, band_name

_COLOURS = {ColorInterp.red: "R", ColorInterp.green: "G", ColorInterp.blue: "B"}


class Layer(NamedTuple):
    """A usable file. columns: place of each read band in the sensor's table row. conversion: None for masks and label
    maps. facts: what was decided, for the report.
    """

    row: Row
    reading: Reading
    columns: tuple[int, ...]
    conversion: Conversion | None
    facts: dict[str, Any]


def _described(file: rasterio.DatasetReader, sensor: str) -> list[str | None]:
    """Canonical band name of each band's description, None where it has none that the table knows."""
    names: list[str | None] = []
    for text in file.descriptions:
        try:
            names.append(band_name(sensor, text) if text else None)
        except ValueError:
            names.append(None)
    return names


def band_order(file: rasterio.DatasetReader, row: Row, alpha: int) -> tuple[list[int], list[str], str]:
    """(1-based indexes to read, their canonical names, note). From the catalog, else the descriptions, else the
    colours; never by position.

    Raises RasterRefused for a wrong count, a contradiction between catalog and descriptions, or an order nobody
    states.
    """
    sensor = SENSORS[row.sensor]
    described = _described(file, row.sensor)
    if row.bands:
        if len(row.bands) not in (file.count, file.count - (1 if alpha else 0)):
            raise RasterRefused(
                f"has {file.count} bands, the catalog names {len(row.bands)} ({','.join(row.bands)}); name every "
                f"band of the file in its "
                f"order, {SKIPPED_BAND!r} for one to skip"
            )
        pairs = [(index, name) for index, name in enumerate(row.bands, 1) if name != SKIPPED_BAND]
        wrong = [(index, name) for index, name in pairs if described[index - 1] not in (None, name)]
        if wrong:
            raise RasterRefused(
                f"the catalog's band order {','.join(row.bands)} contradicts the file's band descriptions "
                f"{','.join(text or '?' for text in file.descriptions)}"
            )
        colours = [_COLOURS.get(file.colorinterp[index - 1]) for index, _ in pairs] if row.sensor == "hr" else []
        against = any(colour not in (None, name) for colour, (_, name) in zip(colours, pairs))
        note = "the catalog's band order is used; the file's colour interpretation says otherwise" if against else ""
        return [index for index, _ in pairs], [name for _, name in pairs], note
    data = [index for index in range(1, file.count + 1) if index != alpha]
    named = [(index, described[index - 1]) for index in data if described[index - 1]]
    if named and len(named) == len(data):
        names, note = [name for _, name in named], ""
    elif named and row.sensor == "hr" and {name for _, name in named} == set(sensor.bands):
        names, note = [name for _, name in named], "bands that are not red, green or blue were skipped"
    elif row.sensor == "hr" and {"R", "G", "B"} <= {_COLOURS.get(colour) for colour in file.colorinterp}:
        named = [
            (index, _COLOURS[file.colorinterp[index - 1]]) for index in data if file.colorinterp[index - 1] in _COLOURS
        ]
        names, note = (
            [name for _, name in named],
            "" if len(named) == len(data) else "bands that are not red, green or blue were skipped",
        )
    elif len(sensor.bands) == 1 and len(data) == 1:
        named, names, note = [(data[0], sensor.bands[0])], [sensor.bands[0]], ""
    else:
        raise RasterRefused(
            f"has {file.count} bands whose order nobody states: band descriptions {list(file.descriptions)} do not "
            f"name them; give the "
            f"catalog's bands column in file order (known: {', '.join(sensor.bands)})"
        )
    if len(set(names)) != len(names):
        raise RasterRefused(
            f"its band descriptions name a band twice: {','.join(names)}; give the catalog's bands column"
        )
    return [index for index, _ in named], names, note


def _coarse(head: Header, step: float, max_upsample: float) -> None:
    size = head.step * (111_320.0 if head.crs.is_geographic else head.crs.linear_units_factor[1])
    if size > step * max_upsample:
        raise RasterRefused(
            f"pixels of about {size:.4g} m would be spread over a grid of {step:.4g} m: more than {max_upsample:g} "
            f"times too coarse "
            "(--max-upsample)"
        )


def _real_alpha(files: Files, reading: Reading) -> None:
    """Refuses a band that is tagged as alpha but looks measured: GDAL tags the fourth band of many 4-band aerial "
    "images.
    """
    values, _ = sample(files, Reading(reading.header, (reading.alpha,), (None,), False, 0))
    top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else values.max()
    between = float(np.mean((values != 0) & (values != top) & (values != 1)))
    if between > 0.1:
        raise RasterRefused(
            f"band {reading.alpha} is tagged as alpha but holds measurements ({100 * between:.0f} % of it is neither "
            f"transparent nor opaque), so the tags of the other bands are not believed either: give the catalog's "
            f"bands "
            f"column in file order ({SKIPPED_BAND!r} skips one)"
        )


def inspect_image(
    row: Row,
    files: Files,
    root: Path,
    gsd: float,
    ratio: int,
    max_pixels: int,
    max_upsample: float,
    georeferenced: bool = True,
) -> Layer:
    """Opens, checks and samples the raster of an image row. Raises RasterRefused."""
    sensor = SENSORS[row.sensor]
    file = files.get(row.path)
    head = header(file, row.path, bool(row.nodata) or row.drop_nodata, max_pixels, georeferenced)
    if georeferenced:
        # Elevation is smooth: it may be much coarser than the HR grid it is stored on.
        _coarse(head, gsd / ratio if sensor.grid == "hr" and row.sensor != "dsm" else gsd, max_upsample)
    indexes, names, note = band_order(file, row, head.alpha)
    if head.crs is not None and not georeferenced:
        note = "; ".join(part for part in (note, "it has a CRS, which is not used") if part)
    given = spread(row.nodata, file.count, indexes, "nodata") if row.nodata else None
    own = [None if row.drop_nodata else head.nodata[index - 1] for index in indexes]
    reading = Reading(
        header=head,
        indexes=tuple(indexes),
        nodata=tuple(given or own),
        # In 8-bit imagery 0 and 255 are also real values of one channel: only a pixel that has them in all channels is
        # nodata, as in GDAL.
        together=row.sensor == "hr",
        alpha=head.alpha if head.alpha not in indexes and not (row.bands and len(row.bands) == file.count) else 0,
        customary=sensor.nodata,
    )
    if reading.alpha:
        _real_alpha(files, reading)
    raw, valid = sample(files, reading)
    conversion = decide(row, file, root, indexes, names, raw, valid)
    facts = {"bands": names} | describe(conversion)
    if note:
        facts["note"] = "; ".join(part for part in (facts.get("note"), note) if part)
    if file.tags().get(SYNTHETIC_TAG):
        facts["synthetic"] = True
    return Layer(row, reading, tuple(sensor.bands.index(name) for name in names), conversion, facts)


def inspect_classes(row: Row, files: Files, max_pixels: int) -> Layer:
    """Opens and checks the raster of a mask or label_map row: one integer band, the one that `bands` names where the
    file has several. Raises RasterRefused.
    """
    file = files.get(row.path)
    head = header(file, row.path, bool(row.nodata) or row.drop_nodata, max_pixels)
    if head.dtype.kind not in "iu":
        raise RasterRefused(f"pixels of type {head.dtype}: a {row.kind} holds integer classes")
    if head.count != max(1, len(row.bands)):
        raise RasterRefused(
            f"{head.count} bands: a {row.kind} has one, or the catalog's bands column says which it is, for example "
            f"{','.join(['class', *SKIPPED_BAND * (head.count - 1)])}"
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
                f"unlabelled); declare nodata"
            )
    return Layer(row, reading, (0,), None, {})


def duplicate_bands(layers: list[Layer], new: Layer) -> list[str]:
    """Band names of `new` that an earlier layer of the same acquisition already gives."""
    bands = SENSORS[new.row.sensor].bands
    taken = {column for layer in layers for column in layer.columns}
    return [bands[column] for column in new.columns if column in taken]


def to_labels(raw: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[1, h, w] int32 classes, -1 where invalid."""
    return np.where(valid, raw.astype(np.int64), -1).astype(np.int32)
