"""Decides what a raster's numbers mean and converts them to the sensor's stored unit.

Every decision is declared or refused. value = raw * scale + offset (catalog first, then the file's own band scales and
offsets); then the conversion of the declared unit, as the sensor's row says (:class:`skysense_jax.sensor_row.Unit`):
Sentinel-1 in linear power becomes 10 log10, in amplitude 20 log10 (<= 0 is invalid), and everything is floored at the
row's `floor`. Digital numbers with an additive offset (Sentinel-2) become offset-removed ones, max(DN + offset, 1)
where DN > 0, so that a dark valid pixel is never taken for nodata. Valid-looking pixels outside the sensor's plausible
range are invalid; a file where they are the majority is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio

from skysense_jax.data.ingest.catalog import Row
from skysense_jax.data.ingest.raster import RasterRefused
from skysense_jax.data.ingest.s2_offsets import known_offset
from skysense_jax.sensors import SENSORS, Offset, Sensor

_UNIT_SPELLINGS = {
    "db": "db",
    "decibel": "db",
    "decibels": "db",
    "linear_power": "linear_power",
    "linear power": "linear_power",
    "power": "linear_power",
    "amplitude": "amplitude",
}


class Source(NamedTuple):
    """A raster whose numbers are to be converted.

    root: the catalog's folder. bands: name of each band to read -> its 1-based index in the file.
    """

    row: Row
    file: rasterio.DatasetReader
    path: Path
    root: Path
    bands: dict[str, int]

    @property
    def sensor(self) -> Sensor:
        """The row of the table."""
        return SENSORS[self.row.sensor]


class Conversion(NamedTuple):
    """How raw values become stored ones.

    scale, offset: per band. clip: saturate into the plausible range (a declared stretch) instead of invalidating.
    source: where the offset or the unit came from. note: what a user should know, "" if nothing.
    """

    sensor: str
    unit: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    clip: bool
    source: str
    note: str


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: "a", "a or b", "a, b or c"."""
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def spread(values: Sequence[float], count: int, indexes: Sequence[int], column: str) -> list[float]:
    """The number of each band that is read, from one number for all or one per band of the file.

    Args:
        values: one number, or `count` of them.
        count: bands of the file.
        indexes: 1-based bands to read.
        column: name of the catalog's column, for the message.

    Returns:
        One number per entry of `indexes`.

    Raises:
        RasterRefused: another number of values.
    """
    if len(values) not in (1, count):
        raise RasterRefused(
            f"{column} has {len(values)} numbers for {count} bands; give one, or one per band of the file"
        )
    return [values[0] if len(values) == 1 else values[index - 1] for index in indexes]


def _declared(source: Source) -> tuple[list[float], list[float]]:
    """(scale, offset) per band: the catalog's, else the file's own."""
    return _scale(source), _spread(source, source.row.offset or source.file.offsets, "offset")


def _scale(source: Source) -> list[float]:
    return _spread(source, source.row.scale or source.file.scales, "scale")


def _spread(source: Source, values: Sequence[float], column: str) -> list[float]:
    return spread(values, source.file.count, tuple(source.bands.values()), column)


def _offset_hint(rule: Offset, source: Source, raw: np.ndarray, valid: np.ndarray) -> str:
    bands = list(source.bands)
    pick = bands.index(rule.hint_band) if rule.hint_band in bands else 0
    values = raw[pick][valid[pick] & (raw[pick] > 0)]
    if not values.size:
        return ""
    low = float(np.percentile(values, 1))
    looks = (
        f"looks as if {-rule.usual:+g} is still in it (offset={rule.usual:g})"
        if low >= -rule.usual
        else "looks as if the offset has been removed or never was (offset=0)"
    )
    return f" Hint only: the 1st percentile of {bands[pick]} is {low:.0f}, which {looks}."


def _with_offset(rule: Offset, source: Source, raw: np.ndarray, valid: np.ndarray) -> Conversion:
    """Digital numbers, or reflectance made from them, whose additive offset must be known."""
    row, file, sensor = source.row, source.file, source.sensor
    integer = raw.dtype.kind in "iu"
    unit = row.units or (sensor.unit if integer else "")
    if not unit:
        raise RasterRefused(
            f"floating-point {sensor.title} without declared units: say {listed(sensor.units_accepted)} in the "
            "catalog's units column"
        )
    note = "" if row.units else f"units not declared, integers taken as {sensor.unit}"
    scale, file_offset = _scale(source), _spread(source, file.offsets, "offset")
    scaled = any(value != 1 for value in scale)
    as_numbers = unit == sensor.unit
    if as_numbers and scaled and not row.scale:
        others = [name for name in sensor.units_accepted if name != unit]
        raise RasterRefused(
            f"the file's own band scale is {scale[0]:g}, the units are {unit}: declare "
            + (f"units={listed(others)}, or " if others else "")
            + f"scale=1 and the offset in {unit}"
        )
    if not as_numbers and not scaled and integer:
        raise RasterRefused(
            f"integers declared as {unit} without a scale: give scale and offset "
            f"({1 / sensor.units[unit].factor:g} and {rule.usual / sensor.units[unit].factor:g} or 0), or "
            f"units={sensor.unit} and the offset"
        )
    if row.offset:
        offset, origin = _spread(source, row.offset, "offset"), "catalog"
    elif any(value != 0 for value in file_offset) and not row.scale:
        offset, origin = file_offset, "file band offset"
    elif not as_numbers and not scaled:
        offset, origin = [0.0] * len(scale), f"declared as {unit}"
    else:
        stated = known_offset(sensor, file, source.path, source.root, source.bands)
        if stated is None:
            product = f" nor a {rule.product}" if rule.product else ""
            raise RasterRefused(
                f"the {sensor.title} offset is not known: neither the catalog (column offset: {rule.usual:g}, or 0 "
                f"where it was removed) nor the file's tags{product} gives it, and the date does not decide it."
                f"{_offset_hint(rule, source, raw, valid)}"
            )
        offset, origin = [value * factor for value, factor in zip(stated[0], scale, strict=True)], stated[1]
    return Conversion(sensor.name, unit, tuple(scale), tuple(offset), False, origin, note)


def _decibels(source: Source, raw: np.ndarray, valid: np.ndarray) -> Conversion:
    """Backscatter in decibels, or in a unit that becomes decibels: declared, stated by tags, or clearly decibels."""
    file, sensor = source.file, source.sensor
    scale, offset = _declared(source)
    values = (raw * np.array(scale)[:, None] + np.array(offset)[:, None])[valid]
    middle, high = float(np.median(values)), float(np.percentile(values, 99))
    tags = {key.lower(): text for key, text in file.tags().items()}
    texts = [*(file.units[index - 1] for index in source.bands.values()), tags.get("units"), tags.get("unit")]
    spellings = [text.strip().lower() for text in texts if text]
    stated = {_UNIT_SPELLINGS[text] for text in spellings if text in _UNIT_SPELLINGS}
    low, top = sensor.plausible
    if source.row.units:
        unit, origin, note = source.row.units, "catalog", ""
    elif len(stated) == 1:
        unit, origin, note = stated.pop(), "file tags", ""
    elif low <= middle < 0 and high <= top:
        unit, origin, note = "db", "looks like dB", "units not declared, accepted as dB"
    else:
        looks = "like no known unit"
        if values.min() >= 0 and high < 5:
            looks = "like linear power"
        elif high > 255:
            looks = "like uncalibrated numbers"
        raise RasterRefused(
            f"{sensor.title} units are not declared and the values do not look like dB (median {middle:.4g}, 99th "
            f"percentile {high:.4g}: {looks}); put {listed(sensor.units_accepted)} into the catalog's units column "
            "(and scale, offset if needed)"
        )
    if unit == "db" and np.mean(values > 0) > 0.95:
        raise RasterRefused(
            f"declared as dB, but the values are positive (median {middle:.4g}): looks like linear power, amplitude "
            "or unscaled numbers"
        )
    if unit != "db" and middle < 0:
        raise RasterRefused(f"declared as {unit}, but the values are negative (median {middle:.4g}): looks like dB")
    return Conversion(sensor.name, unit, tuple(scale), tuple(offset), False, origin, note)


def _plain(source: Source) -> Conversion:
    """Numbers in the declared unit, the stored one where the sensor accepts no other; a scale of dn is a stretch."""
    sensor = source.sensor
    if not source.row.units and len(sensor.units) > 1:
        raise RasterRefused(
            f"{sensor.title} without declared units: say {listed(sensor.units_accepted)} in the catalog's units column"
        )
    scale, offset = _declared(source)
    unit = source.row.units or sensor.unit
    stretched = unit == sensor.unit == "dn" and (scale, offset) != ([1.0] * len(scale), [0.0] * len(offset))
    return Conversion(sensor.name, unit, tuple(scale), tuple(offset), stretched, "", "")


def decide(source: Source, raw: np.ndarray, valid: np.ndarray) -> Conversion:
    """How a file's numbers are converted, from the catalog row, the file and a sample of its values.

    Args:
        source: the raster with its catalog row.
        raw: sample [n, k] of raw values, n = bands that are read.
        valid: bool [n, k], whether a value is no nodata.

    Returns:
        The conversion, with where it comes from.

    Raises:
        RasterRefused: nobody states the unit or the offset, or the values contradict what is stated.
    """
    sensor = source.sensor
    if sensor.offset is not None:
        conversion = _with_offset(sensor.offset, source, raw, valid)
    elif sensor.unit == "db":
        conversion = _decibels(source, raw, valid)
    else:
        conversion = _plain(source)
    with_data, stored = int(valid.sum()), convert(raw, valid, conversion)
    kept = int(np.isfinite(stored).sum())
    if kept * 2 < with_data:
        values = raw[valid]
        raise RasterRefused(
            f"{100 - 100 * kept / with_data:.0f} % of the values are not plausible for {sensor.name} as "
            f"{conversion.unit} (raw {values.min():.4g} .. {values.max():.4g}, expected {sensor.plausible[0]:g} .. "
            f"{sensor.plausible[1]:g} {sensor.unit} after scale and offset): check units, scale and offset, and nodata"
            + ("; 16-bit imagery needs a declared scale to 0..255" if sensor.eight_bit else "")
        )
    return conversion if sensor.offset is None else _offset_fits(sensor.offset, conversion, raw, stored)


def _offset_fits(rule: Offset, conversion: Conversion, raw: np.ndarray, stored: np.ndarray) -> Conversion:
    """Refuses an offset that makes real pixels clearly negative; notes values that look as if it were still in them."""
    values = (raw * np.array(conversion.scale)[:, None] + np.array(conversion.offset)[:, None])[np.isfinite(stored)]
    values = values * SENSORS[conversion.sensor].units[conversion.unit].factor
    negative = float(np.mean(values < rule.clearly_negative))
    if negative > 0.05:
        raise RasterRefused(
            f"the offset {min(conversion.offset):g} ({conversion.source}) leaves {100 * negative:.0f} % of the "
            f"values clearly below zero (under {rule.clearly_negative:g}): it looks already removed"
        )
    if len(raw) >= 3 and np.percentile(values, 0.1) >= -rule.usual:
        note = f"no value below {-rule.usual:g} in any band: check that the offset is really removed"
        return conversion._replace(note="; ".join(part for part in (conversion.note, note) if part))
    return conversion


def convert(raw: np.ndarray, valid: np.ndarray, conversion: Conversion) -> np.ndarray:
    """Raw values in the sensor's stored unit.

    Args:
        raw: values [n, ...] as the file has them, n = bands that are read.
        valid: bool, of the same shape.
        conversion: of :func:`decide`.

    Returns:
        float32 of the same shape, NaN where invalid.
    """
    sensor = SENSORS[conversion.sensor]
    unit, offset_rule = sensor.units[conversion.unit], sensor.offset
    wide = np.float64 if raw.dtype.itemsize >= 8 or (raw.dtype.kind in "iu" and raw.dtype.itemsize >= 4) else np.float32
    shape = (-1,) + (1,) * (raw.ndim - 1)
    if offset_rule is not None and conversion.unit == sensor.unit:
        valid = valid & (raw > 0)
    value: np.ndarray[Any, np.dtype[np.floating]] = raw.astype(wide)
    if any(factor != 1 for factor in conversion.scale):
        value = value * np.array(conversion.scale).reshape(shape)
    if any(term != 0 for term in conversion.offset):
        value = value + np.array(conversion.offset, np.float64).reshape(shape)
    if unit.decibel:
        valid = valid & (value > 0)
        value = unit.factor * np.log10(np.where(valid, value, 1.0))
    elif unit.factor != 1:
        value = value * unit.factor
    low, high = sensor.plausible
    if conversion.clip:
        value = np.clip(value, low, high)
    elif offset_rule is not None:
        valid = valid & (value > offset_rule.lowest)
    raised = value if sensor.floor is None else np.maximum(value, sensor.floor)
    # Stored units as they are in the file: too small is no measurement. A converted value is only a small measurement.
    checked = raised if unit.decibel or offset_rule is not None else value
    valid = valid & (checked >= low) & (checked <= high)
    return np.where(valid, raised, np.nan).astype(np.float32)


def describe(conversion: Conversion) -> dict[str, Any]:
    """The decision as it is written into the report of a file."""
    facts: dict[str, Any] = {"units": conversion.unit}
    if any(value != 1 for value in conversion.scale):
        facts["scale"] = sorted(set(conversion.scale))
    if SENSORS[conversion.sensor].offset is not None:
        facts |= {"offset_applied": sorted(set(conversion.offset)), "offset_source": conversion.source}
    elif conversion.source:
        facts["units_source"] = conversion.source
    if conversion.note:
        facts["note"] = conversion.note
    return facts
