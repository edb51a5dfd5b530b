"""Acquisitions of a sensor in a record, and the arrays of a batch into which they are written."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from skysense_jax.data.records import Record


class SensorPlan(NamedTuple):
    """How one sensor is read.

    Attributes:
        name: the sensor.
        bands: indices of the contract's bands in the record; None = all in order.
        per_base: pixels of the sensor along a base pixel.
        channels: number of the contract's bands.
        dates: acquisitions per training view or evaluated place, at most.
    """

    name: str
    bands: np.ndarray | None
    per_base: int
    channels: int
    dates: int


class Stack(NamedTuple):
    """Acquisitions of one sensor on the pixels of an input.

    Attributes:
        image: [T, H, W, C] in raw units.
        valid: [T, H, W], 1 = valid; 1.0 = all valid.
        measured: uint8 [T, C], 1 = the band was measured.
        days: int32 [T], days since 1970-01-01.
    """

    image: np.ndarray
    valid: np.ndarray | float
    measured: np.ndarray
    days: np.ndarray


def usable(record: Record, name: str) -> np.ndarray:
    """The acquisitions of a sensor that have a valid pixel.

    Args:
        record: a place's record.
        name: the sensor.

    Returns:
        Their indices in time order; empty for a sensor that never saw the place.
    """
    return np.flatnonzero(record[f"{name}_valid"].any(axis=(1, 2)))


def pick(record: Record, field: str, chosen: np.ndarray) -> np.ndarray:
    """Some acquisitions of a record's array.

    Args:
        record: a place's record.
        field: the record's field, an array [T, ...].
        chosen: indices of the acquisitions.

    Returns:
        [len(chosen), ...]; no copy where it is only one acquisition (HR).
    """
    array = record[field]
    return array[chosen[0] : chosen[0] + 1] if len(chosen) == 1 else array[chosen]


def stack_of(
    record: Record, sensor: SensorPlan, chosen: np.ndarray, image: np.ndarray, valid: np.ndarray | float
) -> Stack:
    """Acquisitions of a record whose pixels are already on the pixels of the input.

    Args:
        record: a place's record.
        sensor: how the sensor is read.
        chosen: indices of the acquisitions.
        image: [T, H, W, C], the contract's bands.
        valid: [T, H, W]; 1.0 = all valid.

    Returns:
        The stack.
    """
    measured = record[f"{sensor.name}_measured"][chosen]
    measured = measured if sensor.bands is None else measured[:, sensor.bands]
    return Stack(image, valid, measured, record[f"{sensor.name}_date"][chosen])


def empty_input(lead: tuple[int, ...], pixels: int, channels: int) -> dict[str, np.ndarray]:
    """A SensorInput of padded dates: nothing valid, nothing measured, no date.

    Args:
        lead: leading axes, the last of them the dates.
        pixels: pixels along the input.
        channels: bands.

    Returns:
        {"image" [*lead, pixels, pixels, channels], "valid" [*lead, pixels, pixels], "bands" [*lead, channels]} float32,
        {"dates" [*lead]} int32.
    """
    return {
        "image": np.zeros((*lead, pixels, pixels, channels), np.float32),
        "valid": np.zeros((*lead, pixels, pixels), np.float32),
        "bands": np.zeros((*lead, channels), np.float32),
        "dates": np.full(lead, -1, np.int32),
    }


def fill(sensor_input: dict[str, np.ndarray], lead: tuple[int, ...], stack: Stack) -> None:
    """Writes acquisitions into the first dates of an input; its dates are still days since 1970.

    Args:
        sensor_input: an input as `empty_input` makes it; changed in place.
        lead: index into the leading axes in front of the dates.
        stack: the acquisitions; 0 is written where a band was not measured.
    """
    dates: tuple[int | slice, ...] = (*lead, slice(0, len(stack.days)))
    sensor_input["image"][dates] = stack.image
    if not stack.measured.all():
        sensor_input["image"][dates] *= stack.measured[:, None, None, :]
    sensor_input["valid"][dates] = stack.valid
    sensor_input["bands"][dates] = stack.measured
    sensor_input["dates"][dates] = stack.days


def position(record: Record) -> dict[str, np.generic]:
    """{"index" int64, "lon", "lat" float32 degrees} of a record's place."""
    return {"index": np.int64(record["index"]), "lon": np.float32(record["lon"]), "lat": np.float32(record["lat"])}
