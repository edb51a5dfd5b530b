"""Checks what a user passes to a model: arrays and dates become a PlaceInput, or an error names sensor and rule.

Most wrong numbers in this field come from silent preprocessing errors (bands in another order, reflectance for digital
numbers, linear power for decibels, normalising twice). None of these is repaired here by guessing: each is refused
with what to do about it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import numpy as np

from skysense_jax import sensors
from skysense_jax.core.days import LAST_DAY, day_of_year

FIELDS = ("image", "dates", "valid", "bands", "unit")
"""What a user may say of a sensor's images."""

MAX_OUTSIDE = 0.001
"""Share of valid values that may lie outside the sensor's plausible range (hot pixels, speckle)."""

MAX_SCORE = 6.0
"""|mean of a band after normalising|: no real scene lies this far from the statistics."""

Date = str | datetime.date | np.datetime64 | int | None


def prepare(contract: sensors.Contract, images: Mapping[str, Any]) -> tuple[dict[str, dict[str, np.ndarray]], bool]:
    """Checks and batches the input of one place, or of a batch of places.

    Args:
        contract: the model's input contract.
        images: {sensor: {"image" [T, H, W, C] or [B, T, H, W, C] in the contract's unit and band order, "dates" (T, or
            B lists of T: ISO text, datetime.date, numpy datetime64, or day of year counted from 0; None = unknown, for
            sensors without a time series only), optional "valid" [(B,) T, H, W], "bands" names, "unit"}}. Without
            "valid" a pixel is valid where every band is finite and none is the sensor's nodata value.

    Returns:
        (PlaceInput with a leading batch axis, whether `images` had one): image, valid, bands float32, dates int32.

    Raises:
        ValueError: something does not fit; the message names the sensor and the rule.
    """
    if not isinstance(images, Mapping) or not images:
        raise ValueError(f"give a dict with at least one of the sensors {', '.join(contract['sensors'])}")
    inputs: dict[str, dict[str, np.ndarray]] = {}
    batched, grids = {}, {}
    for name, entry in images.items():
        image = _image(contract, name, entry)
        batched[name] = image.ndim == 5
        image = image if batched[name] else image[None]
        valid = _valid(name, image, entry.get("valid"), batched[name])
        _plausible(contract, name, image, valid)
        b, t = image.shape[:2]
        inputs[name] = {
            "image": np.where(valid[..., None], image, 0.0).astype(np.float32),
            "valid": valid.astype(np.float32),
            "bands": np.ones((b, t, image.shape[-1]), np.float32),
            "dates": _dates(name, entry.get("dates"), b, t, batched[name]),
        }
        grids[name] = _base_grid(contract, name, image.shape[2:4])
    if len(set(batched.values())) > 1:
        raise ValueError(
            f"some sensors have a batch axis and some have none: {batched}; give all as "
            "[T, H, W, C] or all as [B, T, H, W, C]"
        )
    counts = {name: len(entry["image"]) for name, entry in inputs.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the sensors hold different numbers of places: {counts}")
    if len(set(grids.values())) > 1:
        raise ValueError(
            f"the sensors do not cover the same ground: base grids {grids} (sensors on the "
            f"fine grid have {contract['ratio']} pixels along every base pixel)"
        )
    return inputs, next(iter(batched.values()))


def location(place: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
    """Where places are.

    Args:
        place: {"lon", "lat"} in degrees, one number each or one per place; nan = not known.
        count: number of places.

    Returns:
        {"lon", "lat"} float32 [count].

    Raises:
        ValueError: a name that is missing or unknown, another number of places, or degrees that are none on Earth.
    """
    if not isinstance(place, Mapping) or set(place) != {"lon", "lat"}:
        raise ValueError(f'place: give {{"lon": degrees, "lat": degrees}}, got {place!r}')
    degrees = {name: np.asarray(values, np.float64) for name, values in place.items()}
    for name, limit in (("lon", 360), ("lat", 90)):
        values = degrees[name]
        if values.size != count or values.ndim > 1:
            raise ValueError(f"place: {name} has shape {values.shape}, for {count} places one number each is needed")
        if (np.abs(values) > limit).any():
            raise ValueError(
                f"place: {name} must lie within -{limit}..{limit} degrees, nan where it is not known; got "
                f"{values[np.abs(values) > limit][0] if values.ndim else values:g}"
            )
    return {name: values.astype(np.float32).reshape(count) for name, values in degrees.items()}


def _image(contract: sensors.Contract, name: str, entry: Any) -> np.ndarray:
    rule = sensors.sensor_rule(contract, name)
    if not isinstance(entry, Mapping) or "image" not in entry:
        raise ValueError(f'{name}: give a dict with "image" and "dates"')
    unknown = set(entry) - set(FIELDS)
    if unknown:
        raise ValueError(f"{name}: unknown field {sorted(unknown)[0]!r}; the fields are {', '.join(FIELDS)}")
    bands = [sensors.band_name(name, band) for band in entry["bands"]] if "bands" in entry else rule["bands"]
    sensors.check_contract(contract, name, bands, entry.get("unit", rule["unit"]))
    image = np.asarray(entry["image"])
    if image.dtype.kind not in "fiu":
        raise ValueError(f"{name}: image of type {image.dtype}; give numbers in {rule['unit']}")
    if image.ndim not in (4, 5):
        raise ValueError(
            f"{name}: image of shape {image.shape}; give [dates, rows, columns, bands], or that with "
            "a leading batch axis"
        )
    if image.shape[-1] != len(rule["bands"]):
        hint = " (the bands are the last axis)" if len(rule["bands"]) in image.shape[:-1] else ""
        raise ValueError(
            f"{name}: {image.shape[-1]} channels given, the model expects {len(rule['bands'])}: "
            f"{', '.join(rule['bands'])}{hint}"
        )
    if not image.size:
        raise ValueError(f"{name}: image of shape {image.shape} holds nothing")
    return image.astype(np.float32)


def _valid(name: str, image: np.ndarray, stated: np.ndarray | None, batched: bool) -> np.ndarray:
    """Validity bool [B, T, H, W]: the pixels that `stated` says are valid, else those that hold measurements."""
    finite = np.isfinite(image).all(-1)
    if stated is None:
        nodata = sensors.SENSORS[name].nodata
        valid = finite if nodata is None else finite & (image != nodata).all(-1)
    else:
        valid = np.asarray(stated)
        valid = valid if batched else valid[None]
        if valid.shape != image.shape[:4]:
            raise ValueError(
                f"{name}: valid of shape {np.shape(stated)} does not match the image's dates, rows and columns "
                f"{image.shape[:4] if batched else image.shape[1:4]}"
            )
        if not np.isin(valid, (0, 1)).all():
            raise ValueError(f"{name}: valid must hold 0 and 1 only")
        valid = valid.astype(bool)
        if (valid & ~finite).any():
            raise ValueError(f"{name}: {int((valid & ~finite).sum())} pixels marked valid hold NaN or infinity")
    if not valid.any():
        raise ValueError(f"{name}: no valid pixel at all; leave the sensor out instead")
    return valid


def _plausible(contract: sensors.Contract, name: str, image: np.ndarray, valid: np.ndarray) -> None:
    """Refuses values that are in another unit, in another order of bands or normalised already."""
    row, rule = sensors.SENSORS[name], contract["sensors"][name]
    values = image[valid]
    low, middle, high = float(values.min()), float(np.median(values)), float(values.max())
    summary = f"{name}: valid values {low:.4g} .. {high:.4g} (median {middle:.4g})"
    for mistake in row.mistakes:
        fits = not mistake.fractional or (values != np.round(values)).any()
        if mistake.low <= low and high <= mistake.high and fits:
            raise ValueError(f"{summary}: {mistake.advice}")
    outside = float(((values < row.plausible[0]) | (values > row.plausible[1])).mean())
    if outside > MAX_OUTSIDE:
        raise ValueError(
            f"{summary}: {outside:.1%} lie outside the plausible {row.plausible[0]:g} .. {row.plausible[1]:g} "
            f"{rule['unit']}; give raw values in this unit (normalisation belongs to the model)"
        )
    if "datum" in rule:
        values = values - np.percentile(values, 50, axis=0, method="lower")
    score = (values.mean(0) - np.asarray(rule["mean"])) / np.asarray(rule["std"])
    worst = int(np.abs(score).argmax())
    if abs(score[worst]) > MAX_SCORE:
        raise ValueError(
            f"{name}: band {rule['bands'][worst]} has mean {values.mean(0)[worst]:.4g}, {abs(score[worst]):.1f} "
            f"deviations from the model's {rule['mean'][worst]:.4g}; check unit, offset and band order"
        )


def _base_grid(contract: sensors.Contract, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns in base pixels."""
    step = sensors.pixels_per_base(contract["sensors"][name], contract["ratio"])
    if shape[0] % step or shape[1] % step:
        raise ValueError(
            f"{name}: {shape[0]}x{shape[1]} pixels; rows and columns must be multiples of the ratio {step}"
        )
    return shape[0] // step, shape[1] // step


def _dates(name: str, stated: Any, places: int, count: int, batched: bool) -> np.ndarray:
    """Day of the year from 0 for every acquisition: int32 [B, T], -1 = unknown."""
    if stated is None:
        if sensors.SENSORS[name].dated:
            raise ValueError(f'{name}: a time series needs "dates", one per acquisition')
        return np.full((places, count), sensors.NO_DATE, np.int32)
    if isinstance(stated, (str, datetime.date, np.datetime64)):
        raise ValueError(f"{name}: give dates as a list, one per acquisition")
    lists = list(stated) if batched else [stated]
    if len(lists) != places:
        raise ValueError(f"{name}: dates for {len(lists)} places given, the images hold {places}")
    days = np.empty((places, count), np.int32)
    for index, dates in enumerate(lists):
        if isinstance(dates, (str, bytes)) or not hasattr(dates, "__len__"):
            raise ValueError(f"{name}: a batch needs one list of dates per place, got {dates!r}")
        if len(dates) != count:
            raise ValueError(f"{name}: {len(dates)} dates given for {count} acquisitions")
        days[index] = [_day_of_year(name, date) for date in dates]
    return days


def _day_of_year(name: str, date: Date) -> int:
    """Day of the year from 0 of one date in any of the forms `prepare` takes, NO_DATE where it is unknown."""
    if date is None:
        if sensors.SENSORS[name].dated:
            raise ValueError(f"{name}: an acquisition of a time series without a date")
        return sensors.NO_DATE
    if isinstance(date, (int, np.integer)) and not isinstance(date, bool):
        if not 0 <= date <= 365:
            raise ValueError(f"{name}: {date} is no day of the year (1 January = 0, 31 December = 364 or 365)")
        return min(int(date), LAST_DAY)
    if not isinstance(date, (str, datetime.date, np.datetime64)):
        raise ValueError(f"{name}: {date!r} is no date; give ISO text, datetime.date or a day of the year")
    if isinstance(date, str) and len(date) < len("2020-01-31"):
        raise ValueError(f"{name}: {date!r} is not a full date; write YYYY-MM-DD")
    when: np.ndarray
    try:
        if isinstance(date, str):
            # the first ten characters of an ISO time are its date, whatever the time zone that follows
            when = np.asarray(np.datetime64(date[:10], "D"))
        elif isinstance(date, datetime.datetime):
            when = np.asarray(date.date()).astype("datetime64[D]")  # numpy refuses time zones
        else:
            when = np.asarray(date).astype("datetime64[D]")
    except ValueError as error:
        raise ValueError(f"{name}: {date!r} is no date ({error}); write YYYY-MM-DD") from error
    if np.isnat(when):
        raise ValueError(f"{name}: not a date (NaT)")
    return int(day_of_year(when))
