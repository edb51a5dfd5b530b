"""Decides what a raster's numbers mean and converts them to the sensor's stored unit. Every decision is declared or
refused.

value = raw * scale + offset (catalog first, then the file's own band scales and offsets). Then Sentinel-1 in linear
power becomes 10 log10, in amplitude 20 log10 (<= 0 is invalid; everything is floored at -50 dB, below the noise floor
of the instrument), and Sentinel-2 becomes offset-removed digital numbers, max(DN + offset, 1) where DN > 0, so that a
dark valid pixel is never taken for nodata. Valid-looking pixels outside the sensor's plausible range are invalid; a
file where they are the majority is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio

from skysense_jax.data.ingest.catalog import Row
from skysense_jax.data.ingest.raster import RasterRefused
from skysense_jax.data.ingest.s2_offsets import QUANTIFICATION, known_offset
from skysense_jax.sensors import SENSORS

FLOOR_DB = -50.0
CLEARLY_NEGATIVE = -200.0
"""Reflectance below -0.02 is rare even over dark water: a twentieth of an image down there means a wrong offset."""
LOWEST_S2 = -2000.0
"""Offset-removed numbers below this are no measurement (an undeclared nodata such as -9999); above it, noise around
zero becomes 1.
"""
_UNIT_SPELLINGS = {
    "db": "db",
    "decibel": "db",
    "decibels": "db",
    "linear_power": "linear_power",
    "linear power": "linear_power",
    "power": "linear_power",
    "amplitude": "amplitude",
}


class Conversion(NamedTuple):
    """How raw values become stored ones. scale, offset: per band. clip: saturate into the plausible range (a declared
    stretch) instead of invalidating. source: where the offset (Sentinel-2) or the unit came from; note: what a user
    should know, "" if nothing.
    """

    sensor: str
    unit: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    clip: bool
    source: str
    note: str


def spread(values: Sequence[float], count: int, indexes: Sequence[int], column: str) -> list[float]:
    if len(values) not in (1, count):
        raise RasterRefused(
            f"{column} has {len(values)} numbers for {count} bands; give one, or one per band of the file"
        )
    return [values[0] if len(values) == 1 else values[index - 1] for index in indexes]


def _declared(row: Row, file: rasterio.DatasetReader, indexes: Sequence[int]) -> tuple[list[float], list[float]]:
    scale = spread(row.scale or file.scales, file.count, indexes, "scale")
    offset = spread(row.offset or file.offsets, file.count, indexes, "offset")
    return scale, offset


def _offset_hint(raw: np.ndarray, valid: np.ndarray, bands: Sequence[str]) -> str:
    pick = bands.index("B02") if "B02" in bands else 0
    values = raw[pick][valid[pick] & (raw[pick] > 0)]
    if not values.size:
        return ""
    low = float(np.percentile(values, 1))
    looks = (
        "looks as if +1000 is still in it (offset=-1000)"
        if low >= 1000
        else "looks as if the offset has been removed or never was (offset=0)"
    )
    return f" Hint only: the 1st percentile of {bands[pick]} is {low:.0f}, which {looks}."


def _sentinel2(
    row: Row,
    file: rasterio.DatasetReader,
    root: Path,
    indexes: Sequence[int],
    bands: Sequence[str],
    raw: np.ndarray,
    valid: np.ndarray,
) -> Conversion:
    integer = raw.dtype.kind in "iu"
    unit = row.units or ("dn" if integer else "")
    if not unit:
        raise RasterRefused(
            "floating-point Sentinel-2 without declared units: say dn or reflectance in the catalog's units column"
        )
    note = "" if row.units else "units not declared, integers taken as dn"
    scale, file_offset = _declared(row._replace(offset=()), file, indexes)
    scaled = any(value != 1 for value in scale)
    if unit == "dn" and scaled and not row.scale:
        raise RasterRefused(
            f"the file's own band scale is {scale[0]:g}, the units are dn: declare units=reflectance, or scale=1 and "
            f"the offset in dn"
        )
    if unit == "reflectance" and not scaled and integer:
        raise RasterRefused(
            "integers declared as reflectance without a scale: give scale and offset (0.0001 and -0.1 or 0), or "
            "units=dn and the offset"
        )
    if row.offset:
        return Conversion(
            "s2", unit, tuple(scale), tuple(spread(row.offset, file.count, indexes, "offset")), False, "catalog", note
        )
    if any(value != 0 for value in file_offset) and not row.scale:
        return Conversion("s2", unit, tuple(scale), tuple(file_offset), False, "file band offset", note)
    if unit == "reflectance" and not scaled:
        return Conversion("s2", unit, tuple(scale), tuple(0.0 for _ in scale), False, "declared as reflectance", note)
    found = known_offset(file, row.path, root, bands, indexes)
    if found is None:
        raise RasterRefused(
            "the Sentinel-2 offset is not known: neither the catalog (column offset: -1000, or 0 where it was "
            "removed) nor the file's tags nor a "
            f"MTD_MSIL*.xml gives it, and the date does not decide it.{_offset_hint(raw, valid, bands)}"
        )
    offset = [value * factor for value, factor in zip(found[0], scale)]
    return Conversion("s2", unit, tuple(scale), tuple(offset), False, found[1], note)


def _sentinel1(
    row: Row, file: rasterio.DatasetReader, indexes: Sequence[int], raw: np.ndarray, valid: np.ndarray
) -> Conversion:
    scale, offset = _declared(row, file, indexes)
    values = (raw * np.array(scale)[:, None] + np.array(offset)[:, None])[valid]
    middle, high = float(np.median(values)), float(np.percentile(values, 99))
    tags = {key.lower(): text for key, text in file.tags().items()}
    stated = [file.units[index - 1] for index in indexes] + [tags.get("units"), tags.get("unit")]
    stated = {
        _UNIT_SPELLINGS[text.strip().lower()] for text in stated if text and text.strip().lower() in _UNIT_SPELLINGS
    }
    low, top = SENSORS["s1"].plausible
    if row.units:
        unit, source, note = row.units, "catalog", ""
    elif len(stated) == 1:
        unit, source, note = stated.pop(), "file tags", ""
    elif low <= middle < 0 and high <= top:
        unit, source, note = "db", "looks like dB", "units not declared, accepted as dB"
    else:
        looks = (
            "like linear power"
            if values.min() >= 0 and high < 5
            else "like uncalibrated numbers"
            if high > 255
            else "like no known unit"
        )
        raise RasterRefused(
            f"Sentinel-1 units are not declared and the values do not look like dB (median {middle:.4g}, 99th "
            f"percentile {high:.4g}: "
            f"{looks}); put db, linear_power or amplitude into the catalog's units column (and scale, offset if needed)"
        )
    if unit == "db" and np.mean(values > 0) > 0.95:
        raise RasterRefused(
            f"declared as dB, but the values are positive (median {middle:.4g}): looks like linear power, amplitude "
            f"or unscaled numbers"
        )
    if unit != "db" and middle < 0:
        raise RasterRefused(f"declared as {unit}, but the values are negative (median {middle:.4g}): looks like dB")
    return Conversion("s1", unit, tuple(scale), tuple(offset), False, source, note)


def decide(
    row: Row,
    file: rasterio.DatasetReader,
    root: Path,
    indexes: Sequence[int],
    bands: Sequence[str],
    raw: np.ndarray,
    valid: np.ndarray,
) -> Conversion:
    """How this file's numbers are converted, from the catalog row, the file and a sample [n, k] of its values. Raises
    RasterRefused.
    """
    sensor = SENSORS[row.sensor]
    if row.sensor == "s2":
        conversion = _sentinel2(row, file, root, indexes, bands, raw, valid)
    elif row.sensor == "s1":
        conversion = _sentinel1(row, file, indexes, raw, valid)
    else:
        scale, offset = _declared(row, file, indexes)
        stretched = sensor.unit == "dn" and (scale, offset) != ([1.0] * len(scale), [0.0] * len(offset))
        conversion = Conversion(row.sensor, row.units or sensor.unit, tuple(scale), tuple(offset), stretched, "", "")
    with_data, stored = int(valid.sum()), convert(raw, valid, conversion)
    kept = int(np.isfinite(stored).sum())
    if kept * 2 < with_data:
        values = raw[valid]
        raise RasterRefused(
            f"{100 - 100 * kept / with_data:.0f} % of the values are not plausible for {row.sensor} as "
            f"{conversion.unit} (raw {values.min():.4g} .. "
            f"{values.max():.4g}, expected {sensor.plausible[0]:g} .. {sensor.plausible[1]:g} {sensor.unit} after "
            f"scale and offset): check units, scale and "
            "offset, and nodata" + ("; 16-bit imagery needs a declared scale to 0..255" if row.sensor == "hr" else "")
        )
    return _offset_fits(conversion, raw, stored) if row.sensor == "s2" else conversion


def _offset_fits(conversion: Conversion, raw: np.ndarray, stored: np.ndarray) -> Conversion:
    """Refuses an offset that makes real pixels clearly negative; notes values that look as if it were still in them."""
    values = (raw * np.array(conversion.scale)[:, None] + np.array(conversion.offset)[:, None])[np.isfinite(stored)]
    values = values * (QUANTIFICATION if conversion.unit == "reflectance" else 1.0)
    negative = float(np.mean(values < CLEARLY_NEGATIVE))
    if negative > 0.05:
        raise RasterRefused(
            f"the offset {min(conversion.offset):g} ({conversion.source}) leaves {100 * negative:.0f} % of the "
            f"values clearly "
            f"below zero (under {CLEARLY_NEGATIVE:g}): it looks already removed"
        )
    if len(raw) >= 3 and np.percentile(values, 0.1) >= 1000:
        note = "no value below 1000 in any band: check that the offset is really removed"
        return conversion._replace(note="; ".join(part for part in (conversion.note, note) if part))
    return conversion


def convert(raw: np.ndarray, valid: np.ndarray, conversion: Conversion) -> np.ndarray:
    """Stored-unit values, float32, NaN where invalid, of raw values [n, ...] with validity of the same shape."""
    sensor = SENSORS[conversion.sensor]
    wide = np.float64 if raw.dtype.itemsize >= 8 or (raw.dtype.kind in "iu" and raw.dtype.itemsize >= 4) else np.float32
    shape = (-1,) + (1,) * (raw.ndim - 1)
    if conversion.sensor == "s2" and conversion.unit == "dn":
        valid = valid & (raw > 0)
    value = raw.astype(wide)
    if any(factor != 1 for factor in conversion.scale):
        value = value * np.array(conversion.scale).reshape(shape)
    if any(term != 0 for term in conversion.offset):
        value = value + np.array(conversion.offset, np.float64).reshape(shape)
    if conversion.unit == "reflectance":
        value = value * QUANTIFICATION
    if conversion.unit in ("linear_power", "amplitude"):
        valid = valid & (value > 0)
        value = (10.0 if conversion.unit == "linear_power" else 20.0) * np.log10(np.where(valid, value, 1.0))
        value = np.maximum(value, FLOOR_DB)
    low, high = sensor.plausible
    if conversion.clip:
        value = np.clip(value, low, high)
    elif conversion.sensor == "s2":
        valid = valid & (value > LOWEST_S2)
        value = np.maximum(value, 1.0)
    valid = valid & (value >= low) & (value <= high)
    if sensor.unit == "db":
        value = np.maximum(value, FLOOR_DB)
    return np.where(valid, value, np.nan).astype(np.float32)


def describe(conversion: Conversion) -> dict[str, Any]:
    """The decision as it is written into the report of a file."""
    facts: dict[str, Any] = {"units": conversion.unit}
    if any(value != 1 for value in conversion.scale):
        facts["scale"] = sorted(set(conversion.scale))
    if conversion.sensor == "s2":
        facts |= {"offset_applied": sorted(set(conversion.offset)), "offset_source": conversion.source}
    elif conversion.source:
        facts["units_source"] = conversion.source
    if conversion.note:
        facts["note"] = conversion.note
    return facts
